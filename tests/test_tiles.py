"""The tile library, verb by verb, on the device: integers where the answer is exact, so a wrong swizzle or a missing
fence is a wrong number. Without a GPU: everything compiles for sm_90a, without a spill or a serialised wgmma."""
import ctypes
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from conftest import nvcc_or_skip
from ThunderKittens.examples.attn_causal import h100_fwd_setup as setup

HERE = Path(__file__).resolve().parent
KITTENS = HERE.parent / 'ThunderKittens'
# an asm with nothing in it only tells the compiler something
INLINE_PTX = re.compile(r'\b(asm|__asm__)\b(?!\s*(volatile\s*)?\(\s*""\s*:)')


def compile_library(nvcc, source, target):
    said = subprocess.run(
        [str(nvcc), *setup.NVCC_FLAGS, '-Xcompiler', '-fvisibility=default', '-shared', '-cudart', 'static',
         f'-I{HERE / "tiles"}', str(source), '-o', str(target),
         *(f'-L{nvcc.parent.parent / name}' for name in ('lib64', 'lib'))],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert said.returncode == 0, said.stdout
    return said.stdout


@pytest.fixture(scope='module')
def readme_example(tmp_path_factory):
    """The example kernel of ThunderKittens/README.md, as it stands there, with a launcher behind it."""
    blocks = re.findall(r'```cuda\n(.*?)```', (KITTENS / 'README.md').read_text(encoding='utf-8'), re.S)
    assert len(blocks) == 1, "the README has one kernel"
    launcher = '''
#include "harness.cuh"
extern "C" int test_example(void* a, void* b, void* c) {
    return launch(scores, 1, 128, sizeof(example_smem), plain_map(a, 64, 64, 64, 64), plain_map(b, 64, 64, 64, 64),
                  plain_map(c, 64, 64, 16, 64));
}
'''
    path = tmp_path_factory.mktemp('readme') / 'example.cu'
    path.write_text(blocks[0] + launcher, encoding='utf-8')
    return path


@pytest.fixture(scope='module')
def compiled(tmp_path_factory, readme_example):
    """{name: (library path, what the compiler said)} for every file of tests/tiles and the README's example."""
    nvcc, folder = nvcc_or_skip(), tmp_path_factory.mktemp('tiles')
    tiles = [path for path in sorted((HERE / 'tiles').glob('*.cu')) if not path.stem.startswith('sanitize_')]
    sources = [*tiles, readme_example]
    with ThreadPoolExecutor() as pool:
        targets = [folder / f'{source.stem}.so' for source in sources]
        said = list(pool.map(compile_library, [nvcc] * len(sources), sources, targets))
    return {source.stem: (target, text) for source, target, text in zip(sources, targets, said, strict=True)}


@pytest.fixture
def call(compiled):
    """call(file, function, *arguments): tensors go as addresses; the launch must succeed."""
    def run(file, function, *arguments):
        library = ctypes.CDLL(str(compiled[file][0]))
        status = getattr(library, function)(
            *(ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else ctypes.c_int(x) for x in arguments))
        assert status == 0, f"{function}: CUDA error {status}"
    return run


def integers(*shape, low=-4, high=5, dtype=torch.bfloat16):
    return torch.randint(low, high, shape, device='cuda').to(dtype)


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, float('nan'), device='cuda', dtype=dtype)


def test_every_verb_compiles_without_a_spill_or_a_serialised_wgmma(compiled):
    for name, (_, said) in compiled.items():
        assert setup.SPILL.search(said), f"{name}: {said}"
        setup.check_ptxas(name, said)


def test_inline_ptx_stands_in_one_folder():
    sources = [path for path in KITTENS.rglob('*') if path.suffix in ('.cu', '.cuh', '.cpp')]
    with_ptx = [path for path in sources if INLINE_PTX.search(re.sub('//.*', '', path.read_text(encoding='utf-8')))]
    assert {path.name for path in with_ptx if path.parent != KITTENS / 'include' / 'arch'} == set()
    assert with_ptx, "nothing found where the instructions are"


@pytest.mark.gpu
def test_tma_puts_an_element_where_the_tile_says(call):
    x = integers(64, 128, low=-128, high=128)
    out = poisoned(64, 128, dtype=torch.bfloat16)
    call('shared', 'test_read_swizzled', x, out)
    assert torch.equal(out, x)


@pytest.mark.gpu
def test_tma_takes_an_element_from_where_the_tile_says(call):
    x = integers(64, 128, low=-128, high=128)
    out = poisoned(64, 128, dtype=torch.bfloat16)
    call('shared', 'test_write_swizzled', x, out)
    assert torch.equal(out, x)


@pytest.mark.gpu
@pytest.mark.parametrize('rows, start, to', [(64, 0, 0), (1, 0, 0), (63, 0, 3), (70, 8, 1), (70, 64, 0), (40, -24, 0),
                                             (64, 0, 49), (64, 64, 0)])
def test_what_lies_outside_reads_as_zero_and_is_not_written(call, rows, start, to):
    x = integers(rows, 64, low=1, high=9)
    out_rows = 50
    guarded = torch.full((out_rows + 64, 64), 99.0, device='cuda', dtype=torch.bfloat16)
    call('tma', 'test_copy_box', x, rows, guarded, out_rows, start, to)
    box = torch.zeros(64, 64, device='cuda', dtype=torch.bfloat16)
    for i in range(64):
        if 0 <= start + i < rows:
            box[i] = x[start + i]
    want = torch.full_like(guarded, 99.0)
    for i in range(64):
        if 0 <= to + i < out_rows:
            want[to + i] = box[i]
    assert torch.equal(guarded, want)


@pytest.mark.gpu
def test_adding_adds(call):
    x, out = (integers(64, 64, dtype=torch.float32) for _ in range(2))
    want = out + x
    call('tma', 'test_add', x, out)
    assert torch.equal(out, want)


@pytest.mark.gpu
@pytest.mark.parametrize('stages', [1, 2, 3])
def test_a_ring_keeps_its_order_over_many_rounds(call, stages):
    items = 100
    sums = torch.full((128,), -7, device='cuda', dtype=torch.int64)
    call('barrier', 'test_ring', stages, items, sums)
    assert torch.equal(sums, torch.full_like(sums, sum(i * i * (i % 3 + 1) for i in range(items))))


@pytest.mark.gpu
def test_who_waits_at_a_named_barrier_sees_what_was_written_before_it(call):
    out = torch.full((128,), -1, device='cuda', dtype=torch.int32)
    call('barrier', 'test_hand_over', out)
    assert torch.equal(out, 3 * torch.arange(255, 127, -1, device='cuda', dtype=torch.int32))


@pytest.mark.gpu
def test_a_dependent_kernel_begins_early_and_sees_what_the_one_before_it_wrote(call):
    began = torch.zeros(1, device='cuda', dtype=torch.int32)
    met, numbers, out = (torch.full((n,), -1, device='cuda', dtype=torch.int32) for n in (4, 512, 512))
    call('barrier', 'test_dependents', began, met, numbers, out)
    assert met.tolist() == [1] * 4, "the second kernel did not begin while the first ran"
    assert torch.equal(out, 3 * torch.arange(511, -1, -1, device='cuda', dtype=torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize('together', [0, 1], ids=['a-box-for-each', 'a-box-for-both'])
def test_two_blocks_of_a_cluster_fill_each_others_tiles_and_wait_for_one_another(call, together):
    blocks, steps = 4, 24
    x = integers(blocks, steps, 64, 64, low=-128, high=128)
    out = poisoned(blocks, steps, 64, 64, dtype=torch.bfloat16)
    ranks, others = (torch.full((blocks,), -1, device='cuda', dtype=torch.int32) for _ in range(2))
    call('cluster', 'test_share', x, out, ranks, others, blocks, steps, together)
    assert ranks.tolist() == [0, 1, 0, 1]
    assert others.tolist() == [1, 0, 1, 0]
    assert torch.equal(out, x[[0, 0, 2, 2]] if together else x)


@pytest.mark.gpu
def test_fragments_reach_shared_memory_as_they_lie(call):
    x = integers(64, 128, low=-128, high=128, dtype=torch.float32)
    out = poisoned(64, 128, dtype=torch.bfloat16)
    differing = torch.zeros(1, device='cuda', dtype=torch.int32)
    call('warp', 'test_round_trip', x, out, differing)
    assert torch.equal(out.float(), x)
    assert differing.item() == 0, "ldmatrix does not give back what stmatrix wrote"


@pytest.mark.gpu
@pytest.mark.parametrize('first_row', [0, 1, 17, 63, 64, 127, -3])
def test_maps_and_the_maximum_by_row_and_the_masks_at_any_offset(call, first_row):
    x = integers(64, 128, low=-99, high=100, dtype=torch.float32)
    rows, above, below = poisoned(64), poisoned(64, 128), poisoned(64, 128)
    call('warp', 'test_maps', x, rows, above, below, first_row)
    assert torch.equal(rows, x.amax(1))
    row, col = torch.arange(64, device='cuda')[:, None], torch.arange(128, device='cuda')[None, :]
    assert torch.equal(above, x.masked_fill(col > row + first_row, -5.0) * row)
    assert torch.equal(below, x.masked_fill(col < row + first_row, -7.0))


@pytest.mark.gpu
def test_one_warp_multiplies_by_itself(call):
    a, b, out = integers(64, 128), integers(64, 128), poisoned(64, 64)
    call('warp', 'test_products', a, b, out)
    assert torch.equal(out, a.float() @ b.float().T)


@pytest.mark.gpu
def test_powers_logarithms_and_rounding_of_one_thread(call):
    x = torch.linspace(-140, 60, 512, device='cuda')
    exp2, log2, halves = poisoned(512), poisoned(512), poisoned(512, 2)
    call('scalar', 'test_scalars', x, exp2, log2, halves, 512)
    exact = torch.exp2(x.double())
    normal = exact >= 2.0 ** -126
    assert ((exp2.double() - exact).abs() <= 2.0 ** -21 * exact)[normal].all()
    assert (exp2[~normal] == 0).all()
    want = torch.log2(x.double().abs() + 0.5)
    assert ((log2.double() - want).abs() <= 2.0 ** -20 * (1 + want.abs())).all()
    assert torch.equal(halves, torch.stack([x, -3 * x], 1).bfloat16().float())


@pytest.mark.gpu
def test_a_reciprocal_is_off_by_one_ulp_at_most(call):
    x = (1 + torch.rand(1022, device='cuda')) * 2.0 ** torch.randint(-120, 121, (1022,), device='cuda')
    x[::2] *= -1
    x, out = torch.cat([x, torch.tensor([torch.inf, -torch.inf], device='cuda')]), poisoned(1024)
    call('scalar', 'test_reciprocals', x, out, 1024)
    exact = 1 / x.double()
    ulp = 2.0 ** (exact.frexp().exponent.double() - 24)
    assert ((out.double() - exact).abs() <= ulp)[:-2].all()
    assert (out[-2:] == 0).all()


@pytest.mark.gpu
def test_the_smaller_of_two_and_the_sign_of_another_at_the_edges(call):
    edges = torch.tensor([0.0, -0.0, 1.0, -1.0, 16.0, 1e-40, 3e38, -3e38, torch.inf, -torch.inf, torch.nan])
    a, b = torch.cartesian_prod(edges, edges).T.contiguous().cuda()
    smaller, with_sign = torch.full_like(a, 77.0), torch.full_like(a, 77.0)
    call('scalar', 'test_of_two', a, b, smaller, with_sign, len(a))
    torch.testing.assert_close(smaller.cpu(), torch.minimum(a.cpu(), b.cpu()), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(with_sign.abs(), a.abs(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(with_sign.signbit(), a.signbit() ^ b.signbit())


@pytest.mark.gpu
def test_what_is_not_there_is_neither_loaded_nor_stored(call):
    x = integers(128, 4, low=100, high=1000, dtype=torch.int32)
    out = torch.full_like(x, 77)
    call('scalar', 'test_once', x, out)
    t = torch.arange(128, device='cuda', dtype=torch.int32)[:, None]
    own = torch.cat([t, -t, 5 * t, torch.full_like(t, 9)], 1)
    assert torch.equal(out, torch.where(t % 2 == 0, torch.where(t % 3 != 0, x, own), 77))


@pytest.mark.gpu
def test_shared_memory_is_read_by_pairs_and_pieces_and_written_where_an_address_is_given(call):
    x = integers(128, 4, low=-999, high=1000, dtype=torch.float32)
    pairs, pieces, after = poisoned(128, 2), poisoned(128, 4), poisoned(128, 4)
    harmed = torch.zeros(1, device='cuda', dtype=torch.int32)
    call('scalar', 'test_shared_pieces', x, pairs, pieces, after, harmed)
    assert torch.equal(pairs, x.view(256, 2).flip(0)[:128])
    assert torch.equal(pieces, x.flip(0))
    t = torch.arange(128, device='cuda')[:, None].float()
    assert torch.equal(after, torch.where(t % 2 == 0, torch.cat([t, t + 0.5, -t, torch.full_like(t, 7)], 1), x))
    assert harmed.item() == 0, "a store to address 0 took place"


@pytest.mark.gpu
@pytest.mark.parametrize('a_form, b_form', [(0, 0), (0, 1), (1, 1), (2, 0), (2, 1)],
                         ids=['ABt', 'AB', 'AtB', 'registers-ABt', 'registers-AB'])
@pytest.mark.parametrize('N, K', [(64, 64), (64, 128), (128, 64), (128, 128), (192, 64)])
def test_every_form_of_the_product_is_exact_on_integers(call, N, K, a_form, b_form):
    a, b, out = integers(64, K), integers(N, K), poisoned(64, N)
    call('warpgroup', 'test_product', N, K, a_form, b_form, a.T.contiguous() if a_form == 1 else a,
         b.T.contiguous() if b_form == 1 else b, out)
    assert torch.equal(out, 2 * (a.float() @ b.float().T))


@pytest.mark.gpu
@pytest.mark.parametrize('D', [64, 128])
def test_a_product_takes_eight_more_columns_from_the_panel_beside(call, D):
    p, v, beside, out = integers(64, 128), integers(256, D), integers(16 if D == 64 else 256, 64), poisoned(64, D + 8)
    call('warpgroup', 'test_beside', D, p, v if D == 64 else torch.cat([v, beside], 1), beside, out)
    wide = torch.cat([v, beside[torch.arange(256) % len(beside), :8]], 1).float()
    assert torch.equal(out, p.float() @ wide[:128] + p.float() @ wide[128:])


@pytest.mark.gpu
def test_registers_and_shared_memory_give_the_same_bits(call):
    a = torch.randn(64, 128, device='cuda').bfloat16()
    b = torch.randn(128, 128, device='cuda').bfloat16()
    shared, registers = poisoned(64, 128), poisoned(64, 128)
    call('warpgroup', 'test_product', 128, 128, 0, 0, a, b, shared)
    call('warpgroup', 'test_product', 128, 128, 2, 0, a, b, registers)
    assert torch.equal(shared, registers)


@pytest.mark.gpu
def test_a_window_is_a_part_of_its_tile(call):
    a, b, out = integers(128, 64), integers(64, 128), poisoned(64, 64)
    call('warpgroup', 'test_windows', a, b, out)
    assert torch.equal(out, a[64:].float() @ b[:, 64:].float())


@pytest.mark.gpu
def test_the_example_of_the_readme_computes_what_it_says(call):
    a, b, c = integers(64, 64), integers(64, 64), poisoned(64, 64, dtype=torch.bfloat16)
    call('example', 'test_example', a, b, c)
    assert torch.equal(c, (a.float() @ b.float().T).relu().bfloat16())
