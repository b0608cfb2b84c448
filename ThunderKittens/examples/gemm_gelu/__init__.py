"""
A linear layer with GELU in the same kernel on an H100, forward and backward, as torch sees them. M rows, K in, N out.

    from ThunderKittens.examples.gemm_gelu import linear_gelu, linear_gelu_backward, is_available

`why_unavailable()` is '' where the kernels run, else the reason and what would help. There is no autograd here: whoever
calls the forward keeps `pre` and calls the backward.
"""
import functools

import torch

from ..attn_causal import why_no_h100
from ..attn_causal.h100_fwd_setup import load_module, sources_hash
from .h100_gemm_setup import HERE, MODULE

BUILD = 'make kernels, or: cd ThunderKittens/examples/gemm_gelu && python h100_gemm_setup.py build'


@functools.cache
def _load():
    """(module, '') or (None, why it cannot be loaded). Never raises, never needs a GPU."""
    return load_module(HERE, MODULE, sources_hash(HERE), BUILD)


def why_unavailable():
    """'' where the kernels run, else the reason in one line: no GPU, another GPU, not built, built for another Python,
    or stale, with the command that builds them."""
    return why_no_h100() or _load()[1]


def why_not_for(n_in, n_out):
    """'' where the kernels can do a layer of this size, else the reason in one line."""
    fits = n_in % 8 == 0 and n_out % 8 == 0
    return '' if fits else f"it takes widths that are multiples of 8, not {n_in} and {n_out}"


def is_available():
    """Whether the kernels run on the current device; why_unavailable() says why not."""
    return why_unavailable() == ''


def _module():
    module, why = _load()
    if module is None:
        raise RuntimeError(why)
    return module


# ---- the two kernels -------------------------------------------------------------------------------------------------

def linear_gelu(x, w, bias=None, tanh=False):
    """
    pre = x w^T + bias and gelu(pre), in one kernel.

    x, w, bias   (..., K), (N, K), (N) or None: contiguous bfloat16 on one sm_90 device; N and K multiples of 8
    tanh         the tanh form instead of the exact one
    returns      pre, gelu(pre): (..., N) bfloat16; the GELU is of the rounded pre, so a backward from pre agrees
    raises       TypeError for another dtype, ValueError for another shape, device or stride; both name what they got
    accuracy     float32 sums and GELU: RMS error at most 1.5x, max error at most 2x that of torch's bfloat16 path
    """
    _check(x=x, w=w, **({} if bias is None else {'bias': bias}))
    if w.dim() != 2 or x.dim() < 1 or x.size(-1) != w.size(1):
        raise ValueError(f"x must be (..., K) and w (N, K), got {tuple(x.shape)} and {tuple(w.shape)}")
    if bias is not None and tuple(bias.shape) != (w.size(0),):
        raise ValueError(f"bias must be ({w.size(0)},), got {tuple(bias.shape)}")
    pre, act = (x.new_empty((*x.shape[:-1], w.size(0))) for _ in range(2))
    _queue(_module().forward, pre, x, w, bias, pre, act, pre.numel() // max(1, w.size(0)), *w.shape, tanh)
    return pre, act


def linear_gelu_backward(dy, w2, pre, tanh=False, act_too=False):
    """
    The gradient of pre, where y = gelu(pre) w2^T: dpre = (dy w2) gelu'(pre), in one kernel.

    dy, w2, pre  (..., C), (C, N), (..., N): contiguous bfloat16 on one sm_90 device; N and C multiples of 8
    act_too      also gelu(pre) again, for the gradient of w2, where the forward did not keep it
    returns      dpre (..., N) bfloat16, or (dpre, gelu(pre)); the bits of gelu(pre) are the forward's
    raises       as linear_gelu
    accuracy     as linear_gelu; dy w2 is rounded to bfloat16 on the way, as torch does
    """
    _check(dy=dy, w2=w2, pre=pre)
    if w2.dim() != 2 or dy.dim() < 1 or dy.size(-1) != w2.size(0):
        raise ValueError(f"dy must be (..., C) and w2 (C, N), got {tuple(dy.shape)} and {tuple(w2.shape)}")
    if pre.shape != (*dy.shape[:-1], w2.size(1)):
        raise ValueError(f"pre must be {(*dy.shape[:-1], w2.size(1))}, got {tuple(pre.shape)}")
    C, N = w2.shape
    dpre, act = torch.empty_like(pre), torch.empty_like(pre) if act_too else None
    _queue(_module().backward, pre, dy, w2, pre, dpre, act, pre.numel() // max(1, N), N, C, tanh)
    return (dpre, act) if act_too else dpre


def _check(**tensors):
    for name, x in tensors.items():
        if x.dtype is not torch.bfloat16:
            raise TypeError(f"{name} must be torch.bfloat16, got {x.dtype}")
    first = next(iter(tensors.values()))
    for name, x in tensors.items():
        if x.device.type != 'cuda' or x.device != first.device:
            raise ValueError(f"{name} must be on a CUDA device, all on one, got {x.device}")
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tuple(x.stride())}")


def _queue(kernel, out, *arguments):
    """Run a function of the module, whose tensors it takes as addresses, on the current stream of out's device."""
    arguments = [a.data_ptr() if isinstance(a, torch.Tensor) else 0 if a is None else a for a in arguments]
    if out.numel():
        with torch.cuda.device(out.device):
            kernel(*arguments, torch.cuda.current_stream().cuda_stream)
