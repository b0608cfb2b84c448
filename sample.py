"""
A trained model speaks.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5 --max_new_tokens=100
    python sample.py --start=FILE:prompt.txt
    python sample.py --start=LINES:prompts.txt --num_samples=2 --stop="\\n\\n"

All samples grow in one batch. A sample depends on seed, its number and its prompt, not on what grows beside it.
"""
import sys
import time
from bisect import bisect_left
from contextlib import nullcontext
from pathlib import Path

import torch

from ThunderKittens.examples.decode import why_unavailable as why_no_step
from configurator import configure
from data.run import load_model
from data.tokens import tokenizer

# -----------------------------------------------------------------------------
init_from = 'resume' # resume (out_dir's checkpoint), gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder
out_dir = 'out' # where the checkpoint is
start = '\n' # the text to continue, FILE:path of a file that holds it, or LINES:path of a file with one a line
num_samples = 10 # of each prompt
max_new_tokens = 500 # in each sample
temperature = 0.8 # below 1 less random, above 1 more, 0 always takes the likeliest token
top_k = 200 # draw only among so many likeliest tokens, 0 among all
top_p = 0.0 # draw only among the likeliest tokens that together have this probability, 0 among all
stop = '' # a sample ends before this text; \n is a new line
seed = 1337
device = 'auto' # cpu, cuda, cuda:1, mps, ...
dtype = 'auto' # float32, bfloat16 or float16
compile = 'auto' # torch.compile: True or False; auto does not, since every length is another shape
TK_kernel = 'auto' # the ThunderKittens attention: True, False; auto uses it where it can run
# -----------------------------------------------------------------------------
config = configure(globals(), auto={'compile': bool, 'TK_kernel': bool})
for _name, _least in (('num_samples', 1), ('max_new_tokens', 1), ('temperature', 0), ('top_k', 0), ('seed', 0)):
    if not config[_name] >= _least:
        sys.exit(f"--{_name} must be at least {_least}, not {config[_name]}")
if seed >= 2**63:
    sys.exit(f"--seed must be below {2**63}, not {seed}")
if 0 < temperature < 1e-6:
    sys.exit(f"--temperature must be 0, for the likeliest token, or at least 1e-6, not {temperature}")
if not 0 <= top_p <= 1:
    sys.exit(f"--top_p must be at least 0 and at most 1, not {top_p}")
stop = stop.replace('\\n', '\n')
LOOK_EVERY = 8 # tokens; looking takes a moment of the host's

# the texts to continue
starts = [start]
if start.startswith(('FILE:', 'LINES:')):
    kind, _, path = start.partition(':')
    try:
        text = Path(path).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
        sys.exit(f"--start={start}: {getattr(e, 'strerror', None) or 'not UTF-8 text'}")
    starts = text.removesuffix('\n').split('\n') if kind == 'LINES' else [text]

# the model and its tokenizer
model, meta = load_model(config)
device, dtype = config['device'], config['dtype']
device_type = torch.device(device).type
encode, decode, n_tokens = tokenizer(meta)
try:
    prompts = [encode(text) for text in starts]
except ValueError as e:
    sys.exit(f"--start: {e}")
if not all(prompts):
    line = f" in line {prompts.index([]) + 1}" if len(prompts) > 1 else ""
    sys.exit(f"--start must hold at least one character, got an empty text{line}")
if max(map(max, prompts)) >= model.config.vocab_size:
    sys.exit(f"--start: token {max(map(max, prompts))} is not below the model's vocab_size={model.config.vocab_size}"
             + ("" if init_from == 'resume' else "; a folder's model is read with GPT-2's tokens"))

torch.set_float32_matmul_precision('high')
model.to(device)
if device_type == 'cuda' and why_no_step():
    print(f"each token takes longer than it could: {why_no_step()}", file=sys.stderr)
if dtype != 'float32':
    model.cast_linears(getattr(torch, dtype))
if config['compile']:
    model.features = torch.compile(model.features, dynamic=True)
autocast = nullcontext() if dtype == 'float32' else torch.autocast(device_type, dtype=getattr(torch, dtype))


def text_of(ids):
    """The text of a sample's tokens, up to and without `stop`; and whether it ends there."""
    text, found, _ = decode(ids).partition(stop) if stop else (decode(ids), '', '')
    return text, bool(found)


def looks(stream):
    """
    The tokens of a stream in lists of (B) on the host: the first, then LOOK_EVERY at a time. A GPU copies them while it
    goes on and they are taken one list late, so that it never waits.
    """
    new, late = [], None
    for n, ids in enumerate(stream, start=1):
        new.append(ids)
        if n > 1 and n % LOOK_EVERY and n < max_new_tokens:
            continue
        rows, new = torch.stack(new).to('cpu', non_blocking=True), []
        if device_type != 'cuda':
            yield rows.tolist()
            continue
        if late:
            late[1].synchronize()
            yield late[0].tolist()
        late = rows, torch.cuda.current_stream().record_event()
    if late:
        late[1].synchronize()
        yield late[0].tolist()


# all samples grow side by side; the first is shown as it comes
texts = [prompt for prompt in prompts for _ in range(num_samples)]
rows = [[] for _ in texts] # the new tokens
print(decode(texts[0]), end='', flush=True)
began, shown = time.perf_counter(), ''
with autocast:
    for new in looks(model.stream([torch.tensor(ids, device=device) for ids in texts], max_new_tokens, seed,
                                  temperature=temperature, top_k=top_k or None, top_p=top_p or None,
                                  n_tokens=n_tokens)):
        for row, ids in zip(rows, zip(*new)):
            row.extend(ids)
        text, ended = text_of(rows[0])
        if not ended and len(rows[0]) < max_new_tokens:
            text = text.rstrip('\ufffd') # the rest of a character may still come
            text = text[:max(0, len(text) - len(stop))] # and of the stop
        if len(text) > len(shown):
            print(text[len(shown):], end='', flush=True)
            shown = text
        if stop and all(text_of(row)[1] for row in rows):
            break
took_s = time.perf_counter() - began
print('\n---------------')
for ids, row in list(zip(texts, rows))[1:]:
    print(decode(ids) + text_of(row)[0])
    print('---------------')
n = sum(bisect_left(range(len(row)), True, key=lambda n: text_of(row[:n])[1]) for row in rows) # up to the stop
print(f"{n:,} tokens in {took_s:.1f} s, {n / took_s:,.0f} tokens/s", file=sys.stderr)
