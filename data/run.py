"""
What a run leaves in out_dir.

    ckpt.pt     nanoGPT's file: a dict with model, optimizer, model_args, iter_num, best_val_loss and config;
                what is ours stands beside these keys, and nanoGPT does not look at it
    log.csv     a row for every line that train.py prints
    loss.png    the loss curves so far

A file is written whole or not at all, and read without running anything that it holds.
"""
import csv
import os
import pickle
import sys
import zipfile
from pathlib import Path

import torch


def write_checkpoint(checkpoint, path):
    """
    Write aside, then rename, so that whenever the process is killed `path` holds a whole checkpoint.
    Returns '' or, where the disk refused, the reason in a few words; what was at `path` is then still there.
    """
    part = Path(f'{path}.part')
    try:
        with open(part, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        return ''
    except (OSError, RuntimeError) as e: # torch.save turns a full disk into a RuntimeError
        try:
            part.unlink(missing_ok=True)
        except OSError:
            pass # the folder went read-only: the half-written file bears another name and harms nobody
        return getattr(e, 'strerror', None) or str(e).splitlines()[0]


def read_checkpoint(path):
    """The dict in a ckpt.pt of ours or nanoGPT's, on the CPU; SystemExit with one line if there is no whole one."""
    try:
        return torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        sys.exit(f"{path}: no checkpoint there; train first, or name another --out_dir")
    except OSError as e:
        sys.exit(f"{path}: {e.strerror}")
    except pickle.UnpicklingError as e:
        sys.exit(f"{path}: damaged, or it holds more than weights and plain values ({str(e).splitlines()[0]})")
    except (RuntimeError, EOFError, ValueError, KeyError) as e:
        sys.exit(f"{path}: damaged ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'it ends early'})")


class RunLog:
    """
    log.csv, loss.png and, if asked for, wandb. A disk or a network that refuses is a warning, and the run goes on.

    out_dir     the folder; it exists
    first_step  rows of an earlier run up to this step are kept, 0 starts anew
    title       of the picture
    say         prints a line
    """
    FIELDS = ('step', 'train_loss', 'val_loss', 'loss', 'lr', 'time_ms', 'tokens_per_s', 'mfu', 'elapsed_s')

    def __init__(self, out_dir, first_step, title, say):
        self.csv_path, self.png_path = Path(out_dir, 'log.csv'), Path(out_dir, 'loss.png')
        self.title, self.say, self.wandb_run, self.warned = title, say, None, set()
        self.rows = self._read(first_step) if first_step else []
        self._write('w', [dict(zip(self.FIELDS, self.FIELDS)), *self.rows])

    def _read(self, first_step):
        if not self.csv_path.exists():
            return []
        with open(self.csv_path, newline='', encoding='utf-8', errors='replace') as f:
            rows = [{k: row.get(k) for k in self.FIELDS} for row in csv.DictReader(f)]
        return [row for row in rows if (row['step'] or '').isdigit() and int(row['step']) <= first_step]

    def _write(self, mode, rows):
        try:
            with open(self.csv_path, mode, newline='') as f:
                csv.DictWriter(f, self.FIELDS).writerows(rows)
        except OSError as e:
            self._warn(f"{self.csv_path}: {e.strerror}")

    def _warn(self, line):
        if line not in self.warned: # once
            self.say(f"warning: {line}")
            self.warned.add(line)

    def start_wandb(self, project, name, config):
        try:
            import wandb
        except ImportError:
            return self._warn("no wandb log, the package is not installed; log.csv has it all")
        try:
            settings = wandb.Settings(init_timeout=20, login_timeout=20)
            self.wandb_run = wandb.init(project=project, name=name, config=config, settings=settings)
        except wandb.Error as e:
            self._warn(f"no wandb log ({str(e).splitlines()[0]}); log.csv has it all")

    def add(self, row):
        """One row, a dict of some of FIELDS."""
        self.rows.append(row)
        self._write('a', [row])
        if self.wandb_run:
            self.wandb_run.log({k: v for k, v in row.items() if v is not None}, step=row['step'])

    def draw(self):
        """loss.png: the curves so far."""
        try:
            import matplotlib
        except ImportError:
            return self._warn("no loss.png, matplotlib is not installed")
        matplotlib.use('Agg')
        from matplotlib import pyplot
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for field, label, style in (('loss', 'batch', dict(alpha=0.3)), ('train_loss', 'train', dict(marker='o', ms=3)),
                                    ('val_loss', 'val', dict(marker='o', ms=3))):
            points = [(int(row['step']), float(row[field])) for row in self.rows if row.get(field) not in (None, '')]
            if points:
                axes.plot(*zip(*points), label=label, **style)
        axes.set(xlabel='step', ylabel='loss (nats per token)', title=self.title)
        axes.legend()
        try:
            figure.savefig(self.png_path, dpi=120, bbox_inches='tight')
        except OSError as e:
            self._warn(f"{self.png_path}: {e.strerror}")
        pyplot.close(figure)

    def finish(self):
        if self.wandb_run:
            self.wandb_run.finish()
