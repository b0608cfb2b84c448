"""
One new token a row from kept keys and values: all of GPT-2 for one place, in about five kernels a layer.

Every tensor of a step keeps its place and nothing of it waits for the host, so a CUDA graph can replay it. The kernels
are Triton's, which comes with torch: there is nothing to build. model.py holds the plain definition, Block.forward with
a LayerCache, which is what runs on other devices.
"""
import contextlib
import functools
import gc
import importlib.util
import math
import os
import shutil

import torch

FEW_ROWS = 2 # up to so many rows each reads the matrices for itself, through L2; above, a matrix product is faster
PROGRAMS = 192 # work is cut until there are about so many programs, one or two a multiprocessor


@functools.cache
def why_unavailable(device_type='cuda'):
    """'' where the kernels run, else the reason in a few words."""
    if device_type != 'cuda':
        return f"they run on a CUDA device, not on {device_type}"
    if importlib.util.find_spec('triton') is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the kernels need compute capability 8.0"
    return '' if has_c_compiler() else "Triton needs a C compiler"


def has_c_compiler():
    """Whether Triton, also behind torch.compile, can build what launches its kernels."""
    return bool(os.environ.get('CC') or any(map(shutil.which, ('cc', 'gcc', 'clang'))))


def can_replay(device):
    """Whether CUDA graphs can be had there."""
    return device.type == 'cuda'


@contextlib.contextmanager
def capture(graph, **options):
    """torch.cuda.graph, in which no garbage is collected: should another graph be in it, its end breaks the capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, capture_error_mode='thread_local', **options): # threads may copy meanwhile
            yield
    finally:
        if collects:
            gc.enable()


def replayed(step):
    """
    A function that does what step() does, all of whose inputs and outputs are tensors that keep their places: the first
    call is step() itself, the second captures its kernels in a CUDA graph, and from then on the graph is replayed.
    """
    graph, calls = torch.cuda.CUDAGraph(), 0

    def call():
        nonlocal calls
        calls += 1
        if calls == 1:
            return step()
        if calls == 2:
            autocast = torch.autocast('cuda', torch.get_autocast_dtype('cuda'), torch.is_autocast_enabled('cuda'),
                                      cache_enabled=False) # its copies of weights would not outlive it
            with autocast, capture(graph, stream=torch.cuda.Stream()):
                step()
        graph.replay()
    return call


class Step:
    """
    The logits of the token after each row's newest, whose keys and values it keeps.

    model  GPT; matrices are taken in the cache's dtype, copied where they have another
    kv     for each layer (2, B, nh, room, hs): the keys and the values of the places before the newest
    """

    def __init__(self, model, kv):
        cast = lambda x: None if x is None else x.detach().to(kv[0].dtype) # noqa: E731
        linear = lambda m: (cast(m.weight), cast(m.bias)) # noqa: E731
        norm = lambda m: (m.weight.detach(), None if m.bias is None else m.bias.detach()) # noqa: E731
        self.wte, self.wpe = model.transformer.wte.weight.detach(), model.transformer.wpe.weight.detach()
        self.layers = [(norm(block.ln_1), linear(block.attn.c_attn), linear(block.attn.c_proj), norm(block.ln_2),
                        linear(block.mlp.c_fc), linear(block.mlp.c_proj), kept) for block, kept in
                       zip(model.transformer.h, kv)]
        self.ln_f, self.head = norm(model.transformer.ln_f), linear(model.lm_head)
        self.gelu = model.config.gelu

    def __call__(self, text, newest, places):
        """(B, V) logits after the token in column `newest` (1) of text (B, width), which is at places (B); int64."""
        B, C = len(text), self.wte.size(1)
        x = torch.empty(B, C, device=text.device) # the residual stream
        launch('embed', (B,), text, text.size(1), newest, places, self.wte, self.wpe, x, C=C, COLS=power_of_two(C))
        return (self.few_rows if B <= FEW_ROWS else self.many_rows)(x, places)

    def few_rows(self, x, places):
        for ln_1, c_attn, c_proj, ln_2, c_fc, mlp_proj, kv in self.layers:
            y, lse = attend(matvec(x, c_attn, norm=ln_1), kv, places)
            matvec(y, c_proj, lse=lse, add_to=x)
            matvec(matvec(x, c_fc, norm=ln_2, gelu=self.gelu), mlp_proj, add_to=x)
        return matvec(x, self.head, norm=self.ln_f)

    def many_rows(self, x, places):
        y, dtype = None, self.layers[0][-1].dtype
        for ln_1, c_attn, c_proj, ln_2, c_fc, mlp_proj, kv in self.layers:
            qkv = matmul(add_norm(x, y, ln_1, dtype), c_attn, dtype)
            y = matmul(attend(qkv, kv, places)[0], c_proj, parts=True)
            h = matmul(add_norm(x, y, ln_2, dtype), c_fc, dtype, gelu=self.gelu)
            y = matmul(h, mlp_proj, parts=True)
        return matmul(add_norm(x, y, self.ln_f, dtype), self.head)


def launch(kernel, grid, *args, **shape):
    """Launch a kernel; on sm_90 and newer it begins while the one before it still runs."""
    from . import kernels
    pdl = args[0].is_cuda and torch.cuda.get_device_capability() >= (9, 0)
    getattr(kernels, kernel)[grid](*args, **shape, PDL=pdl, **({'launch_pdl': True} if pdl else {}))


def power_of_two(n):
    return 1 << (n - 1).bit_length()


def matvec(x, linear, norm=None, lse=None, gelu=None, add_to=None):
    """
    linear(norm(x)) of a few rows, float32: x (B, K) -> (B, N), or added to `add_to`.

    linear  (weight (N, K), bias or None); norm, likewise, of a LayerNorm before it
    lse     (B, nh, splits) of attend(), whose x is (B, splits, K)
    gelu    'none' or 'tanh' as in nn.GELU, after it
    """
    weight, bias = linear
    N, K = weight.shape
    gain, shift = norm or (None, None)
    out = torch.empty(len(x), N, device=x.device) if add_to is None else add_to
    cols = power_of_two(K)
    rows, warps = (4, 2 if N == K else 4) if cols == 2048 else (max(1, min(8, 16384 // cols)), 8) # gpt2-xl; the others'
    n_head, splits = lse.shape[1:] if lse is not None else (1, 1)
    launch('matvec', (-(-N // rows), len(x)), x, lse, gain, shift, weight, bias, out, N, K=K, HS=K // n_head,
           SPLITS=splits, GELU=gelu, ADD=add_to is not None, ROWS=rows, COLS=cols, num_warps=warps)
    return out


def matmul(x, linear, dtype=torch.float32, gelu=None, parts=False):
    """
    gelu(linear(x)) of many rows: x (B, K) -> (B, N) in `dtype`; or (parts, B, N), whose sum it is, so that a matrix
    of few rows too is read by about as many programs as there are multiprocessors.
    """
    weight, bias = linear
    (B, K), N = x.shape, len(weight)
    rows, cols, block = max(16, min(64, power_of_two(B))), 32, 256 // weight.element_size()
    stages = 4 # of x and the weights in shared memory: 96 KiB, which every GPU from compute capability 8.0 on has
    if N > 16384:
        cols, stages = 64, 3
    grid = -(-N // cols), -(-B // rows)
    splits = max(1, min(4, PROGRAMS // (grid[0] * grid[1]))) if parts else 1
    out = torch.empty(splits, B, N, dtype=dtype, device=x.device)
    part = -(-K // (splits * block)) * block
    launch('matmul', (*grid, splits), x, weight, bias, out, B, N, K=K, SPLITS=splits, GELU=gelu, ROWS=rows, COLS=cols,
           BLOCK=block, LINES=power_of_two(part) * weight.element_size() // 128, num_warps=4, num_stages=stages)
    return out if parts else out[0]


def add_norm(x, y, norm, dtype):
    """LayerNorm(x += y's parts) in `dtype`: x (B, C) float32, y (parts, B, C) float32 or None -> (B, C)."""
    (B, C), out = x.shape, torch.empty_like(x, dtype=dtype)
    launch('add_norm', (B,), x, y, *norm, out, B, C=C, SPLITS=0 if y is None else len(y), COLS=power_of_two(C),
           num_warps=4)
    return out


def attend(qkv, kv, places):
    """
    Each row's newest token over itself and all before it; its key and value are kept at places[row].

    qkv      (B, 3C)
    returns  (B, C) in the cache's dtype and None, or for few rows (B, splits, C) and their (B, nh, splits) log2 of the
             sums of exp2, float32, which matvec() puts together
    source   arXiv:2311.01282 and FlashDecoding: a softmax over runs of keys
    """
    _, B, n_head, room, hs = kv.shape
    splits = min(8, max(1, PROGRAMS // (B * n_head))) if B <= FEW_ROWS else 1
    out = qkv.new_empty(B, splits, n_head * hs, dtype=torch.float32 if splits > 1 else kv.dtype)
    lse = qkv.new_empty(B, n_head, splits, dtype=torch.float32) if splits > 1 else None
    launch('attend', (splits, n_head, B), qkv, *kv, places, out, lse, room, math.log2(math.e) / math.sqrt(hs),
           HEADS=n_head, HS=hs, D=power_of_two(hs), SPLITS=splits, BLOCK=64 if splits > 1 else 32, num_warps=4)
    return (out, lse) if splits > 1 else (out[:, 0], None)


def draw(logits, seeds, temperature, top_k=None):
    """
    The token whose logit / temperature + Gumbel noise is the largest, which falls on it with its probability; among the
    top_k likeliest. logits (B, V), seeds (B) int64, other ones at each place -> (B) int64. The noise is model.pick's.
    """
    chosen = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    _draw(logits, seeds, None, temperature, top_k, chosen, None, 0, None)
    return chosen


def append(logits, seeds, text, newest, places, temperature, top_k=None):
    """
    The same with seeds + places + 1, into the column of text (B, width) behind `newest` (1), int64 all; newest and
    places (B), the newest token's column and its place in each row, then go up by one.
    """
    _draw(logits, seeds, places, temperature, top_k, None, text, text.size(1), newest)


def _draw(logits, seeds, places, temperature, top_k, chosen, text, width, newest, block=2048):
    (B, V), device, kth = logits.shape, logits.device, None
    if top_k is not None and top_k < V:
        kth = torch.empty(B, device=device)
        warps = max(1, min(32, power_of_two(V) // 256))
        launch('kth_largest', (B,), logits, logits.stride(0), kth, V, top_k, math.log2(top_k), BLOCK=256 * warps,
               num_warps=warps)
    blocks = -(-V // block)
    best = torch.empty(B, blocks, device=device)
    token = torch.empty(B, blocks, dtype=torch.long, device=device)
    launch('draw', (blocks, B), logits, logits.stride(0), kth, seeds, places, newest, best, token, V, 1 / temperature,
           BLOCK=block)
    rows = min(32, power_of_two(B)) # of a program
    launch('choose', (-(-B // rows),), best, token, chosen, text, width, newest, places, B, blocks, ROWS=rows,
           COLS=power_of_two(blocks), num_warps=4 if B > 1 else 1)
