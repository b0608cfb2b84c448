"""
Causal attention on an H100, as torch sees it. B batch, T rows (N in the kernels), H heads, D head dim, C = H D.

    from ThunderKittens.examples.attn_causal import causal_attention, causal_attention_qkv, is_available

`why_unavailable()` is '' where the kernel runs, else the reason and what would help. The kernel reads q, k and v where
they lie (views of a packed projection too) and writes (B, T, C); torch.compile sees one opaque operator.
"""
import functools
import importlib.machinery
import importlib.util
import sysconfig

import torch

from .h100_fwd_setup import HERE, MODULE, sources_hash

BUILD = 'make kernels, or: cd ThunderKittens/examples/attn_causal && python h100_fwd_setup.py build'


@functools.cache
def _load():
    """(module, '') or (None, why it cannot be loaded). Never raises, never needs a GPU."""
    suffix = sysconfig.get_config_var('EXT_SUFFIX')
    found = sorted(HERE.glob(f'build/lib.*/{MODULE}.*.so'), key=lambda p: p.stat().st_mtime, reverse=True)
    fitting = [path for path in found if path.name == MODULE + suffix]
    if not fitting:
        if found:
            return None, f"the kernels were built for another Python ({found[0].name}, not {suffix}): {BUILD}"
        return None, f"the kernels are not built: {BUILD}"
    loader = importlib.machinery.ExtensionFileLoader(MODULE, str(fitting[0]))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(MODULE, loader))
    loader.exec_module(module)
    if module.sources != sources_hash():
        return None, f"the kernels are older than their sources: {BUILD}"
    return module, ''


def why_unavailable():
    """'' where causal_attention runs, else the reason in one line: no GPU, another GPU, not built, built for another
    Python, or stale, with the command that builds it."""
    if not torch.cuda.is_available():
        return "no CUDA device: the kernels need an H100 (sm_90)"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"the kernels need an H100 (sm_90), this device is sm_{capability[0]}{capability[1]}"
    return _load()[1]


def why_not_for(head_dim, dropout=0.0):
    """'' where the kernels can do this model's attention, else the reason in one line."""
    if head_dim % 8 or not 8 <= head_dim <= 128:
        return f"it takes head dims that are multiples of 8 up to 128, not {head_dim}"
    return f"it has no dropout, and this model's is {dropout}" if dropout else ''


def is_available():
    """Whether causal_attention runs on the current device; why_unavailable() says why not."""
    return why_unavailable() == ''


def _module():
    module, why = _load()
    if module is None:
        raise RuntimeError(why)
    return module


# ---- the operators ---------------------------------------------------------------------------------------------------

def _check(name, x):
    if x.dtype is not torch.bfloat16:
        raise TypeError(f"{name} must be torch.bfloat16, got {x.dtype}")
    if x.device.type != 'cuda':
        raise ValueError(f"{name} must be on a CUDA device, got {x.device}")
    if x.stride(-1) != 1 and x.size(-1) != 1:
        raise ValueError(f"{name}: the last axis must be contiguous, got strides {tuple(x.stride())}")


def _check_split(q, k, v):
    for name, x in (('q', q), ('k', k), ('v', v)):
        _check(name, x)
        if x.dim() != 4 or x.shape != q.shape:
            raise ValueError(f"q, k, v must be (B, H, T, D) alike, got {tuple(q.shape)} and {name} {tuple(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"q, k, v must be on one device, got {q.device} and {name} on {x.device}")


def _check_packed(qkv, n_head):
    _check('qkv', qkv)
    if qkv.dim() != 3 or n_head < 1 or qkv.size(2) % (3 * n_head):
        raise ValueError(f"qkv must be (B, T, 3 * {n_head} heads * D), got {tuple(qkv.shape)}")


def _queue(device, *arguments):
    """Run the module's forward on the device's current stream."""
    index = device.index
    if index == torch.cuda.current_device():
        _module().forward(*arguments, torch._C._cuda_getCurrentRawStream(index))
    else:
        with torch.cuda.device(index):
            _module().forward(*arguments, torch._C._cuda_getCurrentRawStream(index))


def _fwd(q, k, v):
    _check_split(q, k, v)
    B, H, T, D = q.shape
    out = q.new_empty((B, T, H, D))
    lse = q.new_empty((B, H, T), dtype=torch.float32)
    if out.numel():
        _queue(q.device, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(), B, H, T, D,
               q.stride()[:3], k.stride()[:3], v.stride()[:3], (T * H * D, D, H * D))
    return out, lse


def _fwd_fake(q, k, v):
    _check_split(q, k, v)
    B, H, T, D = q.shape
    return q.new_empty((B, T, H, D)), q.new_empty((B, H, T), dtype=torch.float32)


def _qkv_fwd(qkv, n_head):
    _check_packed(qkv, n_head)
    B, T, C3 = qkv.shape
    C = C3 // 3
    D = C // n_head
    out = qkv.new_empty((B, T, C))
    lse = qkv.new_empty((B, n_head, T), dtype=torch.float32)
    if out.numel():
        address, strides = qkv.data_ptr(), (qkv.stride(0), D, qkv.stride(1))
        _queue(qkv.device, address, address + 2 * C, address + 4 * C, out.data_ptr(), lse.data_ptr(), B, n_head, T, D,
               strides, strides, strides, (T * C, D, C))
    return out, lse


def _qkv_fwd_fake(qkv, n_head):
    _check_packed(qkv, n_head)
    B, T, C3 = qkv.shape
    return qkv.new_empty((B, T, C3 // 3)), qkv.new_empty((B, n_head, T), dtype=torch.float32)


def _backward(dout, q, k, v, out, lse, dq, dk, dv, shape, strides):
    """Run the module's backward on the current stream; tensors and addresses, strides (batch, head, row) of each."""
    B, H, T, D = shape
    stats = lse.new_empty(_module().stats_floats(B, H, T))
    with torch.cuda.device(lse.device):
        stream = torch._C._cuda_getCurrentRawStream(lse.device.index)
        _module().backward(q, k, v, out, dout, dq, dk, dv, lse.data_ptr(), stats.data_ptr(), B, H, T, D, *strides,
                           0.0, 0, stream)


def _bwd(dout, q, k, v, out, lse):
    B, H, T, D = q.shape
    grads = q.new_empty((3, B, T, H, D))
    if q.numel():
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        rows = [(x.stride(0), x.stride(2), x.stride(1)) for x in (out, dout, *grads)] # (B, T, H, D) each
        _backward(dout.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse,
                  *(g.data_ptr() for g in grads), q.shape, [x.stride()[:3] for x in (q, k, v)] + rows)
    return tuple(g.transpose(1, 2).contiguous() for g in grads)


def _bwd_fake(dout, q, k, v, out, lse):
    return tuple(q.new_empty(q.shape) for _ in range(3))


def _qkv_bwd(dout, qkv, out, lse, n_head):
    B, T, C3 = qkv.shape
    C = C3 // 3
    D = C // n_head
    dqkv = qkv.new_empty((B, T, C3))
    if dqkv.numel():
        dout = dout.contiguous()
        address, grad = qkv.data_ptr(), dqkv.data_ptr()
        strides = [(qkv.stride(0), D, qkv.stride(1))] * 3 + [(T * C, D, C)] * 2 + [(T * C3, D, C3)] * 3
        _backward(dout.data_ptr(), address, address + 2 * C, address + 4 * C, out.data_ptr(), lse,
                  grad, grad + 2 * C, grad + 4 * C, (B, n_head, T, D), strides)
    return dqkv


def _qkv_bwd_fake(dout, qkv, out, lse, n_head):
    return qkv.new_empty(qkv.shape)


_library = torch.library.Library('thunderkittens', 'DEF')
_exact = getattr(torch.Tag, 'needs_exact_strides', torch.Tag.needs_fixed_stride_order)
_operators = {
    'attn_causal_fwd(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)': (_fwd, _fwd_fake),
    'attn_causal_qkv_fwd(Tensor qkv, int n_head) -> (Tensor, Tensor)': (_qkv_fwd, _qkv_fwd_fake),
    'attn_causal_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor)':
        (_bwd, _bwd_fake),
    'attn_causal_qkv_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int n_head) -> Tensor':
        (_qkv_bwd, _qkv_bwd_fake),
}
for _schema, (_real, _fake) in _operators.items():
    _name = _schema.split('(')[0]
    _library.define(_schema, tags=(_exact,))
    for _key in ('CUDA', 'CPU'): # on the CPU it says that it does not run there
        _library.impl(_name, _real, _key)
    torch.library.register_fake(f'thunderkittens::{_name}', _fake, lib=_library)
_fwd_op = torch.ops.thunderkittens.attn_causal_fwd.default
_qkv_fwd_op = torch.ops.thunderkittens.attn_causal_qkv_fwd.default
_bwd_op = torch.ops.thunderkittens.attn_causal_bwd.default
_qkv_bwd_op = torch.ops.thunderkittens.attn_causal_qkv_bwd.default


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _save_qkv(ctx, inputs, output):
    ctx.n_head = inputs[1]
    _save(ctx, inputs[:1], output)


def _differentiate(ctx, dout, _):
    q, k, v, out, lse = ctx.saved_tensors
    return (None, None, None) if dout is None else _bwd_op(dout, q, k, v, out, lse)


def _differentiate_qkv(ctx, dout, _):
    qkv, out, lse = ctx.saved_tensors
    return None if dout is None else _qkv_bwd_op(dout, qkv, out, lse, ctx.n_head), None


torch.library.register_autograd('thunderkittens::attn_causal_fwd', _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd('thunderkittens::attn_causal_qkv_fwd', _differentiate_qkv, setup_context=_save_qkv,
                                lib=_library)


# ---- what models call ------------------------------------------------------------------------------------------------

def causal_attention(q, k, v):
    """
    softmax(q k^T / sqrt(D)) v, each row looking only at itself and earlier rows.

    q, k, v   (B, H, T, D) bfloat16 on one sm_90 device, any strides that are multiples of 8 with D contiguous;
              D a multiple of 8 up to 128, T any length
    returns   (B, H, T, D) bfloat16, a view of a contiguous (B, T, H * D), differentiable in q, k and v
    raises    TypeError for another dtype, ValueError for another shape, device or stride; both name what they got
    accuracy  float32 scores and sums; RMS error at most 1.5x, max error at most 2x that of torch's bfloat16 attention
    source    FlashAttention-2, arXiv:2307.08691; the normaliser sums rounded weights because of arXiv:2510.04212
    """
    return _fwd_op(q, k, v)[0].transpose(1, 2)


def causal_attention_qkv(qkv, n_head, dropout=0.0):
    """
    causal_attention of a packed projection: qkv (B, T, 3 * C) bfloat16, q then k then v, each (n_head, D) a row.

    returns   (B, T, C) bfloat16, contiguous, differentiable in qkv
    raises    as causal_attention
    """
    if dropout:
        raise ValueError(f"dropout must be 0, got {dropout}")
    return _qkv_fwd_op(qkv, n_head)[0]
