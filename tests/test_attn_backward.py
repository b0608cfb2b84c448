"""The backward of causal attention: gradients for every length and layout, dropout by the forward's mask, what torch
does with them.

The tolerance is torch's own: against float64 on the same inputs, the RMS error is at most 1.5x and the largest error at
most 2x that of torch's bfloat16 attention, plus 1e-5 of the values' scale, over at least six (batch, head) pairs.
NaN fails.
"""
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from conftest import nvcc_or_skip
import ThunderKittens.examples.attn_causal as attn
from ThunderKittens.examples.attn_causal import h100_fwd_setup as setup
from ThunderKittens.examples.attn_causal.reference import dropout_mask, philox2x32_7, plain_attention

gpu = pytest.mark.gpu
head_dims = pytest.mark.parametrize('D', [64, 128])
passes = pytest.mark.parametrize('passes', ['one pass', 'two passes'])


@pytest.fixture
def needs_kernel():
    if attn.why_unavailable():
        pytest.skip(attn.why_unavailable())


def device_test(function):
    return gpu(pytest.mark.usefixtures('needs_kernel')(function))


@pytest.fixture
def take(monkeypatch):
    """take('one pass') or take('two passes'): which of the two the operators run, at any length."""
    return lambda which: monkeypatch.setattr(attn, 'ONE_PASS_ROWS',
                                             dict.fromkeys((64, 128), 1 if which == 'one pass' else 2 ** 31))


# ---- without a GPU ---------------------------------------------------------------------------------------------------

def test_the_backward_compiles_for_an_h100_without_spills_or_serialised_products(tmp_path):
    source = setup.HERE / 'h100_bwd.cu'
    said = setup.compile_kernel(nvcc_or_skip(), source, tmp_path / 'h100_bwd.o') # ends the build on either
    assert len(said.splitlines()) >= 8, "two kernels, two head dims, with and without dropout"


def registers_written(instruction):
    """The numbers of the registers that a machine instruction writes, as far as loops of these kernels have them."""
    found = re.match(r'(?:@!?U?P\d+ )?([A-Z0-9_.]+) (?:P\d+, )?R(\d+)\b', instruction)
    if not found or re.match(r'ST|RED|HGMMA|SYNCS|ISETP|FSETP|R2UR|UTMA', found[1]):
        return set()
    many = 4 if re.search(r'M88\.4|\.128', found[1]) else 2 if re.search(r'\.64|CS2R|WIDE', found[1]) else 1
    return set(range(int(found[2]), int(found[2]) + many))


def test_fragments_that_stay_in_registers_are_written_only_where_they_are_loaded(tmp_path):
    nvcc = nvcc_or_skip()
    setup.run([nvcc, *setup.NVCC_FLAGS, '-c', setup.HERE / 'h100_bwd.cu', '-o', tmp_path / 'h100_bwd.o'])
    code = setup.machine_code(nvcc, tmp_path / 'h100_bwd.o')
    if code is None:
        pytest.skip("no cuobjdump with nvdisasm")
    checked = 0
    for kernel in re.split(r'\n\s+Function : ', code)[1:]:
        instructions = re.findall(r'/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;', kernel)
        first = {int(m[1]) for m in (re.match(r'HGMMA\S+ R\d+, R(\d+), gdesc\[UR\d+\],', i) for i in instructions) if m}
        fragments = {r + k for r in first for k in range(4)} # A from registers, B not transposed: q, dout or v
        if fragments:
            checked += 1
            spoilt = [i for i in instructions if registers_written(i) & fragments and 'LDSM' not in i]
            assert not spoilt, f"{kernel.splitlines()[0]}: ptxas gave a fragment's register away: {spoilt[:3]}"
    assert checked == 3, "dq, dk and dv, and one pass at head dim 64"


def test_the_random_numbers_are_the_published_ones():
    for word, want in ((0, (0x257a3673, 0xcd26be2a)), (0xffffffff, (0xab302c4d, 0x3dc9d239))): # Random123, kat_vectors
        x0, x1 = philox2x32_7(torch.tensor([word]), torch.tensor([word]), word)
        assert (x0.item(), x1.item()) == want


def test_the_mask_drops_as_many_as_it_should_and_no_row_column_head_or_seed_is_like_another():
    kept, scale = dropout_mask(7, 2, 3, 256, 0.2)
    dropped = 1 - 1 / scale
    assert dropped == 13107 / 65536
    flat = (~kept).double().view(6, -1)
    sigma = math.sqrt(dropped * (1 - dropped))
    assert (flat.mean(1) - dropped).abs().max() < 5 * sigma / 256
    assert ((~kept).double().mean(-1) - dropped).abs().max() < 5.5 * sigma / 16
    assert ((~kept).double().mean(-2) - dropped).abs().max() < 5.5 * sigma / 16
    others = torch.cat([flat, (~dropout_mask(8, 2, 3, 256, 0.2)[0]).double().view(6, -1)])
    correlation = torch.corrcoef(others).fill_diagonal_(0).abs().max()
    assert correlation < 6 / 256
    for shift in [(0, 1), (1, 0), (0, 8), (8, 0), (8, 8), (16, 0), (0, 16)]:
        moved = (~kept).double().roll(shift, (-2, -1)).view(6, -1)
        assert ((flat * moved).mean(1) - dropped ** 2).abs().max() < 6 * sigma / 256, shift


@pytest.fixture
def seeds(monkeypatch):
    """The operators with kernels that only note their seed, on the CPU: [('f' or 'b', seed), ...]."""
    noted = []
    monkeypatch.setattr(attn, '_check', lambda name, x: None)
    for kernel, name in (('_forward', 'f'), ('_backward', 'b')):
        monkeypatch.setattr(attn, kernel, lambda *arguments, name=name: # the last two: seed, dropout
                            noted.append((name, arguments[-2] if arguments[-2] is None else arguments[-2].item())))
    return noted


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('checkpointed', [False, True])
def test_the_backward_gets_the_seed_of_its_forward(checkpointed, compiled, seeds):
    x = torch.zeros(2, 65, 3 * 192, dtype=torch.bfloat16, requires_grad=True)
    def attention(x):
        return attn.causal_attention_qkv(x * 2, 3, 0.2).float()
    def loss(x):
        return (checkpoint(attention, x, use_reentrant=False) if checkpointed else attention(x)).sum()
    step = torch.compile(loss, fullgraph=True, backend='aot_eager') if compiled else loss
    for _ in range(3):
        step(x).backward()
    forwards = 2 if checkpointed else 1
    assert [name for name, _ in seeds] == (['f'] * forwards + ['b']) * 3
    drawn = [{seed for _, seed in seeds[i:i + forwards + 1]} for i in range(0, len(seeds), forwards + 1)]
    assert all(len(of_step) == 1 for of_step in drawn) and len(set.union(*drawn)) == 3


def test_no_seed_is_drawn_without_dropout(seeds):
    x = torch.zeros(1, 8, 3 * 64, dtype=torch.bfloat16, requires_grad=True)
    before = torch.get_rng_state()
    attn.causal_attention_qkv(x, 1).sum().backward()
    assert seeds == [('f', None), ('b', None)] and torch.equal(torch.get_rng_state(), before)


# ---- gradients -------------------------------------------------------------------------------------------------------

def inputs(B, H, T, D, scale=1.0, seed=0):
    """q, k, v as views of one packed (B, T, 3, H, D), and the gradient of the output."""
    random = torch.Generator('cuda').manual_seed(seed)
    qkv = torch.randn(B, T, 3, H, D, device='cuda', generator=random).bfloat16()
    qkv[:, :, :2] *= scale
    dout = torch.randn(B, T, H, D, device='cuda', generator=random).bfloat16().transpose(1, 2)
    return *qkv.permute(2, 0, 3, 1, 4), dout


def gradients(attention, q, k, v, dout, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return torch.autograd.grad(out, leaves, dout.to(dtype))


def sdpa(q, k, v):
    if q.size(-1) % 8:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def check(got, exact, of_torch, scale=1.0, what=''):
    for name, y, x, t in zip(('dq', 'dk', 'dv'), got, exact, of_torch):
        error, allowed, rest = y.double() - x, t.double() - x, 1e-5 * max(scale, x.abs().max().item())
        rms, rms_allowed = error.square().mean().sqrt().item(), 1.5 * allowed.square().mean().sqrt().item() + rest
        top, top_allowed = error.abs().max().item(), 2 * allowed.abs().max().item() + rest
        assert rms <= rms_allowed, f"{what} {name}: RMS error {rms:.2e}, allowed {rms_allowed:.2e}"
        assert top <= top_allowed, f"{what} {name}: largest error {top:.2e}, allowed {top_allowed:.2e}"


def compare(q, k, v, dout, scale=1.0, what=''):
    exact = gradients(lambda *x: plain_attention(*x)[0], q, k, v, dout, torch.float64)
    check(gradients(attn.causal_attention, q, k, v, dout, torch.bfloat16), exact,
          gradients(sdpa, q, k, v, dout, torch.bfloat16), scale, what)


@device_test
@passes
@head_dims
def test_every_length_up_to_two_tiles(D, passes, take):
    take(passes)
    for T in range(1, 130):
        compare(*inputs(4, 12 if T < 32 else 3, T, D), what=f'T={T}')


@device_test
@passes
@head_dims
@pytest.mark.parametrize('T', [191, 193, 255, 256, 257, 383, 385, 1000, 1023, 1024, 1025, 2047, 2049, 4097])
def test_tile_edges_and_long_sequences(T, D, passes, take):
    take(passes)
    compare(*inputs(2, 3, T, D))


@device_test
@pytest.mark.parametrize('D', [8, 24, 40, 48, 80, 96, 120])
def test_other_head_dims(D):
    compare(*inputs(2, 3, 150, D))


@device_test
@passes
@head_dims
@pytest.mark.parametrize('scale', [1e-4, 4.0, 30.0])
def test_small_and_large_scores(scale, D, passes, take):
    take(passes)
    compare(*inputs(2, 6, 500, D, scale), scale=scale)


@device_test
@head_dims
def test_scores_that_tie_for_the_maximum(D):
    q, k, v, dout = (x.clone() for x in inputs(2, 3, 300, D))
    k[:, :, 1::2] = k[:, :, 0::2]
    compare(q, k, v.abs(), dout)
    compare(q, torch.zeros_like(k), v, dout)


@device_test
@passes
def test_scores_a_hundred_thousand_apart_leave_finite_gradients(passes, take):
    take(passes)
    q, k, v, dout = inputs(2, 3, 500, 64, 300.0)
    assert all(torch.isfinite(x).all() for x in gradients(attn.causal_attention, q, k, v, dout, torch.bfloat16))


@device_test
@head_dims
def test_packed_and_separate_inputs_have_the_same_gradient(D):
    B, H, T = 2, 3, 333
    q, k, v, dout = inputs(B, H, T, D)
    qkv = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2).flatten(2).requires_grad_()
    packed, = torch.autograd.grad(attn.causal_attention_qkv(qkv, H), qkv, dout.transpose(1, 2).flatten(2))
    separate = gradients(attn.causal_attention, *(x.contiguous() for x in (q, k, v)), dout, torch.bfloat16)
    for x, y in zip(packed.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4), separate):
        assert torch.equal(x, y)
    assert packed.stride() == (T * 3 * H * D, 3 * H * D, 1)


@device_test
@passes
@head_dims
def test_every_element_is_written_and_nothing_beside_it(D, passes):
    B, H, T = 2, 3, 201
    q, k, v, dout = inputs(B, H, T, D)
    wide = torch.full((5, B, T + 70, H, D), float('nan'), device='cuda', dtype=torch.bfloat16)
    out, lse = torch.ops.thunderkittens.attn_causal_fwd(q, k, v, None, 0.0)
    for i, x in enumerate((q, k, v, out.transpose(1, 2), dout)):
        wide[i, :, :T] = x.transpose(1, 2)
    read = [x.transpose(1, 2) for x in wide[:, :, :T]]
    grads = torch.full((3, B, T + 70, H, D), float('nan'), device='cuda', dtype=torch.bfloat16)
    written = [x.transpose(1, 2) for x in grads[:, :, :T]]
    module = attn._module()
    stats = torch.full((module.stats_floats(B, H, T),), float('nan'), device='cuda')
    one = passes == 'one pass'
    sums = torch.full((module.sums_floats(B, H, T, D),), float('nan'), device='cuda') if one else None
    module.backward(*(x.data_ptr() for x in (*read, *written)), lse.data_ptr(), stats.data_ptr(),
                    sums.data_ptr() if one else 0, B, H, T, D, *(x.stride()[:3] for x in (*read, *written)),
                    torch.cuda.current_stream().cuda_stream)
    assert torch.isnan(grads[:, :, T:]).all()
    exact = gradients(lambda *x: plain_attention(*x)[0], q, k, v, dout, torch.float64)
    check(written, exact, gradients(sdpa, q, k, v, dout, torch.bfloat16))


@device_test
def test_nan_stays_in_its_batch_and_head():
    q, k, v, dout = (x.clone() for x in inputs(2, 3, 300, 64))
    clean = gradients(attn.causal_attention, q, k, v, dout, torch.bfloat16)
    k[1, 2, 17] = float('nan')
    for x, y in zip(gradients(attn.causal_attention, q, k, v, dout, torch.bfloat16), clean):
        assert torch.isnan(x[1, 2]).any()
        assert torch.equal(x[0], y[0]) and torch.equal(x[1, :2], y[1, :2])


@device_test
@head_dims
def test_a_thousand_runs_in_two_passes_give_the_same_bits(D, take):
    take('two passes')
    q, k, v, dout = inputs(3, 5, 777, D)
    first = gradients(attn.causal_attention, q, k, v, dout, torch.bfloat16)
    differing = torch.zeros((), device='cuda')
    for _ in range(1000):
        for x, y in zip(gradients(attn.causal_attention, q, k, v, dout, torch.bfloat16), first):
            differing += (x != y).any()
    assert differing.item() == 0


@device_test
@head_dims
def test_one_pass_differs_between_runs_by_less_than_its_rounding_and_not_at_all_when_asked(D):
    q, k, v, dout = inputs(2, 6, attn.ONE_PASS_ROWS[D], D)
    first = gradients(attn.causal_attention, q, k, v, dout, torch.bfloat16)
    for _ in range(20):
        again = gradients(attn.causal_attention, q, k, v, dout, torch.bfloat16)
        assert torch.equal(first[1], again[1]) and torch.equal(first[2], again[2])
        spread = (first[0].float() - again[0].float()).square().mean().sqrt() / first[0].float().square().mean().sqrt()
        assert spread < 2 ** -10 # bf16 rounds by 2^-9.8 (RMS)
    torch.use_deterministic_algorithms(True)
    try:
        first = gradients(attn.causal_attention, q, k, v, dout, torch.bfloat16)
        for _ in range(20):
            again = gradients(attn.causal_attention, q, k, v, dout, torch.bfloat16)
            assert all(torch.equal(x, y) for x, y in zip(first, again))
    finally:
        torch.use_deterministic_algorithms(False)


@device_test
def test_gradients_beyond_two_to_the_31_elements():
    B, T, H, D = 60, 16384, 12, 64
    qkv = torch.empty(B, T, 3 * H * D, device='cuda', dtype=torch.bfloat16)
    for b in range(B):
        qkv[b].normal_()
    dout = torch.randn(1, T, H * D, device='cuda').bfloat16().expand(B, -1, -1)
    got, = torch.autograd.grad(attn.causal_attention_qkv(qkv.requires_grad_(), H), qkv, dout)
    assert got.numel() > 2 ** 31
    last = qkv[-1:].detach().clone().requires_grad_()
    want, = torch.autograd.grad(attn.causal_attention_qkv(last, H), last, dout[:1])
    assert torch.equal(got[-1, :, H * D:], want[0, :, H * D:]), "dk and dv have the same bits"
    assert (got[-1].float() - want[0].float()).abs().max() <= 2 ** -6 * want.float().abs().max()


# ---- dropout ---------------------------------------------------------------------------------------------------------

def with_seed(seed, p):
    number = torch.tensor([seed], device='cuda')
    return lambda q, k, v: torch.ops.thunderkittens.attn_causal_fwd(q, k, v, number, p)[0].transpose(1, 2)


@device_test
@head_dims
@pytest.mark.parametrize('T, p', [(17, 0.2), (64, 0.1), (129, 0.5), (300, 0.2), (1000, 0.9)])
def test_dropout_agrees_with_a_reference_that_applies_the_same_mask(T, p, D):
    B, H, seed = 2, 6, 2 ** 62 - 12345
    q, k, v, dout = inputs(B, H, T, D)
    kept, scale = dropout_mask(seed, B, H, T, p, 'cuda')
    def plain(*x):
        return plain_attention(*x, kept.to(x[0].dtype) * scale)[0]
    exact_out, torch_out = plain(*(x.double() for x in (q, k, v))), plain(q, k, v)
    ours = with_seed(seed, p)
    out = ours(q, k, v)
    rest = 1e-5 * v.abs().max().item()
    assert (out.double() - exact_out).abs().max() <= 2 * (torch_out.double() - exact_out).abs().max() + rest
    check(gradients(ours, q, k, v, dout, torch.bfloat16), gradients(plain, q, k, v, dout, torch.float64),
          gradients(plain, q, k, v, dout, torch.bfloat16), what=f'T={T} p={p}')


@device_test
def test_the_output_with_dropout_is_right_on_average():
    q, k, v, _ = inputs(1, 6, 200, 64)
    mean, n = torch.zeros_like(q, dtype=torch.float64), 400
    square = torch.zeros_like(mean)
    for _ in range(n):
        out = attn.causal_attention(q, k, v, 0.25).double()
        mean += out / n
        square += out.square() / n
    sigma = ((square - mean.square()) / n).sqrt()
    off = (mean - plain_attention(q.double(), k.double(), v.double())[0]) / (sigma + 1e-3)
    assert off.abs().max() < 6 and off.square().mean() < 1.2


@device_test
def test_dropout_follows_torch_s_generator():
    q, k, v, _ = inputs(2, 3, 100, 64)
    torch.manual_seed(3)
    first, second = (attn.causal_attention(q, k, v, 0.2) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(attn.causal_attention(q, k, v, 0.2), first)
    assert torch.equal(attn.causal_attention(q, k, v, 0.0), attn.causal_attention(q, k, v))
    with pytest.raises(ValueError, match='dropout must be at least 0 and below 1, got 1.0'):
        attn.causal_attention(q, k, v, 1.0)


def same_mask_in_both_directions(qkv, out, dout, dqkv):
    """The output is linear in v, so <dout, out> = <dv, v>: only if the backward dropped what the forward dropped."""
    C = out.size(-1)
    left = (dout.double() * out.double()).sum((1, 2))
    right = (dqkv[..., 2 * C:].double() * qkv[..., 2 * C:].double()).sum((1, 2))
    size = (dout.double() * out.double()).square().sum((1, 2)).sqrt()
    return ((left - right).abs() < 0.05 * size).all().item()


# ---- what torch does with it -----------------------------------------------------------------------------------------

@device_test
@pytest.mark.parametrize('p', [0.0, 0.2])
def test_the_operators_and_their_gradients_pass_opcheck(p):
    seed = torch.tensor([5], device='cuda') if p else None
    q, k, v, dout = inputs(2, 3, 65, 64)
    split = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    qkv = torch.randn(2, 65, 3 * 192, device='cuda').bfloat16().requires_grad_()
    ops = torch.ops.thunderkittens
    torch.library.opcheck(ops.attn_causal_fwd.default, (*split, seed, p))
    torch.library.opcheck(ops.attn_causal_qkv_fwd.default, (qkv, seed, 3, p))
    q, k, v = (x.detach() for x in split)
    out, lse = ops.attn_causal_fwd(q, k, v, seed, p)
    torch.library.opcheck(ops.attn_causal_bwd.default, (dout.transpose(1, 2), q, k, v, out, lse, seed, p))
    out, lse = ops.attn_causal_qkv_fwd(qkv.detach(), seed, 3, p)
    torch.library.opcheck(ops.attn_causal_qkv_bwd.default, (torch.randn_like(out), qkv.detach(), out, lse, seed, 3, p))


@device_test
def test_gradients_through_compile_equal_the_eager_ones():
    qkv = torch.randn(2, 300, 3 * 192, device='cuda').bfloat16().requires_grad_()
    def loss(x):
        return (attn.causal_attention_qkv(x * 2, 3).float() ** 2).sum()
    compiled = torch.compile(loss, fullgraph=True)
    want, = torch.autograd.grad(loss(qkv), qkv)
    got, = torch.autograd.grad(compiled(qkv), qkv)
    assert (got.float() - want.float()).abs().max() <= 2 ** -7 * want.float().abs().max()


@device_test
def test_dropout_through_compile_keeps_one_mask():
    qkv = torch.randn(4, 300, 3 * 192, device='cuda').bfloat16().requires_grad_()
    dout = torch.randn(4, 300, 192, device='cuda').bfloat16()
    compiled = torch.compile(lambda x: attn.causal_attention_qkv(x, 3, 0.3), fullgraph=True)
    outs = []
    for _ in range(3):
        out = compiled(qkv)
        dqkv, = torch.autograd.grad(out, qkv, dout)
        assert same_mask_in_both_directions(qkv, out, dout, dqkv)
        outs.append(out.detach())
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])


@device_test
@pytest.mark.parametrize('p', [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_gradient(p):
    qkv = torch.randn(4, 300, 3 * 192, device='cuda').bfloat16().requires_grad_()
    dout = torch.randn(4, 300, 192, device='cuda').bfloat16()
    found = []
    for how in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        torch.manual_seed(11)
        out = how(lambda x: attn.causal_attention_qkv(x, 3, p), qkv)
        torch.rand(5, device='cuda') # the generator goes on before the backward draws again
        found.append((out, torch.autograd.grad(out, qkv, dout)[0]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@device_test
@pytest.mark.parametrize('p', [0.0, 0.3])
def test_a_graph_replays_forward_and_backward(p):
    qkv = torch.randn(4, 300, 3 * 192, device='cuda').bfloat16().requires_grad_()
    dout = torch.randn(4, 300, 192, device='cuda').bfloat16()
    def both():
        out = attn.causal_attention_qkv(qkv, 3, p)
        return out, torch.autograd.grad(out, qkv, dout)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, dqkv = both()
    last = None
    for _ in range(3):
        with torch.no_grad():
            qkv.normal_()
        graph.replay()
        assert same_mask_in_both_directions(qkv, out, dout, dqkv)
        if p:
            first = out.clone()
            graph.replay()
            assert not torch.equal(out, first), "each replay draws another seed"
        else:
            eager_out, eager = both()
            assert torch.equal(out, eager_out) and torch.equal(dqkv, eager)
        assert last is None or not torch.equal(last, dqkv)
        last = dqkv.clone()


@device_test
def test_a_gradient_of_any_layout_is_taken():
    qkv = torch.randn(2, 77, 3 * 192, device='cuda').bfloat16().requires_grad_()
    ones = torch.ones(2, 77, 192, device='cuda').bfloat16()
    want, = torch.autograd.grad(attn.causal_attention_qkv(qkv, 3), qkv, ones)
    summed, = torch.autograd.grad(attn.causal_attention_qkv(qkv, 3).sum(), qkv)
    assert torch.equal(want, summed)
    turned = torch.ones(2, 192, 77, device='cuda').bfloat16().transpose(1, 2)
    assert torch.equal(want, torch.autograd.grad(attn.causal_attention_qkv(qkv, 3), qkv, turned)[0])


SANITIZER = shutil.which('compute-sanitizer') or '/usr/local/cuda/bin/compute-sanitizer'


@pytest.fixture(scope='module')
def program(tmp_path_factory):
    """The attention backward on small shapes, without Python."""
    target = tmp_path_factory.mktemp('sanitize') / 'backward'
    sources = [setup.HERE / 'h100_fwd.cu', setup.HERE / 'h100_bwd.cu',
               Path(__file__).resolve().parent / 'tiles' / 'sanitize_attn_backward.cu']
    setup.run([setup.find_nvcc(), *setup.ARCH, '-std=c++20', '-O3', '--expt-relaxed-constexpr', '-lineinfo', '-t', '4',
               f'-I{setup.INCLUDE}', f'-I{setup.HERE}', '-cudart', 'static', *sources, '-o', target])
    return target


@device_test
@pytest.mark.parametrize('tool', ['memcheck', 'racecheck', 'synccheck'])
def test_the_sanitizer_finds_nothing(tool, program):
    if not Path(SANITIZER).is_file():
        pytest.skip("no compute-sanitizer")
    checked = subprocess.run([SANITIZER, '--tool', tool, '--error-exitcode', '9', str(program)],
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    assert checked.returncode == 0, checked.stdout[:1500] + checked.stdout[-1500:]
