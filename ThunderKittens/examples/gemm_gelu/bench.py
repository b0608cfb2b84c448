"""
Times the linear layer with GELU, forward and backward, beside torch's matrix product and GELU, after checking it.

    python -m ThunderKittens.examples.gemm_gelu.bench [--readme] [--quick]

Peers: torch.mm (cuBLAS) alone; with torch's GELU behind it, eager; with torch.compile's. FLOPs: 2 M N K, nothing for
the GELU. Timed as attn_causal/bench.py says. --readme also writes the table of README.md.
"""
import functools
import json
import statistics

import torch
import torch.nn.functional as F

from data.curves import write_section
from ThunderKittens.examples.attn_causal.bench import measure, measured_on, read_options
from ThunderKittens.examples.gemm_gelu import HERE, linear_gelu, linear_gelu_backward, why_unavailable
from ThunderKittens.examples.gemm_gelu.reference import plain_linear_gelu, plain_linear_gelu_backward

SHAPES = [(12288, 3072, 768), (16384, 3072, 768), (65536, 3072, 768), (16384, 1536, 384), (16384, 4096, 1024),
          (16384, 5120, 1280), (16384, 6400, 1600)] # (M, N, K)


def random(*shape):
    return (torch.randn(shape, device='cuda') * shape[-1] ** -0.5).bfloat16()


def inputs(M, N, K):
    """x and dy (M, K), w (N, K), w2 (K, N), pre (M, N)."""
    return random(M, K) * K ** 0.5, random(M, K), random(N, K), random(K, N), random(M, N) * N ** 0.5


def check():
    """Every output near float64's, as torch's bfloat16 path is."""
    for M, N, K in ((1001, 3072, 768), (333, 1608, 400)):
        x, dy, w, w2, pre = inputs(M, N, K)
        for tanh in (False, True):
            exact = (*plain_linear_gelu(x.double(), w.double(), tanh=tanh),
                     plain_linear_gelu_backward(dy.double(), w2.double(), pre.double(), tanh))
            torchs = *plain_linear_gelu(x, w, tanh=tanh), plain_linear_gelu_backward(dy, w2, pre, tanh)
            ours = *linear_gelu(x, w, tanh=tanh), linear_gelu_backward(dy, w2, pre, tanh)
            for name, a, b, c in zip(('pre', 'act', 'dpre'), exact, torchs, ours):
                allowed, error = (b.double() - a).norm(), (c.double() - a).norm()
                assert error <= 1.5 * allowed, f"{name} is wrong: {error:.1e}, torch's {allowed:.1e}" # a NaN fails too
                print(f"checked {name:4} M={M} tanh={tanh}: error {error / a.norm():.1e}")


def cases(M, N, K):
    """{name: call}; no peer allocates inside its time more than its outputs."""
    x, dy, w, w2, pre = inputs(M, N, K)
    wt = w.t()
    gelu, slope = (torch.compile(f) for f in (F.gelu, torch.ops.aten.gelu_backward))
    return {
        'mm': lambda: torch.mm(x, wt),
        'mm, gelu': lambda: F.gelu(torch.mm(x, wt)),
        'mm, compiled gelu': lambda: gelu(torch.mm(x, wt)),
        'ours': lambda: linear_gelu(x, w),
        'ours, tanh': lambda: linear_gelu(x, w, tanh=True),
        'backward: mm': lambda: torch.mm(dy, w2),
        'backward: mm, gelu': lambda: torch.ops.aten.gelu_backward(torch.mm(dy, w2), pre),
        'backward: mm, compiled gelu': lambda: slope(torch.mm(dy, w2), pre),
        'backward: ours': lambda: linear_gelu_backward(dy, w2, pre),
        'backward: ours, act too': lambda: linear_gelu_backward(dy, w2, pre, act_too=True),
    }


def table(results, where):
    names = list(next(iter(results.values())))
    lines = [where, '', '| M, N, K | ' + ' | '.join(names) + ' |', '|' + '---|' * (len(names) + 1)]
    for (M, N, K), times in results.items():
        cells = [f"{a:.0f} / {b:.0f}" for a, b in times.values()]
        lines.append(f"| {M}, {N}, {K} | {' | '.join(cells)} |")
    lines += ['', "Microseconds, L2 flushed / back to back. The backward's K is torch's C, the width that dy has.", '',
              '| M, N, K | TFLOP/s mm | ours | to mm | to mm, compiled gelu | backward: mm | ours | to mm | '
              'to mm, compiled gelu |', '|' + '---|' * 9]
    for (M, N, K), times in results.items():
        cells = []
        for prefix in ('', 'backward: '):
            mm, both, ours = (times[prefix + name][1] for name in ('mm', 'mm, compiled gelu', 'ours'))
            cells += [f"{2e-6 * M * N * K / mm:.0f}", f"{2e-6 * M * N * K / ours:.0f}", f"{ours / mm:.2f}",
                      f"{ours / both:.2f}"]
        lines.append(f"| {M}, {N}, {K} | {' | '.join(cells)} |")
    return '\n'.join([*lines, '', 'Back to back; "to": time, as a ratio.'])


def main():
    options = read_options('the linear layer with GELU beside torch')
    if why_unavailable():
        raise SystemExit(why_unavailable())
    torch.manual_seed(0)
    check()
    results = measure(functools.cache(cases), SHAPES, options.quick) # cached: every pass finds the compiled peers again
    text = table(results, measured_on(options.commit))
    print(text)
    if options.readme:
        write_section(HERE / 'README.md', 'bench', text)
    ratios = [times[p + 'ours'][1] / times[p + 'mm, compiled gelu'][1] for times in results.values()
              for p in ('', 'backward: ')]
    print(json.dumps({'geometric_mean_of_time_to_mm_and_compiled_gelu': round(statistics.geometric_mean(ratios), 4)}))


if __name__ == '__main__':
    main()
