"""
The training step beside plain nanoGPT, shape by shape: each row is a bench.py in a process of its own.

    python -m ThunderKittens.examples.gpt2_step.bench [--sizes=124M,medium,large,xl] [--out=FOLDER] [--readme]

Prints a table, leaves gpt2_step.json and gpt2_step.png (where a step's time goes) in FOLDER, and with --readme
writes the table into README.md, after each shape. Shapes that gpt2_step.json holds of the same commit are not timed
again, so that what was interrupted goes on. A row of plain nanoGPT comes before its shape's others, on the same card
in the same run; its torch.compile, which takes a minute, is done for all shapes of 124M side by side beforehand.
"""
import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import torch

from data.bins import make_folder
from data.curves import write_section
from data.run import commit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SIZES = {'124M': (12, 12, 768), 'medium': (24, 16, 1024), 'large': (36, 20, 1280), 'xl': (48, 25, 1600)}
SHAPES = [('124M', 16, 1024), ('124M', 12, 1024), ('124M', 64, 1024), ('124M', 4, 4096), # batch, block
          ('medium',), ('large',), ('xl',)] # at the largest batches that fit
FIRST_TRY = {'medium': (60, 144), 'large': (32, 68), 'xl': (16, 28)} # batches at block 1024: plain's and ours
PLAIN_makes = 430_000 # at least, under torch.compile with torch's best attention
WAYS = {'plain': ['--plain=True'], 'fast': [], 'fast, bfloat16 residual': ['--residual=bfloat16']}


def run(size, way, B, T, *more):
    """bench.py's JSON line of one row, {} where the memory does not suffice; SystemExit with its words if it failed."""
    n_layer, n_head, n_embd = SIZES[size]
    command = [sys.executable, 'bench.py', f'--batch_size={B}', f'--block_size={T}', f'--n_layer={n_layer}',
               f'--n_head={n_head}', f'--n_embd={n_embd}', '--real_data=False', '--dataset=none', *WAYS[way], *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode and 'out of memory' in done.stderr:
        return {}
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr.strip()[-2000:]}")
    found = {'size': size, 'way': way, **json.loads(done.stdout.splitlines()[-1])}
    if not more:
        print(f"{size} {B} x {T}, {way}: {found['ms_median']:.2f} ms, {found['tokens_per_s']:,} tokens/s, "
              f"MFU {found['mfu'] or 0:.1%}, {found['peak_gib']:.1f} GiB", flush=True)
    return found


def compile_ahead(shapes):
    """torch.compile of the plain rows, side by side, into its cache on the disk."""
    running = [subprocess.Popen([sys.executable, 'bench.py', '--plain=True', f'--batch_size={B}', f'--block_size={T}',
                                 '--real_data=False', '--dataset=none', '--steps=1', '--warmup=1'], cwd=ROOT,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
               for size, B, T in (shape for shape in shapes if len(shape) == 3)]
    for process in running:
        process.wait()


def largest(size, way, B):
    """The row of the largest batch, a multiple of 4, that fits: from B on, up till one does not, or down by 4."""
    best, too_large = {}, math.inf
    while 4 <= B < too_large:
        found = run(size, way, B, 1024)
        if found:
            best = found
            surely = int(B * (76 / found['peak_gib'] - 1)) # more fit: memory grows no faster than the batch
            B += max(4, surely // 4 * 4)
        elif best:
            return best
        else:
            too_large = B
            B -= 4
    return best or sys.exit(f"{size}, {way}: not even a batch of 4 fits")


def measure(shape):
    """The rows of a shape of SHAPES, as a list."""
    size, *tokens = shape
    if tokens:
        ways = WAYS if tokens in ([16, 1024], [64, 1024]) else ('plain', 'fast')
        return [run(size, way, *tokens) for way in ways]
    plains, ours = FIRST_TRY[size]
    plain = largest(size, 'plain', plains)
    return [plain, run(size, 'fast', plain['batch_size'], 1024), largest(size, 'fast', ours)]


def measured(path, of):
    """{shape: its rows} of an earlier run at the commit `of`, from its JSON; none where files differ from a commit."""
    if not path.exists() or of == 'unknown' or of.endswith('+'):
        return {}
    found = {}
    for row in json.loads(path.read_text(encoding='utf-8')):
        if row['commit'] == of:
            shape = ('124M', row['batch_size'], row['block_size']) if row['size'] == '124M' else (row['size'],)
            found.setdefault(shape, []).append(row)
    return found


def table(rows):
    first, cards = rows[0], ', '.join(sorted({row['card'] for row in rows}))
    lines = [f"{cards}, torch {first['torch']}, CUDA {first['cuda']}, commit {first['commit']}; bfloat16, "
             "random tokens, medians of 20 steps; MFU by nanoGPT's formula.", '',
             '| GPT-2 | B x T | | ms | tokens/s | MFU | GiB | to plain |', '|---|---|---|---|---|---|---|---|']
    plain, slow = {}, False
    for row in rows:
        tokens = row['batch_size'], row['block_size']
        if row['way'] == 'plain':
            plain[row['size'], tokens[1]] = row['tokens_per_s']
            plain[row['size'], tokens] = row['tokens_per_s']
        mfu = f"{row['mfu']:.1%}" if row['mfu'] else '-' # of a card whose peak is not known
        peer = plain.get((row['size'], tokens), plain[row['size'], tokens[1]])
        lines.append(f"| {row['size']} | {tokens[0]} x {tokens[1]} | {row['way']} | {row['ms_median']:.2f} | "
                     f"{row['tokens_per_s']:,} | {mfu} | {row['peak_gib']:.1f} | "
                     f"{row['tokens_per_s'] / peer:.2f} |")
        if (row['card'], row['size'], row['way'], tokens) == ('NVIDIA H100 80GB HBM3', '124M', 'plain', (16, 1024)) \
                and row['tokens_per_s'] < PLAIN_makes:
            slow = True
    if slow:
        lines += ['', f"Plain nanoGPT makes {PLAIN_makes:,} tokens/s at 16 x 1024 on such a card: no measure here"]
    return '\n'.join(lines)


def picture(rows, path):
    """A stacked bar for each row of 124M: where the milliseconds of a step go."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    rows = [row for row in rows if row['size'] == '124M' and row['parts_ms']][::-1]
    kinds = sorted({kind for row in rows for kind in row['parts_ms']}, key=lambda kind: (kind == 'idle', kind))
    figure, axis = plt.subplots(figsize=(11, 1 + 0.45 * len(rows)))
    names = [f"{row['batch_size']} x {row['block_size']}, {row['way']}" for row in rows]
    left = [0.0] * len(rows)
    for i, kind in enumerate(kinds):
        ms = [row['parts_ms'].get(kind, 0) * 16384 / (row['batch_size'] * row['block_size']) for row in rows]
        axis.barh(names, ms, left=left, label=kind, color=plt.get_cmap('tab10')(i))
        left = [at + more for at, more in zip(left, ms)]
    axis.set_xlabel('ms for 16,384 tokens')
    axis.legend(ncols=4, loc='lower center', bbox_to_anchor=(0.45, 1.0), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save(found, out, readme):
    """JSON, picture and, where asked for, the README's table of {shape: its rows}; the table, as text."""
    rows = [row for shape in SHAPES for row in found.get(shape, [])]
    text = table(rows)
    (out / 'gpt2_step.json').write_text(json.dumps(rows, indent=1), encoding='utf-8')
    drawn = (HERE if readme else out) / 'gpt2_step.png'
    if rows[0]['size'] == '124M':
        picture(rows, drawn)
    if readme:
        write_section(ROOT / 'README.md', 'step', f"{text}\n\n![where a step's time goes]({drawn.relative_to(ROOT)})")
    return text


def main():
    parser = argparse.ArgumentParser(description='the training step beside plain nanoGPT')
    parser.add_argument('--sizes', default='124M')
    parser.add_argument('--out', default=str(HERE))
    parser.add_argument('--readme', action='store_true', help='write the table and the picture into README.md')
    parser.add_argument('--commit', default='', help='of the tree, where git is not at hand')
    options = parser.parse_args()
    make_folder(options.out)
    sizes = options.sizes.split(',')
    for size in sizes:
        if size not in SIZES:
            sys.exit(f"--sizes takes {', '.join(SIZES)}, not {size!r}")
    at, out = options.commit or commit(), Path(options.out)
    found = measured(out / 'gpt2_step.json', at)
    wanted = [shape for shape in SHAPES if shape[0] in sizes and shape not in found]
    if wanted and not torch.cuda.is_available():
        sys.exit("no CUDA device: a CPU would take hours; bench.py times one small shape anywhere")
    if found:
        print(f"{len(found)} shapes of commit {at} are in {out / 'gpt2_step.json'}: not timed again")
    compile_ahead(wanted)
    for shape in wanted:
        found[shape] = [{**row, 'commit': at} for row in measure(shape)]
        save(found, out, options.readme)
    print(save(found, out, options.readme))


if __name__ == '__main__':
    main()
