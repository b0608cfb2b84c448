"""
Time and model FLOPs utilisation of a real training step.

    python bench.py
    python bench.py --batch_size=16 --block_size=1024 --TK_kernel=False
    python bench.py --plain=True

Switches: fast is the step by hand, TK_kernel chooses the attention alone; plain=True is the whole of plain
nanoGPT, torch's attention under torch.compile and nothing of ours, the standing point of comparison. Before
timing, loss, every gradient and, where the step makes one, the output are held against plain nanoGPT in float32:
they may be half as far again from it as plain nanoGPT is in this dtype. On a GPU a table says where the time went.
One JSON line comes last. The table of many shapes is written by python -m ThunderKittens.examples.gpt2_step.bench.
"""
import json
import math
import platform
import re
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from configurator import choose, configure
from data.run import commit
from data.tokens import Tokens, read_meta
from model import GPT, GPTConfig, peak_flops
from ThunderKittens.examples.gpt2_step import TrainStep

# -----------------------------------------------------------------------------
batch_size = 4
block_size = 4096
n_layer = 12
n_head = 12
n_embd = 768
bias = False
vocab_size = 50304 # of the model; the data may use fewer
dataset = 'shakespeare_char' # a folder in data/
real_data = True # False: random tokens
steps = 20 # timed ones
warmup = 10 # steps before them
plain = False # the whole of plain nanoGPT, for comparison
seed = 1337
device = 'auto' # cpu, cuda, cuda:1, ...
dtype = 'auto' # float32, bfloat16 or float16
fast = 'auto' # the step by hand, in CUDA graphs: True, False (model.py and autograd); auto uses it where it can run
compile = 'auto' # torch.compile: True or False; auto compiles model.py on CUDA where the step is not fast
TK_kernel = 'auto' # the ThunderKittens attention: True, False; auto uses it where it can run
residual = 'float32' # of the fast step's residual stream; bfloat16 is faster, and not what nanoGPT computes
profile = False # a table of the slowest operations of three steps
# -----------------------------------------------------------------------------
config = configure(globals(), auto={'fast': bool, 'compile': bool, 'TK_kernel': bool})
for _name in ('batch_size', 'block_size', 'n_layer', 'n_head', 'n_embd', 'vocab_size', 'steps', 'warmup'):
    _least = 0 if _name == 'warmup' else 1
    if config[_name] < _least:
        sys.exit(f"--{_name} must be at least {_least}, not {config[_name]}")
choose(config)
device, dtype, fast, compile, TK_kernel = (config[k] for k in ('device', 'dtype', 'fast', 'compile', 'TK_kernel'))
if residual not in ('float32', 'bfloat16') or residual == 'bfloat16' and not fast:
    sys.exit(f"--residual must be float32 or, in the fast step, bfloat16, not {residual!r}")
device_type = torch.device(device).type
on_gpu = device_type == 'cuda'
torch.manual_seed(seed)
torch.set_float32_matmul_precision('high')
autocast = nullcontext() if dtype == 'float32' else torch.autocast(device_type, dtype=getattr(torch, dtype))


def make_batches(n):
    """n batches of x and y, each (B, T), on the device."""
    if real_data:
        tokens = Tokens(Path('data', dataset), 'train', block_size, vocab_size)
        read = [tokens.batch(torch.randint(tokens.n_starts, (batch_size,)).tolist()) for _ in range(n)]
    else:
        top = min(vocab_size, read_meta(Path('data', dataset)).get('vocab_size', vocab_size))
        ids = torch.randint(top, (n, batch_size, block_size + 1))
        read = [(i[:, :-1].contiguous(), i[:, 1:].contiguous()) for i in ids]
    return [(x.to(device), y.to(device)) for x, y in read]


def make_model(use_kernel):
    """The model with random weights; every call gives the same ones."""
    torch.manual_seed(seed)
    try:
        shape = GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                          bias=bias, dropout=0.0, TK_kernel=use_kernel)
    except ValueError as e:
        sys.exit(str(e))
    return GPT(shape).to(device)


def make_step(model, optimizer):
    return TrainStep(model, optimizer, 1.0, getattr(torch, residual), getattr(torch, dtype))


def make_optimizer(model):
    return model.configure_optimizers(1e-2, 1e-4, (0.9, 0.95), device_type)


def outcome(model, x, y, by_hand=False, context=autocast):
    """
    {name: tensor} of output (by hand there is none), loss and every gradient on one batch. That of c_attn's weight is
    three: the values' is so much larger at the start that an error in the queries' or the keys' would hide behind it.
    """
    if by_hand:
        found = {'loss': make_step(model, make_optimizer(model)).forward_backward(x, y)}
    else:
        with context:
            logits, loss = model(x, y)
        loss.backward()
        found = {'output': logits.detach().float(), 'loss': loss.detach()}
    for name, p in model.named_parameters():
        found[f'gradient of {name}'] = p.grad
        if name.endswith('c_attn.weight') and p.grad is not None:
            for part, third in zip(('queries', 'keys', 'values'), p.grad.chunk(3)):
                found[f'gradient of {name}, {part}'] = third
    return found


def first_difference(x, y):
    """'' where what is timed is as near to float32 as plain nanoGPT is, else the tensor that is so least."""
    torch.set_float32_matmul_precision('highest')
    exact = outcome(make_model(False), x, y, context=nullcontext())
    torch.set_float32_matmul_precision('high')
    reference, ours = outcome(make_model(False), x, y), outcome(make_model(TK_kernel), x, y, fast)
    worst, line = 1.0, ''
    for name, want in exact.items():
        if name == 'output' and fast:
            continue
        if ours.get(name) is None:
            return f"{name}: the kernel gives none"
        off, allowed = (((got[name] - want).norm() / want.norm()).item() for got in (ours, reference))
        allowed = 1.5 * allowed + 0.002
        said = f"{name}: off by {off:.4f} of its norm, allowed {allowed:.4f}"
        if math.isnan(off):
            return said
        if off / allowed > worst:
            worst, line = off / allowed, said
    return line


batches = make_batches(8)
if TK_kernel or fast:
    few = max(1, 16384 * 12 * 768 // (n_layer * n_embd) // block_size) # sequences, so that float32 fits
    difference = first_difference(*(t[:few] for t in batches[0]))
    if difference:
        sys.exit(f"kernel differs: {difference}")
    check = "kernel ok"
else:
    check = "nothing to compare: this is plain nanoGPT's attention"
print(check)
if on_gpu:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats() # a captured graph takes its memory in the first steps

model = make_model(TK_kernel)
optimizer = make_optimizer(model)
fast_step = make_step(model, optimizer) if fast else None
step_model = torch.compile(model) if compile else model


def step(x, y):
    if fast:
        fast_step.forward_backward(x, y)
        fast_step.update()
        return
    with autocast:
        loss = step_model(x, y)[1]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def timed_ms(n):
    """Time of each of n steps in ms. On a GPU by events, which the host never waits for inside."""
    if not on_gpu:
        marks = [time.perf_counter()]
        for i in range(n):
            step(*batches[i % len(batches)])
            marks.append(time.perf_counter())
        return [(b - a) * 1e3 for a, b in zip(marks, marks[1:])]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    events[0].record()
    for i in range(n):
        step(*batches[i % len(batches)])
        events[i + 1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(events, events[1:])]


# what a GPU kernel's name says about its work; the first that fits counts
KINDS = [('attention', r'attn|sdpa|flash|fmha'), ('cross-entropy', r'cross_entropy|log_softmax|nll'),
         ('AdamW, clipping', r'adam|multi_tensor|squares|_plan|norm_cub|LpNorm'),
         ('matmuls with GELU', r'linear_gelu'), ('GELU', r'gelu|erf'), ('LayerNorm, residual', r'norm|embed'),
         ('matmuls', r'nvjet|gemm|cublas|cutlass|splitK')]


def breakdown(kernels, n):
    """
    {kind of work: ms a step} of n steps, from the first kernel's start to the last one's end; 'other' holds casts,
    copies and sums, 'idle' the time in which none ran. kernels: (name, start, end) in microseconds, any order.
    """
    kernels = sorted(kernels, key=lambda kernel: kernel[1])
    found, idle, until = {}, 0, kernels[0][1]
    for name, start, end in kernels:
        kind = next((kind for kind, words in KINDS if re.search(words, name)), 'other')
        found[kind] = found.get(kind, 0) + end - start
        idle += max(0, start - until)
        until = max(until, end)
    return {kind: round(us / 1e3 / n, 3) for kind, us in sorted(found.items(), key=lambda item: -item[1])} | \
        {'idle': round(idle / 1e3 / n, 3)}


for i in range(warmup):
    step(*batches[i % len(batches)])
times_ms = timed_ms(steps)
ms = statistics.median(times_ms)
peak_gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
parts, attention = {}, []
if on_gpu or profile: # after the timing, which it would disturb
    from torch.profiler import ProfilerActivity
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        if on_gpu:
            torch.cuda._sleep(10**8) # about 50 ms, in which the host gets ahead as it is in a longer run
        timed_ms(3)
    if profile:
        column = 'self_cuda_time_total' if on_gpu else 'self_cpu_time_total'
        print(profiled.key_averages().table(sort_by=column, row_limit=30))
    if on_gpu:
        kernels = [(event.name, event.time_range.start, event.time_range.end) for event in profiled.events()
                   if event.device_type.name == 'CUDA' and 'spin_kernel' not in event.name]
        parts = breakdown(kernels, 3)
        attention = sorted({name[:60] for name, _, _ in kernels if re.search(dict(KINDS)['attention'], name)})

# what it means
tokens_per_s = batch_size * block_size / ms * 1e3
card = torch.cuda.get_device_name() if on_gpu else platform.machine()
peak = peak_flops(card)
mfu, mfu_causal = (model.flops_per_token(causal) * tokens_per_s / peak if peak else None for causal in (False, True))
name = "plain nanoGPT" if plain else ("fast, " if fast else "") + ("TK kernel" if TK_kernel else "SDPA")
print(f"{batch_size} x {block_size}, {name}, {dtype}, on {card}: {ms:.2f} ms a step (median of {steps}, "
      f"{min(times_ms):.2f} to {max(times_ms):.2f}), {tokens_per_s:,.0f} tokens/s"
      + (f", {peak_gib:.1f} GiB" if on_gpu else ""))
if peak:
    print(f"MFU {mfu:.1%} of {peak / 1e12:.0f} TFLOP/s; {mfu_causal:.1%} with the causal half of the attention FLOPs")
else:
    print("no MFU: the peak of this device is not known")
whole = sum(parts.values())
if parts:
    print(f"of {whole:.2f} ms a step in a profile:")
for kind, part in parts.items():
    print(f"  {part:8.3f} ms {part / whole:6.1%}  {kind}")
print(json.dumps({
    'batch_size': batch_size, 'block_size': block_size, 'n_layer': n_layer, 'n_head': n_head, 'n_embd': n_embd,
    'fast': fast, 'TK_kernel': TK_kernel, 'plain': plain, 'compile': compile, 'residual': residual, 'dtype': dtype,
    'real_data': real_data, 'dataset': dataset, 'check': check,
    'ms_median': round(ms, 3), 'ms_min': round(min(times_ms), 3),
    'ms_max': round(max(times_ms), 3), 'tokens_per_s': round(tokens_per_s), 'mfu': mfu and round(mfu, 4),
    'mfu_causal': mfu_causal and round(mfu_causal, 4), 'peak_gib': peak_gib and round(peak_gib, 2), 'card': card,
    'parts_ms': parts, 'attention_kernels': attention, 'torch': torch.__version__, 'cuda': torch.version.cuda,
    'commit': commit(),
}))
