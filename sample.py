"""
A trained model speaks.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5 --max_new_tokens=100
    python sample.py --start=FILE:prompt.txt
"""
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from configurator import choose, configure
from data.run import read_checkpoint
from data.tokens import read_meta, tokenizer
from model import GPT

# -----------------------------------------------------------------------------
init_from = 'resume' # resume (out_dir's checkpoint), gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder
out_dir = 'out' # where the checkpoint is
start = '\n' # the text to continue, or FILE:path of a file that holds it
num_samples = 10
max_new_tokens = 500 # in each sample
temperature = 0.8 # below 1 less random, above 1 more, 0 always takes the likeliest token
top_k = 200 # draw only among so many likeliest tokens, 0 among all
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

# the text to continue
if start.startswith('FILE:'):
    try:
        start = Path(start[5:]).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
        sys.exit(f"--start={start}: {getattr(e, 'strerror', None) or 'not UTF-8 text'}")

# the model and its tokenizer
checkpoint = read_checkpoint(Path(out_dir, 'ckpt.pt')) if init_from == 'resume' else {}
if isinstance(checkpoint.get('model_args'), dict): # the choice of kernel looks at the heads
    config.update({k: v for k, v in checkpoint['model_args'].items() if k in ('n_head', 'n_embd')})
choose(config, for_training=False)
device, dtype = config['device'], config['dtype']
device_type = torch.device(device).type
ours = dict(dropout=0.0, TK_kernel=config['TK_kernel'])
try:
    model = GPT.from_checkpoint(checkpoint, **ours) if checkpoint else GPT.from_pretrained(init_from, ours)
except (ValueError, OSError) as e:
    sys.exit(f"--init_from={init_from}: {e}")
meta = checkpoint.get('tokenizer')
if meta is None and checkpoint: # a checkpoint of nanoGPT's own: the data set it names says how to read it
    meta = read_meta(Path('data', str(checkpoint.get('config', {}).get('dataset', ''))))
encode, decode, n_tokens = tokenizer(meta or {})
try:
    prompt = encode(start)
except ValueError as e:
    sys.exit(f"--start: {e}")
if not prompt:
    sys.exit("--start must hold at least one character, got an empty text")
if max(prompt) >= model.config.vocab_size:
    sys.exit(f"--start: token {max(prompt)} is not below the model's vocab_size={model.config.vocab_size}")

torch.manual_seed(seed)
torch.set_float32_matmul_precision('high')
model.eval().to(device)
if config['compile']:
    model.compile()
autocast = nullcontext() if dtype == 'float32' else torch.autocast(device_type, dtype=getattr(torch, dtype))
idx = torch.tensor([prompt], device=device) # (1, T)
with autocast:
    for _ in range(num_samples):
        ids = model.generate(idx, max_new_tokens, temperature=temperature, top_k=top_k or None, n_tokens=n_tokens)
        print(decode(ids[0].tolist()))
        print('---------------')
