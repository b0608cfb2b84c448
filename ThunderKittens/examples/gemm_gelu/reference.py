"""A linear layer with GELU behind it, and its backward, as they are defined. Tests and benchmarks hold the kernels to
this, in float64; in bfloat16 it is what torch computes without them."""
import torch
import torch.nn.functional as F


def form(tanh):
    """torch's name of the GELU."""
    return 'tanh' if tanh else 'none'


def plain_linear_gelu(x, w, bias=None, tanh=False):
    """pre = x w^T + bias and gelu(pre): x (M, K), w (N, K), bias (N)."""
    pre = F.linear(x, w, bias) # (M, N)
    return pre, F.gelu(pre, approximate=form(tanh))


def plain_linear_gelu_backward(dy, w2, pre, tanh=False):
    """The gradient of pre, where y = gelu(pre) w2^T and dy is y's: dy (M, C), w2 (C, N), pre (M, N)."""
    return torch.ops.aten.gelu_backward(dy @ w2, pre, approximate=form(tanh)) # (M, N)
