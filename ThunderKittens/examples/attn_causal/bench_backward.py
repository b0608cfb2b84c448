"""
Times the backward kernels beside torch's flash and cuDNN attention and FlashAttention-3, after checking them.

    python -m ThunderKittens.examples.attn_causal.bench_backward [--fa3=FOLDER] [--out=FOLDER] [--readme] [--quick]

Everything a backward does is in the time: delta, clearing, conversion. q, k, v are views of a packed (B, T, 3, H, D),
but FlashAttention-3 gets its own contiguous layout. `one pass` and `two passes` are ours at every length; `ours` is
what the operator takes. FLOPs: 2.5 times the forward's (arXiv:2205.14135). The rest as in bench.py.
"""
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import ThunderKittens.examples.attn_causal as attn
from data.curves import write_section
from ThunderKittens.examples.attn_causal import bench
from ThunderKittens.examples.attn_causal.reference import plain_attention

PACKED = [(64, 12, 1024, 64), (16, 12, 1024, 64)] # GPT-2's own shape


def inputs(B, H, N, D):
    """A packed (B, N, 3, H, D), its q, k, v as (B, H, N, D) views, and the gradient of the output, (B, N, H, D)."""
    qkv = torch.randn(B, N, 3, H, D, device='cuda').bfloat16()
    return qkv, qkv.permute(2, 0, 3, 1, 4), torch.randn(B, N, H, D, device='cuda').bfloat16()


def sdpa(backend):
    def prepare(qkv, views, dout):
        q, k, v = (x.detach().requires_grad_() for x in views)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return lambda: torch.autograd.grad(out, (q, k, v), dout.transpose(1, 2), retain_graph=True)
    return prepare


def ours(rows=None):
    """The operator, with one pass from `rows` rows on (default: as it is)."""
    def prepare(qkv, views, dout):
        B, N, _, H, D = qkv.shape
        packed, dout = qkv.flatten(2), dout.flatten(2)
        out, lse = torch.ops.thunderkittens.attn_causal_qkv_fwd(packed, None, H, 0.0)

        def call():
            usual = attn.ONE_PASS_ROWS
            attn.ONE_PASS_ROWS = usual if rows is None else {64: rows, 128: rows}
            dqkv = torch.ops.thunderkittens.attn_causal_qkv_bwd(dout, packed, out, lse, None, H, 0.0)
            attn.ONE_PASS_ROWS = usual
            return dqkv.view(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
        return call
    return prepare


def fa3_from(folder):
    """FA3's operator out of a folder, or None."""
    if bench.fa3_from(folder) is None:
        return None
    operators = torch.ops.flash_attn_3

    def prepare(qkv, views, dout):
        q, k, v = (x.transpose(1, 2).contiguous() for x in views)
        out, lse = operators.fwd.default(q, k, v, is_causal=True, num_splits=1)[:2]

        def call():
            grads = operators.bwd.default(dout, q, k, v, out, lse, None, None, None, is_causal=True)[:3]
            return [x.transpose(1, 2) for x in grads]
        return call
    return prepare


def check(peers):
    """Every kernel computes the same gradients: relative error against float64 near that of rounding to bf16."""
    for D in (64, 128):
        qkv, views, dout = inputs(2, 3, 1000, D)
        leaves = [x.double().requires_grad_() for x in views]
        exact = torch.autograd.grad(plain_attention(*leaves)[0], leaves, dout.transpose(1, 2).double())
        for name, prepare in peers.items():
            got = prepare(qkv, views, dout)()
            error = max(((y.double() - x).norm() / x.norm()).item() for x, y in zip(exact, got))
            assert error < 5e-3, f"{name} is wrong at D={D}: relative error {error:.1e}" # a NaN fails too
            print(f"checked {name:10} D={D}: relative error {error:.1e}")


def measure_training():
    """Forward and backward as GPT-2 needs them: packed qkv in, packed gradient out; ms."""
    results = {}
    for B, H, N, D in PACKED:
        qkv, _, dout = inputs(B, H, N, D)
        leaf, dout = qkv.flatten(2).requires_grad_(), dout.flatten(2)

        def both(dropout=0.0, leaf=leaf, dout=dout, H=H):
            return torch.autograd.grad(attn.causal_attention_qkv(leaf, H, dropout), leaf, dout)

        def torch_cudnn(leaf=leaf, dout=dout, B=B, H=H, N=N, D=D):
            q, k, v = (x.transpose(1, 2) for x in leaf.view(B, N, 3, H, D).unbind(2))
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return torch.autograd.grad(out.transpose(1, 2).flatten(2), leaf, dout)
        calls = {bench.OURS: both, 'ours, dropout 0.2': lambda both=both: both(0.2), 'cudnn': torch_cudnn}
        results[B] = {name: bench.flushed_us(call) / 1e3 for name, call in calls.items()}
    return results


def main():
    options = bench.read_options('the backward kernels beside torch and FlashAttention-3', fa3='', out=bench.HERE)
    if attn.why_unavailable():
        raise SystemExit(attn.why_unavailable())
    torch.manual_seed(0)
    peers = {'flash': sdpa(SDPBackend.FLASH_ATTENTION), 'cudnn': sdpa(SDPBackend.CUDNN_ATTENTION)}
    fa3 = fa3_from(options.fa3)
    if fa3:
        peers['fa3'] = fa3
    peers |= {'one pass': ours(1), 'two passes': ours(2 ** 31), bench.OURS: ours()}
    check(peers)

    def calls(*shape):
        packed = inputs(*shape)
        return {name: prepare(*packed) for name, prepare in peers.items()}
    results, training = bench.measure(calls, bench.SHAPES, options.quick), measure_training()
    where = bench.measured_on(options.commit)
    lines = bench.table(results, where, of_forward=2.5)
    lines += [f"Packed qkv to packed gradient, forward and backward, B={B}, H=12, D=64, T=1024: " +
              ', '.join(f"{name} {ms:.3f} ms" for name, ms in times.items()) + '.' for B, times in training.items()]
    text = '\n'.join(lines)
    print(text)
    if options.readme:
        write_section(bench.HERE / 'README.md', 'backward', text)
    found = {'where': where, 'shapes': {'B{}_H{}_N{}_D{}'.format(*s): t for s, t in results.items()},
             'training_ms': training}
    Path(options.out, 'attn_causal_backward.json').write_text(json.dumps(found, indent=1), encoding='utf-8')


if __name__ == '__main__':
    main()
