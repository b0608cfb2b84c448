"""
The decoding step's kernels, in Triton.       letters: B rows, C channels, hs head size, V vocabulary

A step is a chain of some hundred short kernels, so what counts is how soon the next one is at work. Each is launched
while the one before it still runs (programmatic dependent launch, PDL): it loads what no kernel of the step writes, its
weights and the kept keys and values, and only then waits for what the one before it leaves.
"""
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(PDL: tl.constexpr):
    """Let the next kernel begin; go on when the one before has written everything."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def load(x, at, real):
    """float32, zeros where not `real` and where there is no x."""
    return tl.zeros(at.shape, tl.float32) if x is None else tl.load(x + at, mask=real, other=0.).to(tl.float32)


@triton.jit
def add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def layer_norm(x, pivot, gain, bias, real, SIZE: tl.constexpr):
    """
    The LayerNorm of one row, whose numbers beyond SIZE are not `real`. Both sums in one go: the threads meet once. From
    a number of the row, `pivot`, the mean is at most sqrt(SIZE) standard deviations away, so little cancels.
    """
    off = tl.where(real, x - pivot, 0.)
    total, squares = tl.reduce((off, off * off), 0, add_both)
    mean = total / SIZE
    return (off - mean) * tl.rsqrt(squares / SIZE - mean * mean + 1e-5) * gain + bias


@triton.jit
def gelu(x, KIND: tl.constexpr):
    """nn.GELU(approximate=KIND); KIND None is no GELU at all."""
    if KIND == 'tanh':
        x *= tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x)) # 2 sqrt(2 / pi)
    elif KIND == 'none':
        x *= 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    return x


@triton.jit
def embed(text, width, newest, places, wte, wpe, x, C: tl.constexpr, COLS: tl.constexpr, PDL: tl.constexpr):
    """x = wte[the newest token] + wpe[its place]        a program: one row"""
    row, c = tl.program_id(0), tl.arange(0, COLS)
    real = c < C
    wait(PDL)
    token, place = tl.load(text + row * width + tl.load(newest)), tl.load(places + row)
    tl.store(x + row * C + c, load(wte, token * C + c, real) + load(wpe, place * C + c, real), mask=real)


@triton.jit
def matvec(x, lse, gain, shift, weight, bias, out, N, K: tl.constexpr, HS: tl.constexpr, SPLITS: tl.constexpr,
           GELU: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PDL: tl.constexpr):
    """
    out[n] (+)= gelu(sum_k weight[n][k] f(x)[k] + bias[n])        a program: ROWS of N, one row of x

    f     LayerNorm where there is a gain; where there is an lse, the SPLITS parts of an attention become one
    COLS  a power of two that holds all K: a program's whole share of the weights is loaded before it waits
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLS)
    row, real = tl.program_id(1), k < K
    w = tl.load(weight + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & real[None, :], other=0.)
    b = load(bias, n, n < N)
    if gain is not None:
        gains, shifts = load(gain, k, real), load(shift, k, real)
    wait(PDL)
    if lse is not None:
        lse += (row * (K // HS) + k // HS) * SPLITS
        top = tl.load(lse, mask=real, other=0.)
        for s in tl.static_range(1, SPLITS):
            top = tl.maximum(top, tl.load(lse + s, mask=real, other=0.))
        total = tl.zeros_like(top)
        a = tl.zeros_like(top)
        for s in tl.static_range(SPLITS):
            share = tl.exp2(tl.load(lse + s, mask=real, other=0.) - top)
            total += share
            a += share * tl.load(x + (row * SPLITS + s) * K + k, mask=real, other=0.)
        a /= total
    else:
        a = load(x, row * K + k, real)
    if gain is not None:
        a = layer_norm(a, tl.load(x + row * K), gains, shifts, real, K)
    y = tl.sum(w.to(tl.float32) * a[None, :], 1) + b
    y = gelu(y, GELU)
    out += row * N + n
    if ADD:
        y += tl.load(out, mask=n < N, other=0.)
    tl.store(out, y, mask=n < N)


@triton.jit
def matmul(x, weight, bias, out, B, N, K: tl.constexpr, SPLITS: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr,
           COLS: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr):
    """
    out[b][n] = gelu(sum_k x[b][k] weight[n][k] + bias[n])     a program: ROWS of B, COLS of N, one of SPLITS parts of K

    Each part is a matrix of its own in out, (SPLITS, B, N); the first has the bias.
    """
    n = tl.program_id(0) * COLS + tl.arange(0, COLS)
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split, here = tl.program_id(2), n < N
    part: tl.constexpr = (K + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK # of K
    first, end = split * part, tl.minimum(split * part + part, K)
    y0 = load(bias, n, here & (split == 0))
    if PDL: # the weights come as far as L2
        at = first + tl.arange(0, LINES) * (1024 // weight.dtype.element_ty.primitive_bitwidth) # 128 bytes each
        lines = weight + tl.where(here, n, 0)[:, None] * K + tl.where(at < end, at, 0)[None, :]
        tl.inline_asm_elementwise('prefetch.global.L2 [$1]; mov.u32 $0, 0;', '=r,l', [lines.to(tl.int64)], tl.int32,
                                  is_pure=False, pack=1)
    wait(PDL)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in tl.range(first, end, BLOCK):
        k = start + tl.arange(0, BLOCK)
        a = tl.load(x + b[:, None] * K + k[None, :], mask=(b < B)[:, None] & (k < end)[None, :], other=0.)
        w = tl.load(weight + n[:, None] * K + k[None, :], mask=here[:, None] & (k < end)[None, :], other=0.)
        acc = tl.dot(a, w.T, acc, input_precision='ieee')
    y = gelu(acc + y0[None, :], GELU)
    tl.store(out + (split * B + b).to(tl.int64)[:, None] * N + n[None, :], y, mask=(b < B)[:, None] & here[None, :])


@triton.jit
def add_norm(x, y, gain, bias, out, B, C: tl.constexpr, SPLITS: tl.constexpr, COLS: tl.constexpr, PDL: tl.constexpr):
    """x += the sum of y's SPLITS parts, where there is a y; out = LayerNorm(x)        a program: one row"""
    c = tl.arange(0, COLS)
    real, at = c < C, tl.program_id(0) * C + c
    gains, shifts = load(gain, c, real), load(bias, c, real)
    wait(PDL)
    a, pivot = load(x, at, real), tl.load(x + tl.program_id(0) * C)
    if y is not None:
        for split in tl.static_range(SPLITS):
            a += load(y, split * B * C + at, real)
    h = layer_norm(a, pivot, gains, shifts, real, C) # in which all threads meet: the pivot has been read
    if y is not None:
        tl.store(x + at, a, mask=real)
    tl.store(out + at, h, mask=real)


@triton.jit
def attend(qkv, keys, values, places, out, lse, room, scale_log2, HEADS: tl.constexpr, HS: tl.constexpr,
           D: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """
    The attention of a row's newest token, which stands at places[row], over itself and all before it, which are kept;
    its key and value are kept too.      a program: one row, one head, one of SPLITS runs of the places

    BLOCK softmaxes run side by side, the i-th over each run's i-th, BLOCK + i-th, ... place, and become one at the end:
    nothing is summed over places until then.
    """
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d, real = tl.arange(0, D), tl.arange(0, D) < HS
    place = tl.load(places + row).to(tl.int32)
    kept = (row * HEADS + head).to(tl.int64) * room * HS
    keys += kept
    values += kept
    run = tl.cdiv(place, SPLITS)
    first, end = split * run, tl.minimum(split * run + run, place)
    t = first + tl.arange(0, BLOCK)
    mask = (t < end)[:, None] & real[None, :]
    k = tl.load(keys + t[:, None] * HS + d[None, :], mask=mask, other=0.)
    v = tl.load(values + t[:, None] * HS + d[None, :], mask=mask, other=0.)
    wait(PDL)
    qkv += row * 3 * HEADS * HS + head * HS + d
    q = tl.load(qkv, mask=real, other=0.).to(tl.float32) * scale_log2
    new_k = tl.load(qkv + HEADS * HS, mask=real, other=0.).to(keys.dtype.element_ty)
    new_v = tl.load(qkv + 2 * HEADS * HS, mask=real, other=0.).to(keys.dtype.element_ty)
    top = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for start in tl.range(first, end, BLOCK):
        t = start + BLOCK + tl.arange(0, BLOCK)
        mask = (t < end)[:, None] & real[None, :]
        next_k = tl.load(keys + t[:, None] * HS + d[None, :], mask=mask, other=0.)
        next_v = tl.load(values + t[:, None] * HS + d[None, :], mask=mask, other=0.)
        score = tl.where(t - BLOCK < end, tl.sum(k.to(tl.float32) * q[None, :], 1), -float('inf'))
        higher = tl.maximum(top, score)
        shrink, p = tl.exp2(top - higher), tl.exp2(score - higher)
        total = total * shrink + p
        acc = acc * shrink[:, None] + p[:, None] * v.to(tl.float32)
        top, k, v = higher, next_k, next_v
    # the newest token belongs to the first run
    score = tl.where(split == 0, tl.sum(q * new_k.to(tl.float32), 0), -1e30)
    tl.store(keys + place * HS + d, new_k, mask=real & (split == 0))
    tl.store(values + place * HS + d, new_v, mask=real & (split == 0))
    highest = tl.maximum(tl.max(top, 0), score)
    p = tl.where(split == 0, tl.exp2(score - highest), 0.)
    shrink = tl.exp2(top - highest)
    sum_p = tl.sum(total * shrink, 0) + p
    y = (tl.sum(acc * shrink[:, None], 0) + p * new_v.to(tl.float32)) / tl.maximum(sum_p, 1e-30) # an empty run has none
    tl.store(out + (row * SPLITS + split) * HEADS * HS + head * HS + d, y, mask=real)
    if SPLITS > 1:
        tl.store(lse + (row * HEADS + head) * SPLITS + split, highest + tl.log2(tl.maximum(sum_p, 1e-30)))


@triton.jit
def scramble(x):
    """As sampling.scramble."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def sort_key(x):
    """int32 that are in order as the float32 x are."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def of_sort_key(key):
    """The float32 whose sort_key is the int64 `key`."""
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def between(low, high, more, fewer, turn):
    """
    A key between two, where the logarithm of the count would be the wanted one if it fell evenly, as it nearly does
    among the largest. What takes long, equal numbers or ones far apart, ends by halving integers.
    """
    lower, upper = of_sort_key(low), of_sort_key(high)
    guess = sort_key(lower + tl.minimum(tl.maximum(more / (more - fewer), 0.01), 0.99) * (upper - lower)).to(tl.int64)
    return tl.where(turn < 20, tl.minimum(tl.maximum(guess, low + 1), high - 1), (low + high) >> 1)


@triton.jit
def narrowed(low, reach_low, high, more, fewer, stayed, middle, reached, TOP_K, log_k):
    """
    The narrower search when `reached` numbers reach the key `middle`: low, how many reach it, at least TOP_K, and high,
    which fewer reach; the logarithms of both counts over TOP_K. One that stays a second time counts for half (the
    Illinois rule), or it might stay for good.
    """
    enough = reached >= TOP_K
    found = tl.log2(tl.maximum(reached, 0.5)) - log_k
    more, fewer = tl.where(enough, found, tl.where(stayed < 0, more * 0.5, more)), \
        tl.where(enough, tl.where(stayed > 0, fewer * 0.5, fewer), found)
    return tl.where(enough, middle, low), tl.where(enough, reached, reach_low), tl.where(enough, high, middle), \
        more, fewer, tl.where(enough, 1, -1)


@triton.jit
def how_many(first, second, number):
    return tl.sum((first >= number).to(tl.float32) + (second >= number).to(tl.float32), 0)


@triton.jit
def kth_largest(logits, stride, kth, V, TOP_K, log_k, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """
    A number that exactly the TOP_K largest of a row reach, or, of equal ones, more.        a program: one row

    A turn counts how many reach a number between one that too many reach and one that too few do. A row is more than
    the registers hold, so it is searched among the two largest of every BLOCK-th number, and seldom, where a third one
    is among those looked for, once more in L1.
    """
    row, v = logits + tl.program_id(0).to(tl.int64) * stride, tl.arange(0, BLOCK)
    first, second = tl.full((BLOCK,), -float('inf'), tl.float32), tl.full((BLOCK,), -float('inf'), tl.float32)
    third = second
    wait(PDL)
    following = tl.load(row + v, mask=v < V, other=-float('inf')).to(tl.float32)
    for start in range(BLOCK, V + BLOCK, BLOCK):
        x, following = following, tl.load(row + start + v, mask=start + v < V, other=-float('inf')).to(tl.float32)
        third = tl.maximum(third, tl.minimum(second, x))
        second, first = tl.maximum(second, tl.minimum(first, x)), tl.maximum(first, x)
    above = sort_key(tl.max(first, 0)).to(tl.int64) + 1
    low, high = sort_key(tl.min(tl.where(first > -float('inf'), first, float('inf')), 0)).to(tl.int64), above
    reach_low, turn, stayed = how_many(first, second, of_sort_key(low)), 0, 0
    more, fewer = tl.log2(tl.maximum(reach_low, 0.5)) - log_k, -1.0 - log_k
    while (high - low > 1) & (reach_low > TOP_K):
        middle = between(low, high, more, fewer, turn)
        reached = how_many(first, second, of_sort_key(middle))
        low, reach_low, high, more, fewer, stayed = narrowed(low, reach_low, high, more, fewer, stayed, middle, reached,
                                                             TOP_K, log_k)
        turn += 1

    if (reach_low < TOP_K) | (tl.max(third, 0) >= of_sort_key(low)): # some are not among the two largest
        if reach_low < TOP_K:
            smallest = tl.full((BLOCK,), float('inf'), tl.float32)
            for start in range(0, V, BLOCK):
                x = tl.load(row + start + v, mask=start + v < V, other=float('inf')).to(tl.float32)
                smallest = tl.minimum(smallest, tl.where(x > -float('inf'), x, float('inf')))
            low, high = sort_key(tl.min(smallest, 0)).to(tl.int64), above
        lower, upper = of_sort_key(low), of_sort_key(high)
        at_low, at_high = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            x = tl.load(row + start + v, mask=start + v < V, other=-float('inf')).to(tl.float32)
            at_low += (x >= lower).to(tl.float32)
            at_high += (x >= upper).to(tl.float32)
        reach_low, reach_high, turn, stayed = tl.sum(at_low, 0), tl.sum(at_high, 0), 0, 0
        if reach_high >= TOP_K:
            low, reach_low, high, reach_high = high, reach_high, above, 0.0
        more, fewer = tl.log2(tl.maximum(reach_low, 0.5)) - log_k, tl.log2(tl.maximum(reach_high, 0.5)) - log_k
        if reach_low < TOP_K:
            low = low * 0 - 2139095041 # -inf's key: all reach it
        while (high - low > 1) & (reach_low > TOP_K):
            middle = between(low, high, more, fewer, turn)
            number, at_middle = of_sort_key(middle), tl.zeros((BLOCK,), tl.float32)
            for start in range(0, V, BLOCK):
                x = tl.load(row + start + v, mask=start + v < V, other=-float('inf')).to(tl.float32)
                at_middle += (x >= number).to(tl.float32)
            low, reach_low, high, more, fewer, stayed = narrowed(low, reach_low, high, more, fewer, stayed, middle,
                                                                 tl.sum(at_middle, 0), TOP_K, log_k)
            turn += 1
    tl.store(kth + tl.program_id(0), of_sort_key(low))


@triton.jit
def draw(logits, stride, kth, seeds, places, newest, best, token, V, warmth, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """
    The largest of logit * warmth + Gumbel noise, and whose it is, among BLOCK tokens of a row.

    places  None, or of the rows' newest tokens: the noise is the next ones', whose column, `newest`, is counted up
    """
    block, row = tl.program_id(0), tl.program_id(1)
    v = block * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    seed = tl.load(seeds + row)
    if places is not None:
        seed += tl.load(places + row) + 1
        counts = (block == 0) & (row == 0)
        tl.store(newest, tl.load(newest, mask=counts) + 1, mask=counts)
    bits = scramble(scramble(seed.to(tl.uint64, bitcast=True)) + v.to(tl.uint64))
    uniform = (((bits >> 41) & 0x7FFFFF).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    logit = tl.load(logits + row.to(tl.int64) * stride + v, mask=v < V, other=-float('inf')).to(tl.float32)
    score = logit * warmth - tl.log(-tl.log(uniform))
    if kth is not None:
        score = tl.where(logit >= tl.load(kth + row), score, -float('inf'))
    largest, where = tl.max(score, 0, return_indices=True)
    at = row * tl.num_programs(0) + block
    tl.store(best + at, largest)
    tl.store(token + at, (block * BLOCK + where).to(tl.int64))


@triton.jit
def choose(best, token, chosen, text, width, newest, places, B, BLOCKS, ROWS: tl.constexpr, COLS: tl.constexpr,
           PDL: tl.constexpr):
    """
    The token of each row's largest score among those of its BLOCKS blocks: into `chosen` (B) or into column `newest` of
    text (B, width), and the rows' places are counted up.        a program: ROWS rows
    """
    row, block = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    at, real = row[:, None] * BLOCKS + block[None, :], row < B
    wait(PDL)
    score = tl.load(best + at, mask=real[:, None] & (block < BLOCKS)[None, :], other=-float('inf'))
    _, where = tl.max(score, 1, return_indices=True)
    found = tl.load(token + row * BLOCKS + where, mask=real)
    if chosen is not None:
        tl.store(chosen + row, found, mask=real)
    else:
        tl.store(text + row * width + tl.load(newest), found, mask=real)
        tl.store(places + row, tl.load(places + row, mask=real) + 1, mask=real)
