"""
The passes over memory between a GPT's matmuls, each in one kernel and, beside it, in plain torch.

Every function runs its Triton kernel on a CUDA device and its plain definition elsewhere, in any float dtype.
M rows (tokens), C channels, V vocabulary. `seed` is a device tensor of one int64; a mask depends on seed and place.
"""
import contextlib
import math
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from ThunderKittens.examples import gemm_gelu

try:
    import triton
    import triton.language as tl
except ImportError: # comes with torch for CUDA; the plain definitions need none
    triton = None

EPS = 1e-5 # of LayerNorm
TINY = 1e-30 # what a smaller weight of a LayerNorm counts as, so that the output still tells what was normalised
PROGRAMS = 264 # of a kernel that sums over rows: two for each of an H100's 132 SMs


def _block(n):
    """The smallest power of two that holds n."""
    return 1 << max(0, n - 1).bit_length()


def _warps(values):
    """So many that no value of a tile is held by two threads: a kernel that writes over what it reads relies on it."""
    return max(1, min(8, values // 32))


_planned = None # while compiled_together: the kernels that would have been launched


def _launch(kernel, programs, *args, **options):
    if _planned is None:
        kernel[(programs,)](*args, **options)
    else:
        _planned.append(kernel.warmup(*args, grid=(programs,), **options))


@contextlib.contextmanager
def compiled_together(device):
    """
    Inside, no kernel is launched: those that would be are compiled, all at the same time, and ready at the end. One
    after the other, each when it is first needed, takes half a second for each kernel.
    """
    global _planned
    _planned = []
    try:
        with ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,)) as threads:
            with triton.AsyncCompileMode(threads):
                yield
            kernels = {kernel.result() if hasattr(kernel, 'result') else kernel for kernel in _planned}
            list(threads.map(lambda kernel: kernel.run, kernels)) # compiles and loads what launches them
    finally:
        _planned = None


# ---- dropout -----------------------------------------------------------------------------------------------------

def keep_mask(seed, shape, p):
    """1 / (1 - p) where a value is kept, 0 where it is dropped: what the functions below apply to a (M, C) `shape`."""
    M, C = shape
    if seed.is_cuda:
        mask = torch.empty(shape, dtype=torch.float32, device=seed.device)
        _launch(_keep_mask, M, mask, seed, C, *_threshold(p), _block(C))
        return mask
    bits = torch.arange(M * C).view(shape)
    for half in (int(seed) & 0xFFFFFFFF, int(seed) >> 32):
        bits = bits + half & 0xFFFFFFFF
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            bits = (bits ^ bits >> shift) * factor & 0xFFFFFFFF
    threshold, scale = _threshold(p)
    return (bits >= threshold).to(torch.float32) * scale


def _threshold(p):
    """What 32 random bits must reach to keep a value, and the factor of what is kept."""
    return min(round(p * 2**32), 2**32 - 1), 1 / (1 - p)


# ---- embeddings --------------------------------------------------------------------------------------------------

def embed(ids, wte, wpe, seed, p, dtype):
    """wte[ids] + wpe, dropped out: ids (B, T) int64, wte (V, C), wpe (block_size, C) -> (B T, C) of `dtype`."""
    B, T = ids.shape
    C = wte.size(1)
    if not ids.is_cuda:
        x = (wte[ids] + wpe[:T]).view(B * T, C).to(dtype)
        return x * keep_mask(seed, x.shape, p).to(dtype) if p else x
    x = torch.empty(B * T, C, dtype=dtype, device=ids.device)
    _launch(_embed, B * T, ids, wte, wpe, x, seed, T, C, *_threshold(p), _block(C), p > 0)
    return x


def embed_backward(dx, ids, seed, p, dwte, dwpe, add):
    """dx (B T, C) into dwte (V, C), which is added to, and dwpe (block_size, C): set, or added to with `add`."""
    B, T = ids.shape
    C = dx.size(1)
    if dx.is_cuda and not torch.are_deterministic_algorithms_enabled():
        _launch(_embed_backward, len(dwpe), dx, ids, dwte, dwpe, seed, B, T, C, *_threshold(p), 4, _block(C), add,
                p > 0, num_warps=_warps(4 * _block(C)))
        return
    if p:
        dx = dx * keep_mask(seed, dx.shape, p).to(dx.dtype)
    dwte += torch.ops.aten.embedding_dense_backward(dx.to(dwte.dtype), ids.view(-1), len(dwte), -1, False)
    sum_into(dwpe[:T], dx.view(B, T, C), 0, add)
    if not add:
        dwpe[T:] = 0


def number_tokens(ids, different, vocab_size):
    """
    ids (B, T) int64 -> (B, T) int64: for each a place where its token stands, the same for equal ones. `different`
    (B T), an integer type, gets the token at these places; -1 fills the rest.
    """
    tokens = ids.view(-1)
    places = torch.arange(len(tokens), device=ids.device)
    number = places.new_empty(vocab_size).scatter_(0, tokens, places)[tokens] # one of its places, whichever wins
    different.fill_(-1).scatter_(0, number, tokens.to(different.dtype)) # equal ones write the same
    return number.view(ids.shape)


def add_rows(wte, ids, rows):
    """wte[ids] += rows, of which each goes elsewhere: wte (V, C), ids (n), rows (n, C); an id of -1 goes nowhere."""
    if ids.is_cuda:
        C = wte.size(1)
        _launch(_add_rows, len(ids), wte, ids, rows, C, _block(C))
    else:
        wte[ids[ids >= 0]] += rows[ids >= 0]


def sum_into(total, x, dim, add):
    """The sum of x over a dimension, in total's dtype; added to what is there with `add`."""
    if add:
        total += x.sum(dim, dtype=total.dtype)
    else:
        torch.sum(x, dim, dtype=total.dtype, out=total)


# ---- residual stream and LayerNorm -------------------------------------------------------------------------------

def add_norm(x, branch, weight, bias, seed, p, half):
    """
    The residual stream after a branch, and its LayerNorm.

    x        (M, C), the stream before
    branch   (M, C) or None, dropped out with probability p and added
    returns  (the stream after, (M, C) of x's dtype, x itself without a branch; its LayerNorm, (M, C) of dtype `half`;
             mean and 1 / standard deviation, (M, 2) float32 or wider)
    """
    M, C = x.shape
    if x.is_cuda:
        after = x if branch is None else torch.empty_like(x)
        h = torch.empty(M, C, dtype=half, device=x.device)
        stats = torch.empty(M, 2, dtype=torch.float32, device=x.device)
        rows = 4 if C <= 1024 else 2
        _launch(_add_norm, -(-M // rows), x, branch, weight, bias, seed, after, h, stats, M, C, *_threshold(p), EPS,
                TINY, rows, _block(C), branch is not None, bias is not None, p > 0, num_warps=_warps(rows * _block(C)))
        return after, h, stats
    if branch is not None:
        x = x + (branch * keep_mask(seed, x.shape, p) if p else branch).to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    var, mean = torch.var_mean(x.to(wide), dim=1, keepdim=True, correction=0)
    stats = torch.cat((mean, (var + EPS).rsqrt()), dim=1)
    return x, F.layer_norm(x.to(wide), (C,), _not_0(weight), bias, EPS).to(half), stats


def _not_0(weight):
    return torch.where(weight.abs() < TINY, TINY, weight)


def norm_backward(dh, saved, stats, weight, dx, seed, p, dweight, dbias, residual):
    """
    The gradient of the residual stream through add_norm.

    dh        (M, C), of the LayerNorm's output
    saved     (M, C), that output if it has no bias, for it is half as long to read, else the stream after
    dx        (M, C) or None, of the stream after; changed in place
    dweight   (PROGRAMS, C), takes parts whose sum over the first axis is the weight's gradient; dbias likewise, None
              without a bias
    residual  dtype of the stream
    returns   (dx, of dtype `residual`; the gradient of the branch, (M, C) of dh's dtype)
    """
    M, C = dh.shape
    if dh.is_cuda:
        out, dbranch = torch.empty_like(dh, dtype=residual) if dx is None else dx, torch.empty_like(dh)
        rows = 4 if C <= 1024 else 2
        _launch(_norm_backward, PROGRAMS, dh, saved, stats, weight, dx, seed, out, dbranch, dweight, dbias, M, C,
                *_threshold(p), TINY, rows, _block(C), dx is not None, dbias is not None, p > 0,
                num_warps=_warps(rows * _block(C)))
        return out, dbranch
    mean, rstd = stats[:, :1], stats[:, 1:]
    normed = saved / _not_0(weight) if dbias is None else (saved - mean) * rstd
    dnormed = dh.to(stats.dtype) * weight
    dweight.zero_()[0] = (dh * normed).sum(0)
    if dbias is not None:
        dbias.zero_()[0] = dh.to(stats.dtype).sum(0)
    through = rstd * (dnormed - dnormed.mean(1, keepdim=True) - normed * (dnormed * normed).mean(1, keepdim=True))
    dx = through.to(residual) if dx is None else dx.add_(through)
    return dx, (dx * keep_mask(seed, dx.shape, p) if p else dx).to(dh.dtype, copy=True)


# ---- GELU --------------------------------------------------------------------------------------------------------

def gelu(x, tanh):
    """GELU of x, any shape; exact, or with `tanh` in GPT-2's approximation."""
    if not x.is_cuda:
        return F.gelu(x, approximate='tanh' if tanh else 'none')
    y = torch.empty_like(x)
    _launch(_gelu, triton.cdiv(x.numel(), 2048), x, y, x.numel(), tanh, 2048, num_warps=8)
    return y


def gelu_backward(x, dy, tanh, again=None):
    """dy times GELU's derivative at x, written over dy; `again` takes GELU of x once more."""
    if x.is_cuda:
        n = x.numel()
        _launch(_gelu_backward, triton.cdiv(n, 2048), x, dy, again, n, tanh, again is not None, 2048, num_warps=8)
        return dy
    if again is not None:
        again.copy_(gelu(x, tanh))
    return dy.copy_(torch.ops.aten.gelu_backward(dy, x, approximate='tanh' if tanh else 'none'))


def linear_gelu(x, w, bias, tanh):
    """x w^T + bias and its GELU, (M, out) both: x (M, in), w (out, in), bias (out) or None."""
    if _has_gelu_in_matmul(x, w):
        return gemm_gelu.linear_gelu(x, w, bias, tanh)
    before = x @ w.t() if bias is None else torch.addmm(bias, x, w.t())
    return before, gelu(before, tanh)


def linear_gelu_backward(dy, w, before, tanh, again):
    """
    The gradient of `before` where gelu(before) w^T has the gradient dy: dy (M, out), w (out, in), before (M, in).

    returns  (that gradient, (M, in); GELU of `before` once more with `again`, else None)
    """
    if _has_gelu_in_matmul(dy, w):
        found = gemm_gelu.linear_gelu_backward(dy, w, before, tanh, again)
        return found if again else (found, None)
    act = torch.empty_like(before) if again else None
    return gelu_backward(before, dy @ w, tanh, act), act


def _has_gelu_in_matmul(x, w):
    return (x.is_cuda and x.dtype is torch.bfloat16 and gemm_gelu.is_available()
            and not gemm_gelu.why_not_for(*w.shape))


# ---- cross-entropy -----------------------------------------------------------------------------------------------

def cross_entropy_(logits, targets, losses, share, counted, n_tokens, gradient):
    """
    The loss of each row, and over the logits their gradient.

    logits    (M, V or more), columns from n_tokens on are no tokens; with `gradient` changed to
              share / counted * (softmax - target)
    targets   (M) int64; rows with -1 have loss and gradient 0
    losses    (M) float32 or wider, takes the losses in nats
    share     a number
    counted   0-d tensor, int64
    """
    M, width = logits.shape
    if logits.is_cuda:
        lanes = min(4096, _block(width))
        _launch(_cross_entropy, M, logits, targets, losses, share, counted, n_tokens, width, 2, lanes, gradient,
                num_warps=max(1, min(16, lanes // 128)))
        return
    wide = logits[:, :n_tokens].to(losses.dtype)
    losses.copy_(F.cross_entropy(wide, targets, ignore_index=-1, reduction='none'))
    if gradient:
        d = wide.softmax(1)
        d[torch.arange(M), targets.clamp(min=0)] -= 1
        logits.zero_()[:, :n_tokens] = d * (targets != -1)[:, None] * (share / counted)


# ---- optimiser ---------------------------------------------------------------------------------------------------

def squares(x):
    """Parts whose sum is that of the squares of x, (n), as a tensor; the same bits every time."""
    if not x.is_cuda:
        return x.square().sum()[None]
    parts = torch.empty(4 * PROGRAMS, dtype=torch.float32, device=x.device)
    _launch(_squares, 4 * PROGRAMS, x, parts, x.numel(), 4 * PROGRAMS, 4096, num_warps=8)
    return parts


def plan_(hyper, bad, steps, parts, lr, decay, grad_clip, beta1, beta2):
    """
    What adamw_ needs to know of a step.

    hyper      (6), takes it
    bad        0-d, takes 1 where the gradient is not finite, which leaves the steps as they are, and 0 otherwise
    steps      (how many parameters), all alike, counted up
    parts      of the square of the gradient's norm, as squares gives them
    lr         0-d, the learning rate
    grad_clip  the largest norm, 0 for any
    """
    if hyper.is_cuda:
        logs = [math.log(beta or 1e-300) for beta in (beta1, beta2)] # float32 would be too coarse for a beta near 1
        _launch(_plan, 1, hyper, bad, steps, parts, lr, decay, grad_clip, *logs, len(steps), len(parts),
                _block(len(steps)), _block(len(parts)))
        return
    norm = parts.sum().sqrt()
    good = norm.isfinite()
    steps += good
    t = steps[0].double()
    factor = (grad_clip / (norm + 1e-6)).clamp(max=1) if grad_clip else torch.ones_like(norm)
    hyper.copy_(torch.stack([lr, torch.full_like(lr, decay), factor.double(), 1 - beta1 ** t, 1 - beta2 ** t,
                             good.double()]))
    bad.copy_(~good)


def adamw_(p, half, grad, exp_avg, exp_avg_sq, hyper, beta1, beta2, eps, undecayed):
    """
    A step of AdamW, arXiv:1711.05101, on flat tensors (n) in place; half, bfloat16, takes a copy of p.

    hyper      (6): learning rate, weight decay, a factor of the gradient, 1 - beta1^t, 1 - beta2^t,
               and whether to step at all, 1 or 0
    undecayed  the first so many are not decayed
    """
    if p.is_cuda:
        _launch(_adamw, triton.cdiv(p.numel(), 2048), p, half, grad, exp_avg, exp_avg_sq, hyper, p.numel(), undecayed,
                beta1, beta2, eps, 2048, num_warps=8)
        return
    lr, decay, factor, correction1, correction2, go = hyper.tolist()
    if not go:
        return
    p[undecayed:] *= 1 - lr * decay
    grad = grad * factor
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    p.addcdiv_(exp_avg, exp_avg_sq.sqrt().div_(correction2 ** 0.5).add_(eps), value=-lr / correction1)
    half.copy_(p)


if triton:
    @triton.jit
    def _mixed(bits):
        """32 bits that each depend on all 32: Chris Wellons' lowbias32, https://nullprogram.com/blog/2018/07/31"""
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D
        bits = (bits ^ (bits >> 15)) * 0x846CA68B
        return bits ^ (bits >> 16)

    @triton.jit
    def _kept(seed, offsets, threshold, scale):
        """`scale` or 0 at each offset."""
        seed = tl.load(seed)
        bits = _mixed(offsets.to(tl.uint32) + (seed & 0xFFFFFFFF).to(tl.uint32))
        bits = _mixed(bits + (seed >> 32).to(tl.uint32))
        return tl.where(bits >= threshold.to(tl.uint32), scale, 0.0)

    @triton.jit(do_not_specialize=['seed', 'threshold'])
    def _keep_mask(mask, seed, C, threshold, scale, BLOCK: tl.constexpr):
        c = tl.arange(0, BLOCK)
        at = tl.program_id(0) * C + c
        tl.store(mask + at, _kept(seed, at, threshold, scale), mask=c < C)

    @triton.jit(do_not_specialize=['seed', 'threshold'])
    def _embed(ids, wte, wpe, x, seed, T, C, threshold, scale, BLOCK: tl.constexpr, DROPOUT: tl.constexpr):
        row, c = tl.program_id(0), tl.arange(0, BLOCK)
        token = tl.load(ids + row)
        value = tl.load(wte + token * C + c, mask=c < C) + tl.load(wpe + (row % T) * C + c, mask=c < C)
        at = row * C + c
        if DROPOUT:
            value *= _kept(seed, at, threshold, scale)
        tl.store(x + at, value, mask=c < C)

    @triton.jit(do_not_specialize=['seed', 'threshold'])
    def _embed_backward(dx, ids, dwte, dwpe, seed, B, T, C, threshold, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                        ADD: tl.constexpr, DROPOUT: tl.constexpr):
        place, c = tl.program_id(0), tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, tl.where(place < T, B, 0), ROWS):
            b = first + tl.arange(0, ROWS)[:, None]
            row, inside = b * T + place, (b < B) & (c < C)[None, :]
            at = row * C + c[None, :]
            value = tl.load(dx + at, mask=inside, other=0.0).to(tl.float32)
            if DROPOUT:
                value *= _kept(seed, at, threshold, scale)
            token = tl.load(ids + row, mask=b < B, other=0)
            tl.atomic_add(dwte + token * C + c[None, :], value, mask=inside, sem='relaxed')
            total += tl.sum(value, 0)
        here = dwpe + place * C + c
        if ADD:
            total += tl.load(here, mask=c < C)
        tl.store(here, total, mask=c < C)

    @triton.jit
    def _add_rows(wte, ids, rows, C, BLOCK: tl.constexpr):
        row, c = tl.program_id(0), tl.arange(0, BLOCK)
        token = tl.load(ids + row).to(tl.int64)
        mask = (c < C) & (token >= 0)
        here = wte + token * C + c
        tl.store(here, tl.load(here, mask=mask) + tl.load(rows + row * C + c, mask=mask), mask=mask)

    @triton.jit(do_not_specialize=['seed', 'threshold'])
    def _add_norm(x, branch, weight, bias, seed, after, h, stats, M, C, threshold, scale, eps, tiny, ROWS: tl.constexpr,
                  BLOCK: tl.constexpr, BRANCH: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr):
        c = tl.arange(0, BLOCK)[None, :]
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        at, inside = row * C + c, (row < M) & (c < C)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if BRANCH:
            more = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
            if DROPOUT:
                more *= _kept(seed, at, threshold, scale)
            value += more
            tl.store(after + at, value, mask=inside)
        mean = tl.sum(value, 1, keep_dims=True) / C
        off = tl.where(c < C, value - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(off * off, 1, keep_dims=True) / C + eps)
        w = tl.load(weight + c, mask=c < C, other=1.0)
        out = off * rstd * tl.where(tl.abs(w) < tiny, tiny, w)
        if BIAS:
            out += tl.load(bias + c, mask=c < C)
        tl.store(h + at, out, mask=inside)
        tl.store(stats + row * 2, mean, mask=row < M)
        tl.store(stats + row * 2 + 1, rstd, mask=row < M)

    @triton.jit(do_not_specialize=['seed', 'threshold'])
    def _norm_backward(dh, saved, stats, weight, dx, seed, out, dbranch, dweight, dbias, M, C, threshold, scale, tiny,
                       ROWS: tl.constexpr, BLOCK: tl.constexpr, DX: tl.constexpr, BIAS: tl.constexpr,
                       DROPOUT: tl.constexpr):
        c = tl.arange(0, BLOCK)[None, :]
        w = tl.load(weight + c, mask=c < C, other=1.0)
        back = 1 / tl.where(tl.abs(w) < tiny, tiny, w)
        sum_w = tl.zeros((ROWS, BLOCK), tl.float32)
        sum_b = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in tl.range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS, num_stages=2):
            row = first + tl.arange(0, ROWS)[:, None]
            at, inside = row * C + c, (row < M) & (c < C)
            g = tl.load(dh + at, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(saved + at, mask=inside, other=0.0).to(tl.float32)
            if DX:
                stream = tl.load(dx + at, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(stats + row * 2 + 1, mask=row < M, other=0.0)
            if BIAS:
                mean = tl.load(stats + row * 2, mask=row < M, other=0.0)
                normed = tl.where(inside, (value - mean) * rstd, 0.0)
            else:
                normed = value * back
            sum_w += g * normed
            if BIAS:
                sum_b += g
            g *= w
            through = rstd * (g - tl.sum(g, 1, keep_dims=True) / C
                              - normed * (tl.sum(g * normed, 1, keep_dims=True) / C))
            if DX:
                through += stream
            tl.store(out + at, through, mask=inside)
            if DROPOUT:
                through *= _kept(seed, at, threshold, scale)
            tl.store(dbranch + at, through, mask=inside)
        columns = tl.arange(0, BLOCK)
        part = tl.program_id(0) * C + columns
        tl.store(dweight + part, tl.sum(sum_w, 0), mask=columns < C)
        if BIAS:
            tl.store(dbias + part, tl.sum(sum_b, 0), mask=columns < C)

    @triton.jit
    def _normal(x, TANH: tl.constexpr):
        """GELU is x times the first; its derivative is the first plus x times the second."""
        if TANH:
            inner = 0.7978845608028654 * x * (1 + 0.044715 * x * x)
            below = 1 / (1 + tl.exp(-2 * inner)) # (1 + tanh) / 2
            slope = 2 * below * (1 - below) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
        else:
            below = 0.5 * (1 + tl.erf(0.7071067811865476 * x))
            slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return below, slope

    @triton.jit
    def _gelu(x, y, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
        below, _ = _normal(value, TANH)
        tl.store(y + at, value * below, mask=at < n)

    @triton.jit
    def _gelu_backward(x, dy, again, n, TANH: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
        g = tl.load(dy + at, mask=at < n, other=0.0).to(tl.float32)
        below, slope = _normal(value, TANH)
        tl.store(dy + at, g * (below + value * slope), mask=at < n)
        if AGAIN:
            tl.store(again + at, value * below, mask=at < n)

    @triton.jit
    def _cross_entropy(logits, targets, losses, share, counted, V, width, ROWS: tl.constexpr, LANES: tl.constexpr,
                       GRADIENT: tl.constexpr):
        row = tl.program_id(0)
        logits += row.to(tl.int64) * width
        target = tl.load(targets + row)
        counts = target != -1
        right = tl.load(logits + target, mask=counts, other=0.0).to(tl.float32)
        tile = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        log2e: tl.constexpr = 1.4426950408889634 # powers of two are what the hardware has
        top = tl.full((LANES,), -1e30, tl.float32) # each lane has its own maximum and sum
        total = tl.zeros((LANES,), tl.float32)
        for first in range(0, V, ROWS * LANES): # what is read here is read again below: keep it in L2
            c = first + tile
            l = tl.load(logits + c, mask=c < V, other=-float('inf'), eviction_policy='evict_last').to(tl.float32)
            l *= log2e
            higher = tl.maximum(top, tl.max(l, 0))
            total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(l - higher[None, :]), 0)
            top = higher
        highest = tl.max(top, 0)
        lse = highest + tl.log2(tl.sum(total * tl.exp2(top - highest), 0))
        tl.store(losses + row, tl.where(counts, lse / log2e - right, 0.0))
        if GRADIENT:
            factor = tl.where(counts, share / tl.load(counted).to(tl.float32), 0.0)
            tl.debug_barrier() # the target's logit has been read before it is written over
            for first in range(0, width, ROWS * LANES):
                c = first + tile
                l = tl.load(logits + c, mask=c < V, other=-float('inf'), eviction_policy='evict_first').to(tl.float32)
                d = (tl.exp2(l * log2e - lse) - tl.where(c == target, 1.0, 0.0)) * factor
                tl.store(logits + c, d, mask=c < width, eviction_policy='evict_first')

    @triton.jit
    def _squares(x, parts, n, programs, BLOCK: tl.constexpr):
        total = tl.zeros((BLOCK,), tl.float32)
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, n, programs * BLOCK):
            at = first + tl.arange(0, BLOCK)
            value = tl.load(x + at, mask=at < n, other=0.0)
            total += value * value
        tl.store(parts + tl.program_id(0), tl.sum(total, 0))

    @triton.jit
    def _plan(hyper, bad, steps, parts, lr, decay, grad_clip, log_beta1, log_beta2, n_steps, n_parts,
              STEPS: tl.constexpr, PARTS: tl.constexpr):
        at, i = tl.arange(0, STEPS), tl.arange(0, PARTS)
        norm = tl.sqrt(tl.sum(tl.load(parts + i, mask=i < n_parts, other=0.0), 0))
        good = tl.where(norm < float('inf'), 1.0, 0.0) # a NaN is less than nothing
        t = tl.load(steps + at, mask=at < n_steps, other=0.0) + good
        tl.store(steps + at, t, mask=at < n_steps)
        t = tl.max(t, 0).to(tl.float64)
        tl.store(hyper, tl.load(lr))
        tl.store(hyper + 1, decay)
        tl.store(hyper + 2, tl.where(grad_clip > 0, tl.minimum(grad_clip / (norm + 1e-6), 1.0), 1.0))
        tl.store(hyper + 3, 1 - tl.exp(t * log_beta1))
        tl.store(hyper + 4, 1 - tl.exp(t * log_beta2))
        tl.store(hyper + 5, good)
        tl.store(bad, 1 - good)

    @triton.jit
    def _adamw(p, half, grad, exp_avg, exp_avg_sq, hyper, n, undecayed, beta1, beta2, eps, BLOCK: tl.constexpr):
        if tl.load(hyper + 5) == 0:
            return
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        lr, decay = tl.load(hyper), tl.load(hyper + 1)
        g = tl.load(grad + at, mask=inside) * tl.load(hyper + 2)
        value = tl.load(p + at, mask=inside)
        m = tl.load(exp_avg + at, mask=inside)
        v = tl.load(exp_avg_sq + at, mask=inside)
        value *= tl.where(at < undecayed, 1.0, 1 - lr * decay)
        m += (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        size = lr / tl.load(hyper + 3)
        value -= size * m / (tl.sqrt(v) / tl.sqrt(tl.load(hyper + 4)) + eps)
        tl.store(p + at, value, mask=inside)
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
        tl.store(half + at, value, mask=inside)
