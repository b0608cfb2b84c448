"""
Causal attention on an H100, as torch sees it. B batch, T rows (N in the kernels), H heads, D head dim, C = H D.

    from ThunderKittens.examples.attn_causal import causal_attention, causal_attention_qkv, is_available

`why_unavailable()` is '' where the kernel runs, else the reason and what would help. The kernel reads q, k and v where
they lie (views of a packed projection too) and writes (B, T, C); torch.compile sees one opaque operator.
"""
import functools

import torch

from .h100_fwd_setup import HERE, MODULE, load_module, sources_hash

BUILD = 'make kernels, or: cd ThunderKittens/examples/attn_causal && python h100_fwd_setup.py build'


@functools.cache
def _load():
    """(module, '') or (None, why it cannot be loaded). Never raises, never needs a GPU."""
    return load_module(HERE, MODULE, sources_hash(), BUILD)


def why_no_h100():
    """'' where the current device is one, else what it is, in one line."""
    if not torch.cuda.is_available():
        return "no CUDA device: the kernels need an H100 (sm_90)"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"the kernels need an H100 (sm_90), this device is sm_{capability[0]}{capability[1]}"
    return ''


def why_unavailable():
    """'' where causal_attention runs, else the reason in one line: no GPU, another GPU, not built, built for another
    Python, or stale, with the command that builds it."""
    return why_no_h100() or _load()[1]


def why_not_for(head_dim, dropout=0.0):
    """'' where the kernels can do this model's attention, else the reason in one line."""
    if head_dim % 8 or not 8 <= head_dim <= 128:
        return f"it takes head dims that are multiples of 8 up to 128, not {head_dim}"
    return '' if 0 <= dropout < 1 else f"it takes a dropout of at least 0 and below 1, not {dropout}"


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


def _check_dropout(dropout, seed, x):
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if dropout and (seed is None or seed.dtype is not torch.int64 or seed.numel() != 1 or seed.device != x.device):
        raise ValueError(f"dropout needs a seed: one int64 on {x.device}")


def _needs_gradient(*tensors):
    for x in tensors: # any() takes the host three times as long
        if x.requires_grad:
            return torch.is_grad_enabled()
    return False


def _check_no_gradient(*tensors):
    if _needs_gradient(*tensors):
        raise RuntimeError("this operator has no gradient: call causal_attention, or use torch.no_grad()")


def _queue(kernel, device, seed, dropout, *arguments):
    """Run a function of the module on the device's current stream; `arguments` are its own but for the stream."""
    index, address = device.index, seed.data_ptr() if dropout else 0
    if index == torch._C._cuda_getDevice(): # CUDA has begun, there is a tensor
        kernel(*arguments, torch._C._cuda_getCurrentRawStream(index), dropout, address)
    else:
        with torch.cuda.device(index):
            kernel(*arguments, torch._C._cuda_getCurrentRawStream(index), dropout, address)


def _forward(addresses, out, lse, shape, strides, seed, dropout):
    """`addresses` of q, k, v and `strides` of q, k, v, out, (batch, head, row), in elements. lse may be None."""
    _queue(_module().forward, out.device, seed, dropout, *addresses, out.data_ptr(),
           0 if lse is None else lse.data_ptr(), *shape, *strides)


def _fwd(q, k, v, seed, dropout):
    _check_split(q, k, v)
    _check_dropout(dropout, seed, q)
    B, H, T, D = q.shape
    lse = q.new_empty((B, H, T), dtype=torch.float32)
    return _attend(q, k, v, lse, seed, dropout), lse


def _infer(q, k, v):
    _check_split(q, k, v)
    _check_no_gradient(q, k, v)
    return _attend(q, k, v, None, None, 0.0)


def _attend(q, k, v, lse, seed, dropout):
    B, H, T, D = q.shape
    out = q.new_empty(B, T, H, D)
    if out.numel():
        _forward((q.data_ptr(), k.data_ptr(), v.data_ptr()), out, lse, (B, H, T, D),
                 (q.stride()[:3], k.stride()[:3], v.stride()[:3], (T * H * D, D, H * D)), seed, dropout)
    return out


def _fwd_fake(q, k, v, seed, dropout):
    _check_split(q, k, v)
    B, H, T, D = q.shape
    return q.new_empty((B, T, H, D)), q.new_empty((B, H, T), dtype=torch.float32)


def _infer_fake(q, k, v):
    return _fwd_fake(q, k, v, None, 0.0)[0]


def _qkv_fwd(qkv, seed, n_head, dropout):
    _check_packed(qkv, n_head)
    _check_dropout(dropout, seed, qkv)
    lse = qkv.new_empty((qkv.size(0), n_head, qkv.size(1)), dtype=torch.float32)
    return _attend_packed(qkv, n_head, lse, seed, dropout), lse


def _qkv_infer(qkv, n_head):
    _check_packed(qkv, n_head)
    _check_no_gradient(qkv)
    return _attend_packed(qkv, n_head, None, None, 0.0)


def _attend_packed(qkv, n_head, lse, seed, dropout):
    B, T, C3 = qkv.shape
    C = C3 // 3
    D = C // n_head
    out = qkv.new_empty(B, T, C)
    if out.numel():
        address, packed = qkv.data_ptr(), (qkv.stride(0), D, qkv.stride(1))
        _forward((address, address + 2 * C, address + 4 * C), out, lse, (B, n_head, T, D),
                 (packed, packed, packed, (T * C, D, C)), seed, dropout)
    return out


def _qkv_fwd_fake(qkv, seed, n_head, dropout):
    _check_packed(qkv, n_head)
    B, T, C3 = qkv.shape
    return qkv.new_empty((B, T, C3 // 3)), qkv.new_empty((B, n_head, T), dtype=torch.float32)


def _qkv_infer_fake(qkv, n_head):
    return _qkv_fwd_fake(qkv, None, n_head, 0.0)[0]


# From this many rows on one pass is faster than two (NOTES.md); its dq differs in the last bits from run to run.
ONE_PASS_ROWS = {64: 2048, 128: 4096} # by the width of the kernels' tiles


def _backward(addresses, lse, shape, strides, seed, dropout):
    """`addresses` of q, k, v, out, dout, dq, dk, dv, and the `strides` of each, (batch, head, row), in elements."""
    B, H, T, D = shape
    stats = lse.new_empty(_module().stats_floats(B, H, T))
    sums = None
    if T >= ONE_PASS_ROWS[64 if D <= 64 else 128] and not dropout and not torch.are_deterministic_algorithms_enabled():
        sums = lse.new_empty(_module().sums_floats(B, H, T, D))
    _queue(_module().backward, lse.device, seed, dropout, *addresses, lse.data_ptr(), stats.data_ptr(),
           0 if sums is None else sums.data_ptr(), *shape, *strides)


def _readable(x):
    """x, or a copy where the copy engine cannot read it: a last axis with gaps, other strides not multiples of 8."""
    strides = [s for s, size in zip(x.stride()[:-1], x.shape[:-1]) if size > 1]
    readable = x.stride(-1) == 1 and all(s > 0 and s % 8 == 0 for s in strides) and x.data_ptr() % 16 == 0
    return x if readable else x.contiguous()


def _bwd(dout, q, k, v, out, lse, seed, dropout):
    B, H, T, D = q.shape
    grads = [q.new_empty((B, H, T, D)) for _ in range(3)]
    if q.numel():
        dout = _readable(dout)
        rows = [(x.stride(0), x.stride(2), x.stride(1)) for x in (out, dout)] # (B, T, H, D)
        _backward([x.data_ptr() for x in (q, k, v, out, dout, *grads)], lse, (B, H, T, D),
                  [x.stride()[:3] for x in (q, k, v)] + rows + [x.stride()[:3] for x in grads], seed, dropout)
    return tuple(grads)


def _bwd_fake(dout, q, k, v, out, lse, seed, dropout):
    return tuple(q.new_empty(q.shape) for _ in range(3))


def _qkv_bwd(dout, qkv, out, lse, seed, n_head, dropout):
    B, T, C3 = qkv.shape
    C = C3 // 3
    D = C // n_head
    dqkv = qkv.new_empty((B, T, C3))
    if dqkv.numel():
        dout = _readable(dout)
        address, grad = qkv.data_ptr(), dqkv.data_ptr()
        _backward((address, address + 2 * C, address + 4 * C, out.data_ptr(), dout.data_ptr(),
                   grad, grad + 2 * C, grad + 4 * C), lse, (B, n_head, T, D),
                  [(qkv.stride(0), D, qkv.stride(1))] * 3 + [(T * C, D, C), (dout.stride(0), D, dout.stride(1))] +
                  [(T * C3, D, C3)] * 3, seed, dropout)
    return dqkv


def _qkv_bwd_fake(dout, qkv, out, lse, seed, n_head, dropout):
    return qkv.new_empty(qkv.shape)


_library = torch.library.Library('thunderkittens', 'DEF')
_exact = getattr(torch.Tag, 'needs_exact_strides', torch.Tag.needs_fixed_stride_order)
_operators = {
    'attn_causal_fwd(Tensor q, Tensor k, Tensor v, Tensor? seed, float dropout) -> (Tensor, Tensor)':
        (_fwd, _fwd_fake),
    'attn_causal_qkv_fwd(Tensor qkv, Tensor? seed, int n_head, float dropout) -> (Tensor, Tensor)':
        (_qkv_fwd, _qkv_fwd_fake),
    'attn_causal(Tensor q, Tensor k, Tensor v) -> Tensor': (_infer, _infer_fake),
    'attn_causal_qkv(Tensor qkv, int n_head) -> Tensor': (_qkv_infer, _qkv_infer_fake),
    'attn_causal_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? seed, float dropout)'
    ' -> (Tensor, Tensor, Tensor)': (_bwd, _bwd_fake),
    'attn_causal_qkv_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor? seed, int n_head, float dropout)'
    ' -> Tensor': (_qkv_bwd, _qkv_bwd_fake),
}
for _schema, (_real, _fake) in _operators.items():
    _name = _schema.split('(')[0]
    _library.define(_schema, tags=(_exact,))
    for _key in ('CUDA', 'CPU'): # on the CPU it says that it does not run there
        _library.impl(_name, _real, _key)
    torch.library.register_fake(f'thunderkittens::{_name}', _fake, lib=_library)
_fwd_op = torch.ops.thunderkittens.attn_causal_fwd.default
_qkv_fwd_op = torch.ops.thunderkittens.attn_causal_qkv_fwd.default
_infer_op = torch.ops.thunderkittens.attn_causal.default # no dropout, no gradient, a third of the host's time
_qkv_infer_op = torch.ops.thunderkittens.attn_causal_qkv.default
_bwd_op = torch.ops.thunderkittens.attn_causal_bwd.default
_qkv_bwd_op = torch.ops.thunderkittens.attn_causal_qkv_bwd.default


def _save(ctx, inputs, output):
    *tensors, seed, dropout = inputs
    ctx.dropout = dropout
    ctx.save_for_backward(*tensors, *output, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _save_qkv(ctx, inputs, output):
    qkv, seed, ctx.n_head, dropout = inputs
    _save(ctx, (qkv, seed, dropout), output)


def _differentiate(ctx, dout, _):
    grads = (None,) * 3 if dout is None else _bwd_op(dout, *ctx.saved_tensors, ctx.dropout)
    return *grads, None, None


def _differentiate_qkv(ctx, dout, _):
    grad = None if dout is None else _qkv_bwd_op(dout, *ctx.saved_tensors, ctx.n_head, ctx.dropout)
    return grad, None, None, None


torch.library.register_autograd('thunderkittens::attn_causal_fwd', _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd('thunderkittens::attn_causal_qkv_fwd', _differentiate_qkv, setup_context=_save_qkv,
                                lib=_library)


# ---- what models call ------------------------------------------------------------------------------------------------

def _draw_seed(x, dropout):
    """One number from torch's generator, drawn on the device: captured in a CUDA graph it is drawn at each replay, and
    activation checkpointing, which restores the generator, draws it again. None without dropout."""
    return torch.randint(2 ** 62, (1,), dtype=torch.int64, device=x.device) if dropout else None


def causal_attention(q, k, v, dropout=0.0):
    """
    softmax(q k^T / sqrt(D)) v, each row looking only at itself and earlier rows.

    q, k, v   (B, H, T, D) bfloat16 on one sm_90 device, any strides that are multiples of 8 with D contiguous;
              D a multiple of 8 up to 128, T any length
    dropout   probability that a weight is dropped after the softmax, in steps of 2^-16; the others grow accordingly
    returns   (B, H, T, D) bfloat16, a view of a contiguous (B, T, H * D), differentiable in q, k and v
    raises    TypeError for another dtype, ValueError for another shape, device or stride; both name what they got
    accuracy  float32 scores and sums; RMS error at most 1.5x, max error at most 2x that of torch's bfloat16 attention
    repeats   the same bits every time, but for the gradient of q of long sequences (ONE_PASS_ROWS): there it does under
              torch.use_deterministic_algorithms(True)
    source    FlashAttention-2, arXiv:2307.08691; the normaliser sums rounded weights because of arXiv:2510.04212
    """
    if not (dropout or _needs_gradient(q, k, v)):
        return _infer_op(q, k, v).transpose(1, 2)
    return _fwd_op(q, k, v, _draw_seed(q, dropout), dropout)[0].transpose(1, 2)


def causal_attention_qkv(qkv, n_head, dropout=0.0):
    """
    causal_attention of a packed projection: qkv (B, T, 3 * C) bfloat16, q then k then v, each (n_head, D) a row.

    returns   (B, T, C) bfloat16, contiguous, differentiable in qkv
    raises    as causal_attention
    """
    if not (dropout or _needs_gradient(qkv)):
        return _qkv_infer_op(qkv, n_head)
    return _qkv_fwd_op(qkv, _draw_seed(qkv, dropout), n_head, dropout)[0]


def causal_attention_qkv_and_backward(qkv, n_head, dropout=0.0):
    """
    causal_attention_qkv, and a function from its gradient, (B, T, C), to that of qkv, (B, T, 3 * C): for whoever does
    without autograd, whose grad() imports sympy, a third of a second.
    """
    seed = _draw_seed(qkv, dropout)
    y, lse = _qkv_fwd(qkv, seed, n_head, dropout)
    return y, lambda dy: _qkv_bwd(dy, qkv, y, lse, seed, n_head, dropout)
