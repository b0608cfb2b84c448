"""
Trains a GPT, on one device or, under torchrun, on many.

    python train.py config/train_shakespeare_char.py --batch_size=32
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_id=NAME --rdzv_endpoint=HOST:29400 \
        train.py config/train_gpt2.py

In out_dir it leaves checkpoints, log.csv, machine.txt and loss.png; data/run.py says which. SIGTERM, SIGINT (Ctrl-C)
and SIGUSR1 let it finish its step, save, and exit with status 128 + the signal's number; a second Ctrl-C stops at once.
After max_bad_steps steps in a row with a NaN or Inf it exits with status 1.
"""
import functools
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configurator import choose, configure
from data.processes import StopSignal, begun_before, fresh_store, launcher, leave_group
from data.run import Checkpoints, RunLog, check_init_from, explain_error, known_heads, lock, newest_checkpoint
from data.tokens import Tokens, read_meta
from model import GPT, GPTConfig
from ThunderKittens.examples.gpt2_step import AdamW, TrainStep
from ThunderKittens.examples.gpt2_step.exchange import choose_exchange

_started = time.time()
# -----------------------------------------------------------------------------
# settings: GPT-2 (124M) on OpenWebText
# input and output
out_dir = 'out'
eval_interval = 2000 # steps
log_interval = 1 # steps
eval_iters = 200 # batches of each split in an evaluation
eval_only = False # evaluate once, then stop
full_val = False # after the last step, the loss over all of val.bin
always_save_checkpoint = True # ckpt.pt is the latest evaluation's; False: the one with the best val loss
save_interval = 0 # steps between checkpoints to go on from; 0 saves them at evaluations only
keep_last = 2 # so many checkpoints to go on from stay
init_from = 'scratch' # scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder in transformers' format
# wandb.ai
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext' # a folder in data/
data_order = 'random' # random offsets as in nanoGPT, or permutation: every place once an epoch
gradient_accumulation_steps = 5 * 8 # micro-batches a step, over all processes
batch_size = 12 # sequences in a micro-batch
block_size = 1024 # tokens in a sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0 # 0 for pretraining, 0.1 and more for finetuning
bias = False # biases in LayerNorm and Linear layers
# adamw
learning_rate = 6e-4 # its maximum
max_iters = 600000 # steps
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0 # 0 clips nothing
max_bad_steps = 20 # steps with a NaN or Inf are skipped; so many in a row end the run
# learning rate decay
decay_lr = True
warmup_iters = 2000
lr_decay_iters = 600000 # about max_iters, as in Chinchilla
min_lr = 6e-5 # about learning_rate / 10, as in Chinchilla
# system
backend = 'auto' # nccl, gloo; copies: nccl, but GPUs of a machine copy gradients; auto: copies for two, nccl or gloo
device = 'auto' # cpu, cuda, cuda:1, mps, ...
dtype = 'auto' # float32, bfloat16 or float16 (float16 gets a GradScaler)
fast = 'auto' # the step by hand, in CUDA graphs: True, False (model.py and autograd); auto uses it where it can run
compile = 'auto' # torch.compile: True or False; auto compiles model.py on CUDA where the step is not fast
TK_kernel = 'auto' # the ThunderKittens attention: True, False; auto uses it where it can run
plain = False # the whole of plain nanoGPT, nothing of ours, for comparison
residual = 'float32' # of the fast step's residual stream; bfloat16 is faster, and not what nanoGPT computes
seed = 1337
# -----------------------------------------------------------------------------
config = configure(globals(), auto={'fast': bool, 'compile': bool, 'TK_kernel': bool})

# the processes: one, or those that torchrun started
ddp = 'RANK' in os.environ
rank, world_size = (int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])) if ddp else (0, 1)
master = rank == 0
if ddp and device in ('auto', 'cuda') and torch.cuda.is_available():
    config['device'] = f"cuda:{os.environ['LOCAL_RANK']}"


def say(line):
    """Print a line, once, and above the bar where there is one to keep in its place."""
    if master:
        tqdm.write(line) if sys.stderr.isatty() else print(line, flush=True)


def check_settings():
    """The mistakes that a type does not show."""
    for name in ('gradient_accumulation_steps', 'batch_size', 'block_size', 'eval_interval', 'eval_iters',
                 'log_interval', 'lr_decay_iters', 'keep_last', 'max_bad_steps'):
        if config[name] < 1:
            sys.exit(f"--{name} must be at least 1, not {config[name]}")
    for name in ('max_iters', 'warmup_iters', 'grad_clip', 'weight_decay', 'learning_rate', 'min_lr', 'seed',
                 'save_interval'):
        if not 0 <= config[name] < math.inf:
            sys.exit(f"--{name} must be at least 0 and finite, not {config[name]}")
    if seed >= 2**32:
        sys.exit(f"--seed must be below {2**32}, not {seed}")
    for name in ('beta1', 'beta2'):
        if not 0 <= config[name] < 1:
            sys.exit(f"--{name} must be at least 0 and below 1, not {config[name]}")
    for name, allowed in (('data_order', ('random', 'permutation')), ('backend', ('auto', 'nccl', 'gloo', 'copies')),
                          ('residual', ('float32', 'bfloat16'))):
        if config[name] not in allowed:
            sys.exit(f"--{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}, not {config[name]!r}")
    check_init_from(init_from, 'scratch', 'resume')


check_settings()
sys.excepthook = explain_error
run_id = os.environ.get('TORCHELASTIC_RUN_ID', '')
store = fresh_store(rank, world_size) if ddp else None
checkpoint = {}
if init_from == 'resume':
    checkpoint = newest_checkpoint(out_dir, say)
elif ddp and begun_before(out_dir, run_id, store, rank, world_size):
    found = newest_checkpoint(out_dir, say)
    if found.get('run_id') == run_id: # torchrun started this run again: it goes on, whatever it began from
        init_from, checkpoint = 'resume', found
run_id = run_id or checkpoint.get('run_id', '') # of torchrun's run that goes on without it
config.update(known_heads(init_from, checkpoint))
choose(config)
device, dtype, fast, compile, TK_kernel = (config[k] for k in ('device', 'dtype', 'fast', 'compile', 'TK_kernel'))
if residual != 'float32' and not fast:
    sys.exit(f"--residual={residual} is an option of the fast step, which does not run here")
device_type, control = torch.device(device).type, None
if ddp:
    if backend == 'auto':
        backend = 'gloo' if device_type != 'cuda' else 'copies' if fast and world_size == 2 else 'nccl'
    if backend in ('nccl', 'copies') and device_type != 'cuda':
        sys.exit(f"--backend={backend} needs CUDA devices, not {device}; gloo runs anywhere")
    if backend == 'copies' and not fast:
        sys.exit("--backend=copies is a way of the fast step, which does not run here; nccl runs with any")
    dist.init_process_group(backend=backend.replace('copies', 'nccl'), store=store, rank=rank, world_size=world_size)
    control = dist.new_group(backend='gloo') # small words between the processes, beside the gradients
if master:
    try:
        os.makedirs(out_dir, exist_ok=True)
    except OSError as e:
        sys.exit(f"--out_dir={out_dir}: {e.strerror}")
    if not eval_only:
        lock(out_dir, say)
torch.manual_seed(seed + rank)
torch.set_float32_matmul_precision('high') # float32 matmuls in TF32 on GPUs that have it
autocast = nullcontext() if dtype == 'float32' else torch.autocast(device_type, dtype=getattr(torch, dtype))

# data
meta = read_meta(Path('data', dataset))
my_micro_steps = range(rank, gradient_accumulation_steps, world_size) # of each step
say(f"tokens per step: {gradient_accumulation_steps * batch_size * block_size:,}")


def to_device(x, y):
    """A batch (B, T) on the device; on CUDA the copy runs beside the computation."""
    if device_type == 'cuda':
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def draw(split):
    """Offsets of a random batch, with nanoGPT's draws."""
    return torch.randint(data[split].n_starts, (batch_size,)).tolist()


def places(step, micro_step):
    """Where the sequences of a micro-batch stand: random, or as the permutation of their epoch has it."""
    if data_order == 'random':
        return draw('train')
    n = data['train'].n_windows
    first = (step * gradient_accumulation_steps + micro_step) * batch_size
    return [int(permutation(n, i // n)[i % n]) for i in range(first, first + batch_size)]


@functools.lru_cache(maxsize=2) # a batch may lie in two epochs
def permutation(n, epoch):
    """The numbers below n in an order that depends on seed and epoch only."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def train_batch(at):
    """The micro-batch at these places of train.bin."""
    return to_device(*(data['train'].batch(at) if data_order == 'random' else data['train'].windows(at)))


# model
def make_model():
    """The model as init_from asks for it, on the CPU."""
    global block_size
    ours = dict(dropout=dropout, TK_kernel=TK_kernel)
    if init_from == 'scratch':
        say(f"a new model, vocab_size {meta.get('vocab_size', 50304):,}" + ("" if meta else " (GPT-2's, padded)"))
        model = GPT(GPTConfig(block_size=block_size, vocab_size=meta.get('vocab_size', 50304), n_layer=n_layer,
                              n_head=n_head, n_embd=n_embd, bias=bias, **ours))
    elif init_from == 'resume':
        model = GPT.from_checkpoint(checkpoint, **ours)
        say(f"resuming from step {checkpoint.get('iter_num', 0)} in {out_dir}")
    else:
        model = GPT.from_pretrained(init_from, ours)
        say(f"weights of {init_from}")
    if block_size < model.config.block_size:
        model.crop_block_size(block_size)
    elif block_size > model.config.block_size:
        say(f"block_size is the model's own, {model.config.block_size}, not {block_size}")
        block_size = model.config.block_size
    return model


try:
    raw_model = make_model()
except (ValueError, OSError) as e:
    sys.exit(str(e) if init_from == 'scratch' else f"--init_from={init_from}: {e}")
data = {split: Tokens(Path('data', dataset), split, block_size, raw_model.config.vocab_size)
        for split in ('train', 'val')}
raw_model.to(device)
if device_type == 'cuda':
    torch.set_num_threads(1) # what is left to the CPU is small, and on a busy host its threads wait for one another
shape = raw_model.config # the model's own, whatever the settings say, where init_from is not scratch
say(f"{shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} channels, {'' if shape.bias else 'no '}biases: "
    f"{raw_model.get_num_params() / 1e6:.2f}M parameters")
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
optimizer = raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type,
                                           AdamW if fast and init_from != 'resume' else torch.optim.AdamW)

# where the run stands
step, best_val_loss, resumed = checkpoint.get('iter_num', 0), float(checkpoint.get('best_val_loss', 1e9)), {}
best_val_loss = best_val_loss if math.isfinite(best_val_loss) else 1e9
if init_from == 'resume':
    try:
        optimizer.load_state_dict(checkpoint['optimizer'])
    except (KeyError, ValueError) as e:
        sys.exit(f"{out_dir}: the checkpoint's optimizer state does not fit ({e})")
    for group in optimizer.param_groups: # a run may move to another kind of device
        group['fused'] = device_type == 'cuda'
    for p, state in optimizer.state.items(): # a cropped model needs the averages of what is left
        state.update({k: t[:len(p)].clone() for k, t in state.items() if t.dim() and t.shape != p.shape})
    if 'scaler' in checkpoint and scaler.is_enabled():
        scaler.load_state_dict(checkpoint['scaler'])
    states = checkpoint.get('ranks', [])
    resumed = states[rank] if len(states) == world_size else {}
mfu, wandb_id = checkpoint.get('mfu', -1.0), checkpoint.get('wandb_id')
evaluated = checkpoint.get('evaluated', False) # the run that saved this had just evaluated
checkpoint = None # free its memory
fast_step = None
if fast:
    exchange, reason = choose_exchange(torch.device(device), backend == 'copies') if ddp else (None, '')
    if ddp:
        say(f"gradients are summed {exchange.how}" + (f": {reason}" if reason else ''))
    fast_step = TrainStep(raw_model, optimizer, grad_clip, getattr(torch, residual), getattr(torch, dtype),
                          exchange=exchange)
    if not eval_only:
        fast_step.compile(batch_size, block_size)
model = torch.compile(raw_model) if compile else raw_model
if ddp and not fast:
    model = DistributedDataParallel(model, device_ids=[device] if device_type == 'cuda' else None)


def evaluate(forward, x, y):
    """The mean loss of a batch, 0-d, without dropout."""
    if fast:
        return fast_step.evaluate(x, y)
    with torch.no_grad(), autocast:
        return forward(x, y)[1]


def estimate_loss():
    """
    Mean loss of eval_iters random batches of each split, the batches shared by all processes. The fast step takes small
    ones together, for which the mean of their losses is the loss: the GPU waits less between its kernels.
    None once a stop is agreed: the random numbers are then as before, and the resumed run evaluates here.
    """
    together = max(1, 65536 // (batch_size * block_size)) if fast else 1 # 65536 tokens fill it well
    n = len(range(rank, eval_iters, world_size))
    raw_model.eval()
    forward = model.module if isinstance(model, DistributedDataParallel) else model
    losses, rng = {}, torch.get_rng_state()
    for split in ('train', 'val'):
        mine = []
        for first in stop.until_agreed(range(0, math.ceil(eval_iters / world_size), together)):
            drawn = [draw(split) for _ in range(first, min(first + together, n))]
            if drawn: # another process may have one more
                mine += [evaluate(forward, *to_device(*data[split].batch(sum(drawn, []))))] * len(drawn)
        if stop.agreed:
            torch.set_rng_state(rng)
            losses = None
            break
        losses[split] = mean_over_processes(mine)
    raw_model.train()
    return losses


def full_val_loss():
    """
    Loss over all of val.bin: every token but the first is predicted once, but for a rest shorter than T.
    Not of all once a stop is agreed.
    """
    raw_model.eval()
    n, losses = data['val'].n_windows, []
    for first in stop.until_agreed(range(0, n, world_size * batch_size)):
        mine = range(first + rank * batch_size, min(first + (rank + 1) * batch_size, n))
        if mine:
            losses += [evaluate(raw_model, *to_device(*data['val'].windows(mine)))] * len(mine)
    raw_model.train()
    return mean_over_processes(losses)


def mean_over_processes(losses):
    """Mean of the losses, 0-d tensors, of all processes."""
    total = torch.zeros(2, dtype=torch.double) # sum and count
    if losses:
        total += torch.tensor([torch.stack(losses).cpu().double().sum(), len(losses)])
    if ddp:
        total = total.to(device)
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def get_lr(it):
    """Learning rate of step `it`: linear warm-up, then a cosine down to min_lr at lr_decay_iters."""
    if not decay_lr:
        return learning_rate
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    progress = (it - warmup_iters) / max(1, lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def rank_state():
    """What this process needs to go on exactly here: its random numbers and the batch that waits."""
    state = {'cpu_rng': torch.get_rng_state(), 'next_places': next_places, 'launcher': launcher()}
    if device_type == 'cuda':
        state['cuda_rng'] = torch.cuda.get_rng_state(device)
    return state


def save_checkpoint(*names):
    """
    last-STEP.pt, and the same under `names`: nanoGPT's six entries, and ours that it does not look at.
    All processes call this together.
    """
    states = [rank_state()]
    if ddp:
        states = [None] * world_size
        dist.all_gather_object(states, rank_state(), group=control)
    if not master:
        return
    say(f"saving checkpoint to {out_dir}")
    checkpoints.save({
        'model': raw_model.state_dict(), 'optimizer': optimizer.state_dict(),
        'model_args': raw_model.config.model_args(), 'iter_num': step, 'best_val_loss': best_val_loss, 'config': config,
        'gelu': raw_model.config.gelu, 'tokenizer': meta, 'scaler': scaler.state_dict(), 'ranks': states, 'mfu': mfu,
        'evaluated': evaluated, 'run_id': run_id, 'wandb_id': run_log.wandb_run.id if run_log.wandb_run else wandb_id,
    }, names)


def log(**row):
    """A row for log.csv and wandb."""
    if master:
        run_log.add({'step': step, **row, 'elapsed_s': round(time.time() - _started, 1)})


run_log = checkpoints = None
if master: # an evaluation alone leaves a folder as it is: a run may be at work there
    run_log = RunLog(None if eval_only else out_dir, step, f"{dataset}, {raw_model.get_num_params() / 1e6:.1f}M", say)
if master and not eval_only:
    checkpoints = Checkpoints(out_dir, keep_last, say, anew=init_from != 'resume')
if wandb_log and master:
    run_log.start_wandb(wandb_project, wandb_run_name, config, wandb_id)


# the guard: a step whose loss or gradients are not finite changes nothing, decided on the device; the host looks, which
# waits for the device, at steps that are logged, at evaluations, and every max_bad_steps steps
bad_in_a_row, longest_row, bad_in_all = (torch.zeros((), device=device) for _ in range(3))


def update(loss):
    """Clip and step, unless `loss` or a gradient is not finite on any process: 1 if so and 0 otherwise, 0-d."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    bad = (~(norm.isfinite() & loss.isfinite())).float()
    if ddp:
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    if scaler.is_enabled() or device_type == 'cuda':
        if not scaler.is_enabled():
            optimizer.found_inf = bad # the fused AdamW heeds it as under a GradScaler, and nobody waits
        scaler.step(optimizer)
        scaler.update()
    elif not bad:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return bad


def guard(last, skipped, longest):
    """Say how many steps up to `last` were skipped; end the run, in all processes, after max_bad_steps in a row."""
    global skipped_said
    if skipped > skipped_said:
        say(f"warning: {skipped - skipped_said:.0f} steps up to {last} had a NaN or Inf and were skipped")
        skipped_said = skipped
    if longest >= max_bad_steps:
        end(1, f"{longest:.0f} steps in a row had a NaN or Inf; {how_to_go_on()}", final=True)


def how_to_go_on():
    """In words, once the last checkpoint is on the disk."""
    if checkpoints:
        checkpoints.wait()
        if checkpoints.newest:
            return f"--init_from=resume goes on from {checkpoints.newest}"
    if init_from == 'resume':
        return f"--init_from=resume goes on from step {first_step}"
    return "no checkpoint is saved yet"


def end(status, line='', final=False):
    """The end of the run in this process; `final`: torchrun is not to start it again. All processes call this."""
    bar.close()
    if checkpoints:
        checkpoints.wait()
    if run_log:
        run_log.finish()
    if line and master:
        print(line, file=sys.stderr if status == 1 else sys.stdout, flush=True)
    if ddp:
        leave_group(status, control, final)
    if status:
        sys.exit(status)


# training
first_step, skipped_said = step, 0
stop = StopSignal(control)
if resumed:
    torch.set_rng_state(resumed['cpu_rng'])
    if device_type == 'cuda' and 'cuda_rng' in resumed:
        torch.cuda.set_rng_state(resumed['cuda_rng'], device)
elif step > 0: # another number of processes: new random numbers, not those of the run's beginning again
    torch.manual_seed(seed + 1_000_003 * step + rank)
waiting = resumed.get('next_places', []) # the batch that the saved run had drawn, if this data and batch size have it
fits = data_order == 'random' and len(waiting) == batch_size and max(waiting) < data['train'].n_starts
next_places = waiting if fits else places(step, rank)
x, y = train_batch(next_places)
bar = tqdm(total=max_iters, initial=step, disable=not master, unit='step', dynamic_ncols=True,
           mininterval=0.5 if sys.stderr.isatty() else 30)
timed_from, timed_step = time.perf_counter(), step
while True:
    # evaluate, and keep what is good; a stop saves without
    due, losses = step % eval_interval == 0 or step >= max_iters, None
    if due or stop.agreed or step % max_bad_steps == 0:
        guard(step - 1, *torch.stack([bad_in_all, longest_row]).tolist())
    if eval_only or due and not (evaluated or stop.agreed):
        losses = estimate_loss()
    if losses:
        say(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        log(train_loss=losses['train'], val_loss=losses['val'], lr=get_lr(step))
        if eval_only:
            break
        evaluated, is_best = True, losses['val'] < best_val_loss # a NaN is not
        if is_best:
            best_val_loss = losses['val']
        if step > 0: # also where a resumed run begins: it may be its best, and a stop leaves a step without evaluation
            names = ['ckpt.pt', 'best.pt'] if is_best else ['ckpt.pt'] if always_save_checkpoint else []
            save_checkpoint(*names)
        if master:
            run_log.draw()
        timed_from, timed_step = time.perf_counter(), step
    elif step > first_step and (stop.agreed or save_interval and step % save_interval == 0):
        save_checkpoint()
    if step >= max_iters or stop.agreed:
        break
    evaluated = False

    # one step: gradients summed over micro-batches and averaged over processes
    stop.ask_all()
    total = 0.0
    for group in optimizer.param_groups:
        group['lr'] = get_lr(step)
    for i in range(max(1, len(my_micro_steps))): # a process without a share takes part with weight 0
        share = 1 / gradient_accumulation_steps if my_micro_steps else 0.0
        last = i + 1 >= len(my_micro_steps)
        if fast:
            loss = fast_step.forward_backward(x, y, share, first=i == 0, last=last)
        else:
            if ddp: # gradients meet after the last micro-batch only, and are averaged
                model.require_backward_grad_sync = last
            with autocast:
                loss = model(x, y)[1]
            scaler.scale(loss * share * world_size).backward()
            total += loss.detach()
        next_places = places(step + 1, rank) if last else places(step, my_micro_steps[i + 1])
        x, y = train_batch(next_places)
    bad = fast_step.update() if fast else update(total)
    bad_in_a_row.add_(1).mul_(bad)
    torch.maximum(longest_row, bad_in_a_row, out=longest_row)
    bad_in_all.add_(bad)

    # say how it goes
    if step % log_interval == 0:
        # waits for the device, once; the loss is of this process's last micro-batch, as nanoGPT prints it
        loss, skipped, longest = torch.stack([loss.detach(), bad_in_all, longest_row]).tolist()
        dt = (time.perf_counter() - timed_from) / (step + 1 - timed_step)
        timed_from, timed_step = time.perf_counter(), step + 1
        tokens_per_s = gradient_accumulation_steps * batch_size * block_size / dt
        share_of_peak = raw_model.estimate_mfu(gradient_accumulation_steps * batch_size / world_size, dt)
        if share_of_peak is not None and step >= first_step + 5: # the first steps are no measure
            mfu = share_of_peak if mfu < 0 else 0.9 * mfu + 0.1 * share_of_peak
        # -100.00 % is nanoGPT's own mark for a figure that is not known
        say(f"iter {step}: loss {loss:.4f}, time {dt * 1e3:.2f}ms, mfu {mfu * 100:.2f}%")
        log(loss=loss, lr=get_lr(step), time_ms=round(dt * 1e3, 3), tokens_per_s=round(tokens_per_s),
            mfu=round(mfu, 4) if mfu >= 0 else None)
        bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s" + (f", mfu {mfu:.1%}" if mfu >= 0 else ""),
                            refresh=False)
        guard(step, skipped, longest)
    step += 1
    bar.update()
    stop.agree()
bar.close()
if full_val and not stop.agreed:
    loss = full_val_loss()
    if not stop.agreed:
        say(f"val loss over all of val.bin: {loss:.4f}")
if stop.agreed:
    name = signal.Signals(stop.agreed).name
    end(128 + stop.agreed, f"stopped by {name} after step {step}; {how_to_go_on()}", stop.final)
end(0)
