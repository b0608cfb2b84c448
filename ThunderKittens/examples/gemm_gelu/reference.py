"""A linear layer with GELU behind it as it is defined. Tests and benchmarks hold the kernel to this, in float64; in
bfloat16 it is what torch computes without it."""
import torch.nn.functional as F


def form(tanh):
    """torch's name of the GELU."""
    return 'tanh' if tanh else 'none'


def plain_linear_gelu(x, w, bias=None, tanh=False):
    """pre = x w^T + bias and gelu(pre): x (M, K), w (N, K), bias (N)."""
    pre = F.linear(x, w, bias) # (M, N)
    return pre, F.gelu(pre, approximate=form(tanh))
