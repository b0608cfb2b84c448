"""
A linear layer with GELU in the same kernel on an H100, as torch sees it. M rows, K in, N out.

    from ThunderKittens.examples.gemm_gelu import linear_gelu, is_available

`why_unavailable()` is '' where the kernel runs, else the reason and what would help. There is no autograd here: whoever
calls it keeps `pre` and writes the backward. torch.compile sees one opaque operator.
"""
import functools

import torch

from ..attn_causal.h100_fwd_setup import load_module, sources_hash
from .h100_gemm_setup import HERE, MODULE

BUILD = 'make kernels, or: cd ThunderKittens/examples/gemm_gelu && python h100_gemm_setup.py build'


@functools.cache
def _load():
    """(module, '') or (None, why it cannot be loaded). Never raises, never needs a GPU."""
    return load_module(HERE, MODULE, sources_hash(HERE), BUILD)


def why_unavailable():
    """'' where the kernel runs, else the reason in one line: no GPU, another GPU, not built, built for another Python,
    or stale, with the command that builds it."""
    if not torch.cuda.is_available():
        return "no CUDA device: the kernel needs an H100 (sm_90)"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"the kernel needs an H100 (sm_90), this device is sm_{capability[0]}{capability[1]}"
    return _load()[1]


def why_not_for(n_in, n_out):
    """'' where the kernel can do a layer of this size, else the reason in one line."""
    fits = n_in % 8 == 0 and n_out % 8 == 0
    return '' if fits else f"it takes widths that are multiples of 8, not {n_in} and {n_out}"


def is_available():
    """Whether the kernel runs on the current device; why_unavailable() says why not."""
    return why_unavailable() == ''


def _module():
    module, why = _load()
    if module is None:
        raise RuntimeError(why)
    return module


# ---- the operator ----------------------------------------------------------------------------------------------------

def _check(x, w, bias):
    tensors = {'x': x, 'w': w} | ({} if bias is None else {'bias': bias})
    for name, tensor in tensors.items():
        if tensor.dtype is not torch.bfloat16:
            raise TypeError(f"{name} must be torch.bfloat16, got {tensor.dtype}")
    for name, tensor in tensors.items():
        if tensor.device.type != 'cuda' or tensor.device != x.device:
            raise ValueError(f"{name} must be on a CUDA device, all on one, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")
    if w.dim() != 2 or x.dim() < 1 or x.size(-1) != w.size(1):
        raise ValueError(f"x must be (..., K) and w (N, K), got {tuple(x.shape)} and {tuple(w.shape)}")
    if bias is not None and tuple(bias.shape) != (w.size(0),):
        raise ValueError(f"bias must be ({w.size(0)},), got {tuple(bias.shape)}")


def _fwd_fake(x, w, bias, tanh):
    _check(x, w, bias)
    return tuple(x.new_empty((*x.shape[:-1], w.size(0))) for _ in range(2))


def _fwd(x, w, bias, tanh):
    pre, act = _fwd_fake(x, w, bias, tanh)
    if pre.numel():
        N, K = w.shape
        with torch.cuda.device(x.device):
            _module().forward(x.data_ptr(), w.data_ptr(), 0 if bias is None else bias.data_ptr(), pre.data_ptr(),
                              act.data_ptr(), pre.numel() // N, N, K, tanh,
                              torch._C._cuda_getCurrentRawStream(x.device.index))
    return pre, act


_library = torch.library.Library('thunderkittens', 'FRAGMENT')
_exact = getattr(torch.Tag, 'needs_exact_strides', torch.Tag.needs_fixed_stride_order)
_library.define('linear_gelu_fwd(Tensor x, Tensor w, Tensor? bias, bool tanh) -> (Tensor, Tensor)', tags=(_exact,))
for _key in ('CUDA', 'CPU'): # on the CPU it says that it does not run there
    _library.impl('linear_gelu_fwd', _fwd, _key)
torch.library.register_fake('thunderkittens::linear_gelu_fwd', _fwd_fake, lib=_library)
_fwd_op = torch.ops.thunderkittens.linear_gelu_fwd.default


# ---- what models call ------------------------------------------------------------------------------------------------

def linear_gelu(x, w, bias=None, tanh=False):
    """
    pre = x w^T + bias and gelu(pre), in one kernel.

    x, w, bias   (..., K), (N, K), (N) or None: contiguous bfloat16 on one sm_90 device; N and K multiples of 8
    tanh         the tanh form instead of the exact one
    returns      pre, gelu(pre): (..., N) bfloat16; the GELU is of the rounded pre, so a backward from pre agrees
    raises       TypeError for another dtype, ValueError for another shape, device or stride; both name what they got
    accuracy     float32 sums and GELU: RMS error at most 1.5x, max error at most 2x that of torch's bfloat16 path
    """
    return _fwd_op(x, w, bias, tanh)
