"""
Pretrained GPT-2 by nanoGPT's own loop, with kept keys and values, and with the ThunderKittens kernel: the same text?
how fast?

    python inference.py
    python inference.py --init_from=some/folder --start="The answer is" --max_new_tokens=50

Every token is the likeliest one, so all ways should write the same text; in bfloat16 a near
tie may fall either way, and from there on the texts differ: the agreement says how far they go.
"""
import json
import sys
import time
from contextlib import nullcontext

import torch

from configurator import choose, configure
from data.tokens import tokenizer
from model import GPT

# -----------------------------------------------------------------------------
init_from = 'gpt2-medium' # gpt2, gpt2-medium, gpt2-large, gpt2-xl or a local folder in transformers' format
start = 'The quickest way to understand a program is to'
max_new_tokens = 100
device = 'auto' # cpu, cuda, cuda:1, mps, ...
dtype = 'auto' # float32, bfloat16 or float16
TK_kernel = 'auto' # True: both ways or an error; False: torch's attention alone; auto: the kernel where it can run
# -----------------------------------------------------------------------------
config = configure(globals(), auto={'TK_kernel': bool})
if max_new_tokens < 1:
    sys.exit(f"--max_new_tokens must be at least 1, not {max_new_tokens}")
choose(config, for_training=False)
device, dtype = config['device'], config['dtype']
device_type = torch.device(device).type
torch.set_float32_matmul_precision('high')
autocast = nullcontext() if dtype == 'float32' else torch.autocast(device_type, dtype=getattr(torch, dtype))

encode, decode, n_tokens = tokenizer({})
try:
    model = GPT.from_pretrained(init_from).eval().to(device)
    prompt = encode(start)
except (ValueError, OSError) as e:
    sys.exit(f"--init_from={init_from}: {e}")
if not prompt or max(prompt) >= model.config.vocab_size:
    sys.exit(f"--start must hold tokens below the model's vocab_size={model.config.vocab_size}, got {prompt[:10]}")
print(f"{init_from}: {model.get_num_params() / 1e6:.1f}M parameters, {len(prompt)} tokens to start from")


def run(generate, use_kernel=False):
    """(the new tokens' ids, tokens per second) with the kernel or with torch's attention."""
    for block in model.transformer.h:
        block.attn.TK_kernel = use_kernel
    idx = torch.tensor([prompt], device=device) # (1, T)
    with autocast:
        generate(idx, 2, temperature=0) # warm-up
        began = time.perf_counter()
        ids = generate(idx, max_new_tokens, temperature=0, n_tokens=n_tokens)[0, len(prompt):].tolist()
    return ids, max_new_tokens / (time.perf_counter() - began)


results = {'plain loop': run(model.generate_plain), 'torch': run(model.generate)}
if config['TK_kernel']:
    results['ThunderKittens'] = run(model.generate, use_kernel=True)
print('\n' + start + decode(results['torch'][0]) + '\n')
for name, (_, tokens_per_s) in results.items():
    print(f"{name:>15}: {tokens_per_s:8.1f} tokens/s")
summary = {'model': init_from, 'device': device, 'dtype': dtype, 'new_tokens': max_new_tokens,
           'tokens_per_s': {name: round(speed, 1) for name, (_, speed) in results.items()}}
reference = results['torch'][0]
for name, (ids, _) in results.items():
    same = next((i for i, (a, b) in enumerate(zip(ids, reference)) if a != b), max_new_tokens)
    if same < len(reference):
        print(f"{name}: the same text as torch's for {same} of {max_new_tokens} tokens, then "
              f"{decode(ids[same:same + 1])!r} where it has {decode(reference[same:same + 1])!r}")
    summary.setdefault('same_tokens', {})[name] = same
if min(summary['same_tokens'].values()) == max_new_tokens:
    print("the same text each way")
print(json.dumps(summary))
