"""The linear layer with GELU on the device: right for every shape and form, nothing beside its outputs touched.

The tolerance is torch's own: against float64 on the same inputs, the RMS error is at most 1.5x and the largest error at
most 2x that of torch's bfloat16 path, plus 1e-5 of the values' scale. NaN fails.
"""
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ThunderKittens.examples.gemm_gelu as gemm
from ThunderKittens.examples.attn_causal import h100_fwd_setup as setup
from ThunderKittens.examples.gemm_gelu.reference import form, plain_linear_gelu, plain_linear_gelu_backward

HERE = Path(__file__).resolve().parent
gpu = pytest.mark.gpu
both_forms = pytest.mark.parametrize('tanh', [False, True], ids=['exact', 'tanh'])


@pytest.fixture
def needs_kernel():
    if gemm.why_unavailable():
        pytest.skip(gemm.why_unavailable())


def device_test(function):
    return gpu(pytest.mark.usefixtures('needs_kernel')(function))


# ---- without a GPU ---------------------------------------------------------------------------------------------------

def gelu_and_slope_in_float32(x):
    """GELU and its slope as gelu.cuh computes them, in numpy; x float32."""
    source = (gemm.HERE / 'gelu.cuh').read_text(encoding='utf-8')
    c = {name: np.float32(value) for name, value in re.findall(r'(\w+) = (-?[\d.e-]+)f[,;]', source)}

    def add_product(a, b, c): # fmaf: rounded once
        return (a.astype(np.float64) * b + c).astype(np.float32)

    def polynomial(*names):
        value = np.full_like(x, c[names[0]])
        for name in names[1:]:
            value = add_product(a, value, c[name])
        return value
    a = np.minimum(np.abs(x), c['FAR'])
    q = np.exp2(add_product(a, polynomial('Q5', 'Q4', 'Q3', 'Q2', 'Q1'), -1))
    e = np.exp2(add_product(a, polynomial('E2', 'E1'), -1))
    above = add_product(-e, add_product(a, polynomial('D4', 'D3', 'D2', 'D1'), 1), 0.5) # of 1/2, where x is positive
    return add_product(-a, q, np.maximum(x, 0)), np.float32(0.5) + above * np.sign(x)


def test_the_kernels_gelu_is_as_near_as_it_says():
    x = torch.arange(-2 ** 15, 2 ** 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()].double()
    exact = F.gelu(x), torch.ops.aten.gelu_backward(torch.ones_like(x), x)
    ours = [torch.from_numpy(y) for y in gelu_and_slope_in_float32(x.float().numpy())]
    for got, want, most in zip(ours, exact, (8e-6, 3.2e-5)):
        off = (got.double() - want).abs()
        assert (off < most).all()
        rounded = (got.bfloat16().double() - want).abs()
        assert (rounded <= 2 ** -8 * want.abs() + 1e-7).all()
    near = x.abs() < 3
    assert ((ours[0].double() - exact[0]).abs() <= 6e-5 * exact[0].abs())[near].all()


def test_the_sizes_that_it_takes_are_said():
    assert gemm.why_not_for(768, 3072) == ''
    assert 'multiples of 8, not 768 and 3076' in gemm.why_not_for(768, 3076)


def test_what_it_cannot_do_is_refused_in_words():
    x, w, dy = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((8, 64), (128, 64), (8, 64)))
    with pytest.raises(TypeError, match='x must be torch.bfloat16, got torch.float32'):
        gemm.linear_gelu(x.float(), w)
    with pytest.raises(TypeError, match='pre must be torch.bfloat16, got torch.float16'):
        gemm.linear_gelu_backward(dy, w.t().contiguous(), torch.zeros(8, 128, dtype=torch.float16))
    with pytest.raises(ValueError, match='x must be on a CUDA device'):
        gemm.linear_gelu(x, w)


# ---- the definition --------------------------------------------------------------------------------------------------

def random(*shape, scale=1.0):
    return (torch.randn(shape, device='cuda') * scale).bfloat16()


def nan_like(shape):
    return torch.full(shape, float('nan'), device='cuda', dtype=torch.bfloat16)


def forward(x, w, bias=None, tanh=False):
    """pre and act of the kernel, into poisoned memory."""
    (M, K), N = x.shape, w.shape[0]
    pre, act = nan_like((M, N)), nan_like((M, N))
    gemm._module().forward(x.data_ptr(), w.data_ptr(), 0 if bias is None else bias.data_ptr(), pre.data_ptr(),
                           act.data_ptr(), M, N, K, tanh, torch.cuda.current_stream().cuda_stream)
    return pre, act


def backward(dy, w2, pre, tanh=False, act_too=False):
    """dpre and act (None unless asked for) of the kernel, into poisoned memory."""
    (M, C), N = dy.shape, w2.shape[1]
    dpre, act = nan_like((M, N)), nan_like((M, N)) if act_too else None
    gemm._module().backward(dy.data_ptr(), w2.data_ptr(), pre.data_ptr(), dpre.data_ptr(),
                            act.data_ptr() if act_too else 0, M, N, C, tanh,
                            torch.cuda.current_stream().cuda_stream)
    return dpre, act


def assert_as_accurate(got, exact, torchs, label):
    error, allowed = (got.double() - exact).abs(), (torchs.double() - exact).abs()
    slack = 1e-5 * exact.abs().max()
    assert error.square().mean().sqrt() <= 1.5 * allowed.square().mean().sqrt() + slack, f"{label}: RMS error"
    assert error.max() <= 2 * allowed.max() + slack, f"{label}: largest error {error.max():.2e}"


def assert_right(M, N, K, tanh=False, bias=False, scale=1.0):
    torch.manual_seed(M + N + K)
    x, w = random(M, K, scale=scale), random(N, K, scale=K ** -0.5)
    b = random(N) if bias else None
    label = f"M={M} N={N} K={K} tanh={tanh} bias={bias}"
    exact = plain_linear_gelu(x.double(), w.double(), None if b is None else b.double(), tanh)
    pre, act = forward(x, w, b, tanh)
    for got, want, torchs, what in zip((pre, act), exact, plain_linear_gelu(x, w, b, tanh), ('pre', 'act')):
        assert_as_accurate(got, want, torchs, f"{what}, {label}")
    dy, w2 = random(M, K), random(K, N, scale=K ** -0.5)
    exact = plain_linear_gelu_backward(dy.double(), w2.double(), pre.double(), tanh)
    dpre, again = backward(dy, w2, pre, tanh, act_too=True)
    assert_as_accurate(dpre, exact, plain_linear_gelu_backward(dy, w2, pre, tanh), f"dpre, {label}")
    assert torch.equal(again, act), f"act from the backward, {label}"
    assert torch.equal(backward(dy, w2, pre, tanh)[0], dpre), f"dpre alone, {label}"


@device_test
def test_odd_numbers_of_rows():
    for M in (*range(1, 20), 63, 64, 65, 127, 129, 255, 257, 385, 1023, 1025):
        assert_right(M, 384, 192, tanh=M % 2 == 0, bias=M % 3 == 0)


@device_test
@both_forms
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('n_embd', [384, 768, 1024, 1280, 1600])
def test_widths_of_gpt2(n_embd, tanh, bias):
    assert_right(1337, 4 * n_embd, n_embd, tanh, bias)


@device_test
def test_widths_around_tile_edges():
    for N in (8, 16, 56, 64, 72, 184, 192, 200, 376, 392):
        for K in (8, 56, 64, 72, 136, 1000):
            assert_right(150, N, K, tanh=N % 16 == 0, bias=K % 16 == 0)


@device_test
def test_many_tiles_a_block():
    assert_right(16385, 3072, 768)


@device_test
@both_forms
def test_inputs_of_any_magnitude(tanh):
    for scale in (1e-4, 10, 1000):
        assert_right(333, 768, 256, tanh, scale=scale)


@device_test
@both_forms
def test_the_gelu_of_every_bfloat16(tanh):
    """A weight of one 1 a row lets every bfloat16 through as it is."""
    x = torch.arange(-2 ** 15, 2 ** 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()].cuda()
    x = x[:x.numel() // 64 * 64].view(-1, 64)
    one = torch.eye(64, device='cuda', dtype=torch.bfloat16)
    pre, act = forward(x, one, tanh=tanh)
    assert torch.equal(pre, x)
    exact = F.gelu(x.double(), approximate=form(tanh))
    assert ((act.double() - exact).abs() <= 2 ** -8 * exact.abs() + 1e-6).all()
    dpre, _ = backward(torch.ones_like(x), one, x, tanh)
    slope = torch.ops.aten.gelu_backward(torch.ones_like(x).double(), x.double(), approximate=form(tanh))
    assert ((dpre.double() - slope).abs() <= 2 ** -8 * slope.abs() + 2e-6).all()


# ---- what is read and written ----------------------------------------------------------------------------------------

@device_test
def test_nan_and_infinity_stay_in_their_row():
    x, w, dy, w2 = random(300, 256), random(520, 256, scale=0.1), random(300, 256), random(256, 520, scale=0.1)
    clean_pre, clean_act = forward(x, w)
    clean, _ = backward(dy, w2, clean_pre)
    others = torch.arange(300, device='cuda') != 200
    for poison in (float('nan'), float('inf'), float('-inf')):
        bad = x.clone()
        bad[200, 77] = poison
        pre, act = forward(bad, w)
        assert torch.equal(pre[others], clean_pre[others]) and torch.equal(act[others], clean_act[others])
        assert not pre[200].isfinite().any()
        assert act[200].isnan().all() if math.isnan(poison) else torch.equal(act[200] > 0, pre[200] > 0)
        bad_dy, bad_pre = dy.clone(), clean_pre.clone()
        bad_dy[200, 77] = bad_pre[200, 3] = poison
        for got in (backward(bad_dy, w2, clean_pre)[0], backward(dy, w2, bad_pre)[0]):
            assert torch.equal(got[others], clean[others])
        assert not backward(bad_dy, w2, clean_pre)[0][200].isfinite().any()
        if math.isnan(poison):
            for tanh in (False, True):
                assert backward(dy, w2, bad_pre, tanh)[0][200, 3].isnan(), "a NaN is not lost"


@device_test
@pytest.mark.parametrize('M', [1, 65, 200])
def test_nothing_beside_the_tensors_is_read_or_written(M):
    def inside(rows, cols, around):
        whole = torch.full((rows + 300, cols), around, device='cuda', dtype=torch.bfloat16)
        return whole, whole[150:150 + rows]
    N, K = 200, 72
    _, x = inside(M, K, float('nan'))
    _, w = inside(N, K, float('nan'))
    _, w2 = inside(K, N, float('nan'))
    _, pre_in = inside(M, N, float('nan'))
    for tensor in (x, w, w2, pre_in):
        tensor.copy_(random(*tensor.shape))
    (pre_all, pre), (act_all, act), (dpre_all, dpre) = (inside(M, N, 7.0) for _ in range(3))
    stream = torch.cuda.current_stream().cuda_stream
    gemm._module().forward(x.data_ptr(), w.data_ptr(), 0, pre.data_ptr(), act.data_ptr(), M, N, K, False, stream)
    want = forward(x.clone(), w.clone())
    assert torch.equal(pre, want[0]) and torch.equal(act, want[1])
    act.fill_(7.0)
    gemm._module().backward(x.data_ptr(), w2.data_ptr(), pre_in.data_ptr(), dpre.data_ptr(), act.data_ptr(), M, N, K,
                            False, stream)
    want = backward(x.clone(), w2.clone(), pre_in.clone(), act_too=True)
    assert torch.equal(dpre, want[0]) and torch.equal(act, want[1])
    for whole, window in ((pre_all, pre), (act_all, act), (dpre_all, dpre)):
        window.fill_(7.0)
        assert (whole == 7).all()


@device_test
def test_what_cannot_be_read_in_place_is_refused():
    x, w = random(8, 64), random(128, 64)
    with pytest.raises(ValueError, match='x must be contiguous, got strides'):
        gemm.linear_gelu(random(8, 128)[:, ::2], w)
    with pytest.raises(ValueError, match='N and K must be multiples of 8, got N 12 and K 64'):
        gemm.linear_gelu(x, random(12, 64))
    with pytest.raises(ValueError, match='x must start at a multiple of 16 bytes'):
        gemm.linear_gelu(random(8 * 64 + 1)[1:].view(8, 64), w)
    with pytest.raises(ValueError, match=r'x must be \(..., K\) and w \(N, K\)'):
        gemm.linear_gelu(x, random(128, 72))
    with pytest.raises(ValueError, match=r'bias must be \(128,\)'):
        gemm.linear_gelu(x, w, random(64))
    with pytest.raises(ValueError, match=r'pre must be \(8, 128\)'):
        gemm.linear_gelu_backward(x, w.t().contiguous(), random(8, 64))


@device_test
def test_more_than_two_to_the_31_elements():
    M, N, K = 2 ** 20 + 77, 2056, 16
    x, w = random(M, K), random(N, K)
    pre, act = gemm.linear_gelu(x, w)
    assert pre.numel() > 2 ** 31
    tail = slice(M - 300, M)
    assert all(torch.equal(a[tail], b) for a, b in zip((pre, act), forward(x[tail].clone(), w)))
    del act
    dpre = gemm.linear_gelu_backward(x, w.t().contiguous(), pre)
    assert torch.equal(dpre[tail], backward(x[tail].clone(), w.t().contiguous(), pre[tail].clone())[0])


@device_test
@pytest.mark.parametrize('K', [8, 64, 136])
def test_many_tiles_of_few_steps(K):
    """The warps that multiply are as far ahead of each other, and of those that finish, as they get."""
    x, w, dy, w2 = random(40000, K), random(3000, K), random(40000, K), random(K, 3000)
    pre, act = forward(x, w)
    dpre, _ = backward(dy, w2, pre)
    for _ in range(20):
        again = forward(x, w)
        assert torch.equal(again[0], pre) and torch.equal(again[1], act)
        assert torch.equal(backward(dy, w2, pre)[0], dpre)
    rows = slice(17000, 17300)
    assert torch.equal(pre[rows], forward(x[rows].clone(), w)[0])


# ---- runs ------------------------------------------------------------------------------------------------------------

@device_test
def test_many_runs_give_the_same_bits():
    x, w, dy, w2 = random(5000, 768), random(3072, 768, scale=0.04), random(5000, 768), random(768, 3072, scale=0.04)
    pre, act = forward(x, w)
    dpre, _ = backward(dy, w2, pre)
    differing = torch.zeros((), device='cuda')
    for _ in range(200):
        pre2, act2 = forward(x, w)
        differing += (pre2 != pre).any() | (act2 != act).any() | (backward(dy, w2, pre)[0] != dpre).any()
    assert differing.item() == 0


@device_test
def test_a_graph_replays_with_new_contents():
    x, w, w2 = random(300, 256), random(512, 256), random(256, 512)
    gemm.linear_gelu_backward(x, w2, gemm.linear_gelu(x, w)[0], act_too=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pre, act = gemm.linear_gelu(x, w)
        dpre = gemm.linear_gelu_backward(x, w2, pre)
    for _ in range(3):
        x.normal_()
        graph.replay()
        want = gemm.linear_gelu(x, w)
        assert torch.equal(pre, want[0]) and torch.equal(act, want[1])
        assert torch.equal(dpre, gemm.linear_gelu_backward(x, w2, want[0]))


@device_test
def test_two_streams_do_not_disturb_each_other():
    w = random(3072, 768)
    inputs = [random(4096, 768) for _ in range(2)]
    want = [gemm.linear_gelu(x, w)[1] for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    got = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(gemm.linear_gelu(inputs[i], w)[1])
    torch.cuda.synchronize()
    assert all(torch.equal(y, want[i]) for i in range(2) for y in got[i])


SANITIZER = shutil.which('compute-sanitizer') or '/usr/local/cuda/bin/compute-sanitizer'


@device_test
@pytest.mark.parametrize('tool', ['memcheck', 'racecheck', 'synccheck'])
def test_the_sanitizer_finds_nothing(tool, tmp_path):
    if not Path(SANITIZER).is_file():
        pytest.skip("no compute-sanitizer")
    program = tmp_path / 'sanitize'
    compiled = subprocess.run(
        [str(setup.find_nvcc()), *setup.ARCH, '-std=c++20', '-O3', '--expt-relaxed-constexpr', '-lineinfo',
         f'-I{setup.INCLUDE}', f'-I{gemm.HERE}', '-cudart', 'static', str(HERE / 'tiles' / 'sanitize_gemm.cu'),
         str(gemm.HERE / 'h100_gemm.cu'), '-o', str(program)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert compiled.returncode == 0, compiled.stdout
    checked = subprocess.run([SANITIZER, '--tool', tool, '--error-exitcode', '9', str(program)],
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    assert checked.returncode == 0, checked.stdout[-3000:]
