"""
Times the forward kernel beside torch's flash and cuDNN attention and FlashAttention-3, after checking it.

    python -m ThunderKittens.examples.attn_causal.bench [--fa3=FOLDER] [--out=FOLDER] [--readme] [--quick]
    python ThunderKittens/examples/attn_causal/bench.py ...

--fa3      where fa3_C.so (or .xz) and libcudart.so.12 lie; without it FA3 is taken where `flash_attn_interface` imports
--out      where attn_causal.json and attn_causal.png go (default: here); --readme also writes the tables of README.md

FLOPs: 4 B H N N D / 2, what a causal forward needs (arXiv:2205.14135); nothing counts what a kernel computes beside.
Flushed: 256 MB are written before each call, so L2 holds nothing of the inputs; the median of all calls. Back to back:
calls queued one behind the other, the mean. Kernels take turns, 50 ms apart and in opposite order from pass to pass; of
the passes the median. The other kernels' benchmarks time with what is here.
"""
import argparse
import ctypes
import functools
import json
import lzma
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[3])) # where it is a script, and not a module
from data.bins import make_folder
from data.curves import write_section
from data.run import commit as this_commit
from ThunderKittens.examples.attn_causal import causal_attention, causal_attention_qkv, why_unavailable
from ThunderKittens.examples.attn_causal.reference import plain_attention

HERE = Path(__file__).resolve().parent
SHAPES = [(64, 12, 1024, 64), (16, 12, 1024, 64), (8, 12, 2048, 64), (4, 12, 4096, 64), (2, 12, 8192, 64),
          (1, 12, 16384, 64), (16, 16, 1024, 128), (8, 16, 2048, 128), (4, 16, 4096, 128), (2, 16, 8192, 128),
          (1, 16, 16384, 128)] # (B, H, N, D)
LENGTHS = (1, 17, 63, 65, 127, 200, 1000, 1023, 1024, 1025) # of B = 16, H = 12, D = 64
OURS = 'ours'


# ---- the kernels -----------------------------------------------------------------------------------------------------

def sdpa(backend):
    def prepare(q, k, v):
        def call():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return call
    return prepare


def ours(q, k, v):
    return lambda: causal_attention(q, k, v)


def fa3_from(folder):
    """FA3's operator out of a folder, or None."""
    if folder:
        ctypes.CDLL(str(Path(folder) / 'libcudart.so.12'), mode=ctypes.RTLD_GLOBAL)
        library = Path(folder) / 'fa3_C.so'
        if not library.is_file():
            library = Path(tempfile.gettempdir()) / 'fa3_C.so'
            with lzma.open(Path(folder) / 'fa3_C.so.xz') as packed, open(library, 'wb') as plain:
                shutil.copyfileobj(packed, plain, 1 << 24)
        torch.ops.load_library(str(library))
    else:
        try:
            import flash_attn_interface # noqa: F401
        except ImportError:
            return None
    operator = torch.ops.flash_attn_3.fwd.default

    def prepare(q, k, v):
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v)) # its own layout, (B, N, H, D)
        return lambda: operator(q, k, v, is_causal=True, num_splits=1)[0].transpose(1, 2)
    return prepare


# ---- time ------------------------------------------------------------------------------------------------------------

def events(n):
    return [torch.cuda.Event(enable_timing=True) for _ in range(n)]


@functools.cache
def flush():
    """Five times L2, to be written between two calls."""
    return torch.empty(256 << 20, dtype=torch.int8, device='cuda')


def flushed_us(call, repeats=20):
    """
    Median of `repeats` calls with a cold L2. A sleep on the device covers the host's time: a call for which the host
    took longer does not count, and the sleep becomes longer.
    """
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    sleep_s, timed = 1.5 * (time.perf_counter() - began) + 60e-6, []
    torch.cuda.synchronize()
    while len(timed) < repeats:
        start, end = events(2)
        flush().zero_()
        began = time.perf_counter()
        torch.cuda._sleep(int(sleep_s * 1.9e9))
        start.record()
        call()
        end.record()
        if time.perf_counter() - began < sleep_s:
            timed.append((start, end))
        else:
            sleep_s *= 1.2
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) * 1e3 for start, end in timed)


def back_to_back_us(call, repeats):
    start, end = events(2)
    for _ in range(5):
        call()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def host_us(call, repeats=300):
    """What a call costs the host while the device has little to do."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    spent = time.perf_counter() - began
    torch.cuda.synchronize()
    return spent / repeats * 1e6


# ---- the measurements ------------------------------------------------------------------------------------------------

def random_qkv(B, H, N, D):
    return [torch.randn(B, H, N, D, device='cuda').bfloat16() for _ in range(3)]


def check(peers):
    """Every kernel computes the same thing: RMS error against float64 near that of rounding to bf16."""
    for D in (64, 128):
        q, k, v = random_qkv(2, 3, 1000, D)
        exact, _ = plain_attention(q.double(), k.double(), v.double())
        for name, prepare in peers.items():
            error = ((prepare(q, k, v)().double() - exact).norm() / exact.norm()).item()
            if not error < 4e-3: # a NaN is not
                sys.exit(f"{name} is wrong at D={D}: relative error {error:.1e}")
            print(f"checked {name:6} D={D}: relative error {error:.1e}")


def measure(prepare, shapes, quick=False):
    """{shape: {name: (us with L2 flushed, us back to back)}} of the calls that prepare(*shape) gives, {name: call}."""
    times = {}
    for turn in range(1 if quick else 4):
        for shape in shapes[1:3] if quick else shapes:
            calls = prepare(*shape)
            for name in list(calls)[::1 if turn % 2 == 0 else -1]:
                time.sleep(0.05) # else the card is still slow from the heat of the one before
                once = flushed_us(calls[name])
                queued = back_to_back_us(calls[name], max(10, min(200, int(15e3 / once))))
                times.setdefault(shape, {}).setdefault(name, []).append((once, queued))
            del calls # and their tensors, before the next are made
    return {shape: {name: tuple(map(statistics.median, zip(*pairs))) for name, pairs in of_shape.items()}
            for shape, of_shape in times.items()}


def measure_lengths(peers):
    """{T: {peer: us with L2 flushed}}"""
    results = {}
    for T in LENGTHS:
        q, k, v = random_qkv(16, 12, T, 64)
        results[T] = {}
        for name, prepare in peers.items():
            try:
                results[T][name] = flushed_us(prepare(q, k, v))
            except RuntimeError as refusal: # torch: no available kernel
                print(f"T={T}: {name} refuses: {str(refusal).splitlines()[0]}")
    return results


def measure_packed():
    """From a packed qkv to (B, T, C) through the operator, and what the call costs the host."""
    qkv = torch.randn(16, 1024, 3 * 768, device='cuda').bfloat16()
    q, k, v = (x.transpose(1, 2) for x in qkv.view(16, 1024, 3, 12, 64).unbind(2))
    short = torch.randn(1, 16, 3 * 768, device='cuda').bfloat16()

    def torch_cudnn():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(16, 1024, 768)
    cases = {OURS: lambda: causal_attention_qkv(qkv, 12), 'cudnn': torch_cudnn}
    results = {name: {'flushed_us': flushed_us(call, 30), '50_calls_us': back_to_back_us(call, 50)}
               for name, call in cases.items()}
    graph = torch.cuda.CUDAGraph() # the kernel alone: no host between two of them
    with torch.cuda.graph(graph):
        for _ in range(50):
            cases[OURS]()
    results[OURS]['kernel_us'] = back_to_back_us(graph.replay, 3) / 50
    results[OURS]['host_us'] = host_us(lambda: causal_attention_qkv(short, 12))
    return results


# ---- what is left of it ----------------------------------------------------------------------------------------------

def tflops(shape, us, of_forward=1):
    B, H, N, D = shape
    return of_forward * 4 * B * H * N * N * D / 2 / us / 1e6


def table(results, where, of_forward=1):
    """The lines of a row for each shape; a call has so many times the FLOPs of the forward's."""
    peers = list(next(iter(results.values())))
    lines = [where, '', f"| D | H | B, N | {' | '.join(peers)} | to the best other |", '|' + '---|' * (len(peers) + 4)]
    for shape, times in results.items():
        B, H, N, D = shape
        rates = {name: [tflops(shape, us, of_forward) for us in pair] for name, pair in times.items()}
        best = map(max, zip(*(pair for name, pair in rates.items() if name in ('flash', 'cudnn', 'fa3'))))
        cells = [f"{flushed:.0f} / {queued:.0f}" for flushed, queued in rates.values()]
        cells.append(' / '.join(f"{mine / other:.2f}" for mine, other in zip(rates[OURS], best)))
        lines.append(f"| {D} | {H} | {B}, {N} | {' | '.join(cells)} |")
    return [*lines, '', 'TFLOP/s, L2 flushed / back to back.', '']


def more_tables(lengths, packed):
    """The lines of what stands below it."""
    lines = ['| T | ' + ' | '.join(str(T) for T in lengths) + ' |', '|' + '---|' * (len(lengths) + 1)]
    for name in dict.fromkeys(name for times in lengths.values() for name in times):
        cells = [f"{times[name]:.1f}" if name in times else '-' for times in lengths.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    mine, theirs = packed[OURS], packed['cudnn']
    return [*lines, '', 'Microseconds at B=16, H=12, D=64, L2 flushed.', '',
            f"Packed (16, 1024, 3 x 768) to (16, 1024, 768) by the operator: {mine['flushed_us']:.1f} us flushed, "
            f"{mine['50_calls_us']:.1f} us a call, 50 back to back ({mine['kernel_us']:.1f} in a graph of 50); "
            f"cuDNN {theirs['flushed_us']:.1f} and {theirs['50_calls_us']:.1f}. "
            f"The host spends {mine['host_us']:.0f} us a call."]


def picture(results, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, D in zip(axes, (64, 128), strict=True):
        rows = {}
        for (B, H, N, d), times in results.items(): # one batch a length: 16384 tokens, as the larger shapes have
            if d == D and B * N == 16384:
                rows[N] = {name: tflops((B, H, N, d), us) for name, (us, _) in times.items()}
        for name in next(iter(rows.values())):
            axis.plot(list(rows), [r[name] for r in rows.values()], marker='o', label=name,
                      linewidth=2.5 if name == OURS else 1.2)
        axis.set(xscale='log', xticks=list(rows), title=f'causal forward, D = {D}', xlabel='T (16384 tokens in all)')
        axis.set_xticklabels([str(N) for N in rows])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel('TFLOP/s, L2 flushed')
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def said(*command):
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=HERE)
    except OSError:
        return ''
    return done.stdout.strip()


def measured_on(commit):
    """Card, versions and commit, in one line."""
    card = f'--id=GPU-{torch.cuda.get_device_properties().uuid}'
    driver, clocks = (said('nvidia-smi', card, f'--query-gpu={what}', '--format=csv,noheader')
                      for what in ('driver_version', 'clocks.sm,clocks.mem'))
    return (f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}, torch {torch.__version__}, "
            f"cuDNN {torch.backends.cudnn.version()}, commit {commit or this_commit()}, clocks {clocks} at the end.")


def read_options(description, **more):
    """The command line: what all these benchmarks take, and `more` with its defaults."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in more.items():
        parser.add_argument(f'--{name}', default=default)
    parser.add_argument('--readme', action='store_true', help='write the table into README.md')
    parser.add_argument('--quick', action='store_true', help='two shapes, one pass')
    parser.add_argument('--commit', default='', help='of the tree, where git is not at hand')
    options = parser.parse_args()
    if 'out' in more:
        make_folder(options.out)
    return options


def main():
    options = read_options('the forward kernel beside torch and FlashAttention-3', fa3='', out=HERE)
    if why_unavailable():
        raise SystemExit(why_unavailable())
    torch.manual_seed(0)
    peers = {'flash': sdpa(SDPBackend.FLASH_ATTENTION), 'cudnn': sdpa(SDPBackend.CUDNN_ATTENTION)}
    fa3 = fa3_from(options.fa3)
    if fa3:
        peers['fa3'] = fa3
    peers[OURS] = ours
    check(peers)

    def calls(*shape):
        qkv = random_qkv(*shape)
        return {name: prepare(*qkv) for name, prepare in peers.items()}
    results = measure(calls, SHAPES, options.quick)
    lengths = measure_lengths({name: peers[name] for name in peers if name != 'fa3'})
    packed = measure_packed()
    where = measured_on(options.commit)
    text = '\n'.join(table(results, where) + more_tables(lengths, packed))
    print(text)
    found = {'where': where, 'shapes': {'B{}_H{}_N{}_D{}'.format(*s): t for s, t in results.items()},
             'lengths_us': lengths, 'packed': packed}
    Path(options.out, 'attn_causal.json').write_text(json.dumps(found, indent=1), encoding='utf-8')
    if not options.quick:
        picture(results, Path(options.out, 'attn_causal.png'))
    if options.readme:
        write_section(HERE / 'README.md', 'bench', text)
    to_best = [times[OURS][0] / min(us for name, (us, _) in times.items() if name != OURS)
               for times in results.values()]
    print(json.dumps({'geometric_mean_of_time_to_best_other': round(statistics.geometric_mean(to_best), 4)}))


if __name__ == '__main__':
    main()
