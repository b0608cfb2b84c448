"""
Runs side by side: their loss curves in one picture, and in a table how far they differ and how far seeds do.

    python data/curves.py out-shakespeare-char
    python data/curves.py plain=out-1,out-2,out-3 fast=out-4,out-5,out-6 --goal=1.475 --readme=fast

A group is NAME=out_dir[,out_dir...], runs of the same settings with different seeds, in the same order in every group.

--out=FILE        the picture; default loss.png, or data/curves_SECTION.png with --readme
--title=TEXT      of the picture
--goal=LOSS       also the time from the start of the process to the first evaluation with such a val loss
--readme=SECTION  table and picture also go into README.md, between <!-- curves SECTION begin --> and ... end -->
--commit=HASH     of the runs, where they could not find it out themselves
"""
import csv
import os
import re
import statistics
import sys
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 20 # steps that are averaged: single batches differ more than runs do
FLAGS = ('out', 'title', 'goal', 'readme', 'commit')


class Run(NamedTuple):
    machines: list # what it ran on, a line each
    losses: dict # mean loss of the batches by window, of WINDOW steps each
    evaluations: list # (step, val loss, seconds since the start), in this order
    elapsed_s: dict # when a window ended


# -----------------------------------------------------------------------------
# runs

def read_run(out_dir, commit):
    """The Run that train.py left in out_dir; SystemExit with one line where there is none."""
    batches, evaluations, elapsed_s = {}, [], {}
    try:
        with open(Path(out_dir, 'log.csv'), newline='', encoding='utf-8') as f:
            for row in csv.DictReader(f):
                step, seconds = int(row['step']), float(row['elapsed_s'])
                if row['loss']:
                    batches.setdefault(step // WINDOW, []).append(float(row['loss']))
                    elapsed_s[step // WINDOW] = seconds
                if row['val_loss']:
                    evaluations.append((step, float(row['val_loss']), seconds))
    except OSError as e:
        sys.exit(f"{out_dir}/log.csv: {e.strerror}; a group is NAME=out_dir[,out_dir...] of train.py")
    except (KeyError, TypeError, ValueError) as e:
        sys.exit(f"{out_dir}/log.csv: not a log of train.py's ({type(e).__name__}: {e})")
    if not (batches or evaluations):
        sys.exit(f"{out_dir}/log.csv: no loss there yet")
    try:
        machines = Path(out_dir, 'machine.txt').read_text(encoding='utf-8').splitlines()
    except OSError:
        machines = ["step 0: a machine that is not known, commit unknown"]
    machines = [line.partition(': ')[2] for line in machines]
    if commit:
        machines = [re.sub(r'commit unknown$', f'commit {commit}', line) for line in machines]
    full = max(map(len, batches.values()), default=0) # the last window may have ended early
    losses = {w: statistics.fmean(rows) for w, rows in batches.items() if len(rows) == full}
    return Run(machines, losses, evaluations, elapsed_s)


def best(run):
    """(step, val loss, seconds) of the lowest val loss."""
    return min(run.evaluations, key=lambda e: e[1])


def first_below(run, goal):
    """(step, val loss, seconds) of the first evaluation with a val loss of at most `goal`, or None."""
    return next((e for e in run.evaluations if e[1] <= goal), None)


def distance(pairs):
    """(mean, maximum) of |A - B| over all pairs of runs and the windows that both logged; None where there are none."""
    off = [abs(a.losses[w] - b.losses[w]) for a, b in pairs for w in a.losses.keys() & b.losses.keys()]
    return (statistics.fmean(off), max(off)) if off else None


# -----------------------------------------------------------------------------
# what is said of them

def tables(groups, goal):
    """The lines of the tables for {name: [Run, ...]}, as Markdown."""
    lines = []
    if all(run.evaluations for runs in groups.values() for run in runs):
        lines += ['| | best val loss of each seed | median |' + f' to a val loss of {goal:g} | median |' * bool(goal),
                  '|---|---|---|' + '---|---|' * bool(goal)]
        for name, runs in groups.items():
            cells = [name, '; '.join(f"{loss:.4f} (step {step}, {s:.0f} s)" for step, loss, s in map(best, runs)),
                     f"{statistics.median(best(run)[1] for run in runs):.4f}"]
            if goal:
                found = [first_below(run, goal) for run in runs]
                cells += ['; '.join(f"{e[2]:.1f} s (step {e[0]})" if e else 'never' for e in found),
                          f"{statistics.median(e[2] for e in found):.1f} s" if all(found) else '-']
            lines.append(f"| {' | '.join(cells)} |")
    compared = [(f"{a} and {b}, same seed", list(zip(groups[a], groups[b]))) for a, b in combinations(groups, 2)]
    compared += [(f"two seeds of {name}", list(combinations(runs, 2))) for name, runs in groups.items()]
    rows = [(what, pairs, distance(pairs)) for what, pairs in compared]
    if any(off for _, _, off in rows):
        lines += [''] * bool(lines)
        lines += [f'| difference of the loss, means of {WINDOW} steps | pairs | mean | maximum |', '|---|---|---|---|']
        lines += [f"| {what} | {len(pairs)} | {off[0]:.4f} | {off[1]:.4f} |" for what, pairs, off in rows if off]
    return lines


def draw(groups, title, path):
    """The picture: a colour a group, a thin line a seed; by the step, and by the time since the process started."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for i, (name, runs) in enumerate(groups.items()):
        for j, run in enumerate(runs):
            label = name if j == 0 else None # once in the legend, at the line that is seen best
            windows = sorted(run.losses)
            losses = [run.losses[w] for w in windows]
            by_step, by_time = [(w + 0.5) * WINDOW for w in windows], [run.elapsed_s[w] for w in windows]
            evaluated = [(e[0], e[2], e[1]) for e in run.evaluations]
            for axes, x, column in ((panels[0], by_step, 0), (panels[1], by_time, 1)):
                axes.plot(x, losses, color=f'C{i}', lw=0.7, alpha=0.4 if evaluated else 0.9,
                          label=None if evaluated else label)
                axes.plot([e[column] for e in evaluated], [e[2] for e in evaluated], color=f'C{i}', lw=1, marker='o',
                          ms=2.5, label=label if evaluated else None)
    panels[0].set(xlabel='step', ylabel='loss (nats per token)', title=title)
    panels[1].set(xlabel='seconds since the start', title=f'dots: val; lines: batches, {WINDOW} steps a point')
    panels[0].legend()
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except OSError as e:
        sys.exit(f"--out={path}: {e.strerror}")
    except ValueError as e: # a format that it does not know
        sys.exit(f"--out={path}: {str(e).splitlines()[0]}")
    pyplot.close(figure)


def write_section(path, name, text):
    """Put the text between the lines <!-- NAME begin --> and <!-- NAME end -->; SystemExit where they are not there."""
    marks = f'<!-- {name} begin -->\n', f'<!-- {name} end -->\n'
    before, begin, rest = path.read_text(encoding='utf-8').partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not (begin and end):
        sys.exit(f"{path.name} must hold the lines {marks[0].strip()} and {marks[1].strip()}, where the table belongs")
    path.write_text(before + begin + text + '\n' + end + after, encoding='utf-8')


def read_arguments(argv):
    """({name: [out_dir, ...]}, {flag: text}) of the command line; SystemExit with one line for a mistake."""
    groups, flags = {}, dict.fromkeys(FLAGS, '')
    for arg in argv:
        key, equals, value = arg.partition('=')
        if arg.startswith('--'):
            if key[2:] not in FLAGS or not value:
                sys.exit(f"{arg}: write one of {', '.join(f'--{flag}=...' for flag in FLAGS)}, or NAME=out_dir")
            flags[key[2:]] = value
        else:
            name, dirs = (key, value) if equals else (Path(arg).name, arg)
            if not all((name, *dirs.split(','))):
                sys.exit(f"{arg}: a group is NAME=out_dir[,out_dir...]")
            if name in groups:
                sys.exit(f"{arg}: there is a group {name!r} already; its seeds go into one, NAME=out_dir,out_dir")
            groups[name] = dirs.split(',')
    if not groups:
        sys.exit("which runs? python data/curves.py NAME=out_dir[,out_dir...] ...")
    counts = {name: len(dirs) for name, dirs in groups.items()}
    if len(set(counts.values())) > 1:
        sys.exit(f"every group must have the same seeds in the same order, but they hold {counts} runs")
    try:
        flags['goal'] = float(flags['goal'] or 0)
    except ValueError:
        sys.exit(f"--goal must be a loss, like 1.475, not {flags['goal']!r}")
    return groups, flags


def main(argv):
    groups, flags = read_arguments(argv)
    section, readme = flags['readme'], ROOT / 'README.md'
    runs = {name: [read_run(out_dir, flags['commit']) for out_dir in dirs] for name, dirs in groups.items()}
    picture = Path(flags['out'] or (ROOT / 'data' / f'curves_{section}.png' if section else 'loss.png'))
    machines = dict.fromkeys(line for group in runs.values() for run in group for line in run.machines)
    text = '\n'.join([*tables(runs, flags['goal']), '', f"On {'; '.join(machines)}."])
    print(text)
    draw(runs, flags['title'] or ' and '.join(runs), picture)
    print(f"picture: {picture}")
    if section:
        link = Path(os.path.relpath(picture.resolve(), ROOT)).as_posix()
        write_section(readme, f'curves {section}', f"{text}\n\n![loss curves of {' and '.join(runs)}]({link})")


if __name__ == '__main__':
    main(sys.argv[1:])
