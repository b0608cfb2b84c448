"""
Pretrained GPT-2 by nanoGPT's own loop, with kept keys and values, and with the ThunderKittens kernel: the same text?
how fast?

    python inference.py
    python inference.py --init_from=some/folder --start="The answer is" --max_new_tokens=50
    python inference.py --bench=True --max_new_tokens=500

Every token is the likeliest one, so all ways should write the same text; in bfloat16 a near
tie may fall either way, and from there on the texts differ: the agreement says how far they go.

With --bench: tokens/s of models with random weights beside nanoGPT's own loop and transformers' generate, over the
batch size, as a table and a picture, which also go to the README where --readme is True.
"""
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from ThunderKittens.examples.decode import why_unavailable as why_no_step
from configurator import choose, configure
from data.bins import make_folder
from data.curves import write_section
from data.run import check_init_from
from data.run import commit as this_commit
from data.tokens import tokenizer
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
init_from = 'gpt2-medium' # gpt2, gpt2-medium, gpt2-large, gpt2-xl or a local folder in transformers' format
start = 'The quickest way to understand a program is to'
max_new_tokens = 100
bench = False # time models with random weights instead
sizes = '24x16x1024 12x12x768 48x25x1600' # of bench: n_layer x n_head x n_embd; all but the first at batch size 1 alone
batches = '1 4 16 64' # of bench: batch sizes
prompts = '1 512' # of bench: tokens to start from
repeats = 5 # of bench: timed runs, whose median counts
out_dir = '.' # where generation.json and generation.png go
readme = False # bench also writes README.md's table and picture
commit = '' # what the table says where git does not
device = 'auto' # cpu, cuda, cuda:1, mps, ...
dtype = 'auto' # float32, bfloat16 or float16
TK_kernel = 'auto' # True: both ways or an error; False: torch's attention alone; auto: the kernel where it can run
# -----------------------------------------------------------------------------
config = configure(globals(), auto={'TK_kernel': bool})
HERE = Path(__file__).resolve().parent
for _name in ('max_new_tokens', 'repeats'):
    if config[_name] < 1:
        sys.exit(f"--{_name} must be at least 1, not {config[_name]}")
for _name, _one, _like in (('sizes', r'[1-9]\d*x[1-9]\d*x[1-9]\d*', '24x16x1024 12x12x768'),
                          ('batches', r'[1-9]\d*', '1 4 16'), ('prompts', r'[1-9]\d*', '1 512')):
    if not re.fullmatch(rf'{_one}( {_one})*', config[_name]):
        sys.exit(f"--{_name} must be like {_like!r}, not {config[_name]!r}")
if not bench:
    check_init_from(init_from)
choose(config, for_training=False)
device, dtype = config['device'], config['dtype']
device_type = torch.device(device).type
if device_type == 'cuda' and why_no_step():
    print(f"each token takes longer than it could: {why_no_step()}", file=sys.stderr)
if bench: # what would end it after hours is said now
    make_folder(out_dir)
    try:
        shapes = {size: GPTConfig(**dict(zip(('n_layer', 'n_head', 'n_embd'), map(int, size.split('x')))),
                                  vocab_size=50257, gelu='tanh', TK_kernel=config['TK_kernel'])
                  for size in sizes.split()}
    except ValueError as e:
        sys.exit(f"--sizes={sizes}: {e}")
    if max(map(int, prompts.split())) + max_new_tokens // 2 + 10 > GPTConfig.block_size:
        sys.exit(f"--prompts={prompts} and half of --max_new_tokens={max_new_tokens} do not fit transformers' GPT-2, "
                 f"which takes {GPTConfig.block_size} tokens")
torch.set_float32_matmul_precision('high')
autocast = nullcontext() if dtype == 'float32' else torch.autocast(device_type, dtype=getattr(torch, dtype))


def seconds(call):
    """How long call() takes, the device's work included."""
    if device_type == 'cuda':
        torch.cuda.synchronize()
    began = time.perf_counter()
    with autocast:
        call()
    if device_type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - began


def use_kernel(model, use):
    for block in model.transformer.h:
        block.attn.TK_kernel = use


# -----------------------------------------------------------------------------
# the same text each way? how fast?

def compare():
    encode, decode, n_tokens = tokenizer({})
    try:
        model = GPT.from_pretrained(init_from).eval().to(device)
        prompt = encode(start)
    except (ValueError, OSError) as e:
        sys.exit(f"--init_from={init_from}: {e}")
    if not prompt or max(prompt) >= model.config.vocab_size:
        sys.exit(f"--start must hold tokens below the model's vocab_size={model.config.vocab_size}, got {prompt[:10]}")
    print(f"{init_from}: {model.get_num_params() / 1e6:.1f}M parameters, {len(prompt)} tokens to start from")
    if dtype != 'float32':
        model.cast_linears(getattr(torch, dtype)) # the head's copy is no parameter more

    def run(generate, kernel=False):
        """(the new tokens' ids, tokens per second) with the kernel or with torch's attention."""
        use_kernel(model, kernel)
        ids = []

        def write(n):
            text = generate(torch.tensor([prompt], device=device), n, temperature=0, n_tokens=n_tokens)
            ids[:] = text[0, len(prompt):].tolist()
        seconds(lambda: write(2)) # warm-up
        took_s = seconds(lambda: write(max_new_tokens))
        return ids, max_new_tokens / took_s

    results = {'plain loop': run(model.generate_plain), 'torch': run(model.generate)}
    if config['TK_kernel']:
        results['ThunderKittens'] = run(model.generate, kernel=True)
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


# -----------------------------------------------------------------------------
# tokens/s over the batch size

WAYS = THIS, PLAIN, HF = 'this', "nanoGPT's loop", 'transformers'
CHOICE = dict(temperature=0.8, top_k=200) # sample.py's
AWHILE = 8 # tokens of those that take minutes for all


def measure():
    """{'speeds': [{size, batch, prompt, and tokens/s of each of WAYS}], first_token_ms, cold_start_s}"""
    found = {'speeds': []}
    for size, shape in shapes.items():
        first_size = not found['speeds']
        torch.manual_seed(0)
        with torch.device(device):
            model = GPT(shape).eval()
        if first_size:
            plain = GPT.from_state_dict(replace(shape, TK_kernel=False), model.state_dict()).eval()
            ways = {PLAIN: plain.generate_plain, HF: transformers_gpt2(shape)}
        if dtype != 'float32':
            model.cast_linears(getattr(torch, dtype))
        for B in map(int, batches.split() if first_size else [1]):
            for T in map(int, prompts.split()):
                prompt = torch.randint(50257, (B, T), device=device)
                whole_s = median_s(model.generate, prompt, max_new_tokens)
                row = {'size': size, 'batch': B, 'prompt': T, THIS: B * max_new_tokens / whole_s}
                if first_size:
                    halfway = torch.randint(50257, (B, T + max_new_tokens // 2), device=device)
                    row |= {name: B / a_token_s(generate, halfway) for name, generate in ways.items()}
                found['speeds'].append(row)
                print(', '.join(f"{k} {v:,.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        if first_size:
            prompt = prompt[:1] # of the longest
            found |= {'first_token_prompt': T, 'first_token_ms': 1e3 * median_s(model.generate, prompt, 1),
                      'cold_start_s': cold_start_s(model)}
    return found


def median_s(generate, prompt, n, times=None):
    """Seconds of generate(prompt, n), the median of `repeats` after two: the first compiles, the second captures."""
    times_s = [seconds(lambda: generate(prompt, n, **CHOICE)) for _ in range(2 + (times or repeats))]
    return statistics.median(times_s[2:])


def a_token_s(generate, prompt):
    """Seconds a token takes after the first few."""
    few, times = 2, 3
    return (median_s(generate, prompt, few + AWHILE, times) - median_s(generate, prompt, few, times)) / AWHILE


def transformers_gpt2(shape):
    """generate(ids, n) of transformers' GPT-2 with weights in `dtype`."""
    import transformers
    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd)
    hf = transformers.GPT2LMHeadModel(config).eval().to(device, getattr(torch, dtype))
    return lambda ids, n, **choice: hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                                                min_new_tokens=n, do_sample=True, pad_token_id=0, **choice)


def cold_start_s(model):
    """Seconds from the start of a process to the first token, the model on the disk: sample.py's, read as it writes."""
    chars = [chr(0x10000 + i) for i in range(model.config.vocab_size)] # a tokenizer that is always there
    with tempfile.TemporaryDirectory() as folder:
        weights = {name: w.float().cpu() for name, w in model.state_dict().items()}
        torch.save({'model': weights, 'model_args': model.config.model_args(), 'gelu': model.config.gelu,
                    'tokenizer': {'vocab_size': len(chars), 'itos': dict(enumerate(chars)),
                                  'stoi': {c: i for i, c in enumerate(chars)}}}, Path(folder, 'ckpt.pt'))
        began = time.perf_counter()
        with subprocess.Popen([sys.executable, HERE / 'sample.py', f'--out_dir={folder}', f'--start={chars[0]}',
                               f'--device={device}', '--num_samples=1', '--max_new_tokens=9'], encoding='utf-8',
                              env={**os.environ, 'PYTHONIOENCODING': 'utf-8'}, stdout=subprocess.PIPE) as process:
            said = '' # before the text, which begins a line
            while not said.endswith('\n' + chars[0]) and (char := process.stdout.read(1)):
                said += char
            process.stdout.read(1)
            took_s = time.perf_counter() - began
            process.stdout.read()
        if process.returncode or not said.endswith('\n' + chars[0]):
            sys.exit(f"sample.py wrote no text, but {said[-500:]!r}")
        return took_s


def report(found):
    """The table, generation.json and generation.png in out_dir and, where asked for, the README's section."""
    where = (f"{torch.cuda.get_device_name() if device_type == 'cuda' else platform.machine()}, torch "
             f"{torch.__version__}, CUDA {torch.version.cuda}, transformers {version('transformers')}, {dtype}, commit "
             f"{commit or this_commit()}")
    lines = [f"{where}. {max_new_tokens} new tokens, temperature 0.8, top_k 200, random weights; tokens/s.", '',
             f"| layers x heads x channels | batch | prompt | {' | '.join(WAYS)} |", '|---' * (3 + len(WAYS)) + '|']
    for row in found['speeds']:
        cells = [f"{row[way]:,.0f}" if way in row else '-' for way in WAYS]
        lines.append(f"| {row['size']} | {row['batch']} | {row['prompt']} | {' | '.join(cells)} |")
    text = '\n'.join(lines) + (
        f"\n\n{THIS}: whole calls, prompt included, the median of {repeats} after two. The others: {AWHILE} tokens in "
        "the middle of the text, without the prompt, since they take minutes for all. First token of a prompt of "
        f"{found['first_token_prompt']}: {found['first_token_ms']:.1f} ms. From the start of a process to the first "
        f"token, the model on the disk: {found['cold_start_s']:.1f} s.")
    print(text)
    Path(out_dir, 'generation.json').write_text(json.dumps({'where': where, **found}, indent=1) + '\n')
    beside = 'ThunderKittens/examples/decode/generation.png'
    drawn = HERE / beside if readme else Path(out_dir, 'generation.png')
    picture([row for row in found['speeds'] if PLAIN in row], drawn)
    if readme:
        write_section(HERE / 'README.md', 'generation', f'{text}\n\n![tokens/s over the batch size]({beside})')
    print(json.dumps(found))


def picture(rows, path):
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for prompt, style in zip(dict.fromkeys(row['prompt'] for row in rows), ('-', '--', ':')):
        for way, color in zip(WAYS, ('C0', 'C1', 'C2')):
            points = [(row['batch'], row[way]) for row in rows if row['prompt'] == prompt]
            axes.plot(*zip(*points), style, color=color, marker='o', ms=4, label=f"{way}, prompt {prompt}")
    axes.set(xscale='log', yscale='log', xlabel='batch size', ylabel='tokens/s', title=f"GPT-2 of {rows[0]['size']}")
    axes.set_xticks([row['batch'] for row in rows], [str(row['batch']) for row in rows])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
    figure.savefig(path, dpi=110, bbox_inches='tight')
    pyplot.close(figure)


if bench:
    report(measure())
else:
    compare()
