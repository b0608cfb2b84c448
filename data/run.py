"""
What a run leaves in out_dir, and how it is read again.

    ckpt.pt         nanoGPT's file, and what sample.py reads: the best, or the latest with always_save_checkpoint
    best.pt         the lowest val loss so far
    last-STEP.pt    the newest few, to go on from; they and the two above share their bytes on the disk
    log.csv         a row for every line that train.py prints
    machine.txt     a line for every start: the step, the card, the versions, the commit
    loss.png        the loss curves so far

A run that begins anew in an old one's folder starts log.csv again, and its first checkpoint takes the place of those
that the old one left. They move to earlier/: in the place of what was there if one of them was a ckpt.pt, else beside
it. At no moment do the checkpoints of two runs stand in one folder: a restart goes on from its own or not at all.

A checkpoint is a dict with nanoGPT's model, optimizer, model_args, iter_num, best_val_loss and config; what is
ours stands beside these keys, and nanoGPT does not look at it. A file is written whole or not at all, checked
when it is read, and read without running anything that it holds.
"""
import csv
import json
import os
import pickle
import platform
import subprocess
import sys
import threading
import time
import warnings
import zipfile
import zlib
from itertools import accumulate
from pathlib import Path

try:
    import fcntl
except ImportError: # Windows
    fcntl = None

import torch
import torch.distributed as dist

from configurator import choose
from data.tokens import read_meta
from model import GPT


PINNED_bytes = 32 << 20 # of host memory that a GPU writes to directly
FIRST_PICTURE_after_s = 20 # of a run: the first one takes a second, for matplotlib is loaded for it


class Checkpoints:
    """
    Writes checkpoints beside the training: save() takes a copy and returns, a thread writes it.

    out_dir    the folder; it exists
    keep_last  how many last-STEP.pt stay
    say        prints a line
    anew       whether the run began anew: then its first checkpoint takes the place of what an earlier run left here
    newest     path of the newest last-STEP.pt that is on the disk, None until then
    """

    def __init__(self, out_dir, keep_last, say, anew):
        self.out_dir, self.keep_last, self.say, self.thread = Path(out_dir), keep_last, say, None
        self.others = [path for path in _checkpoints_in(self.out_dir) if anew and path.exists()]
        self.newest, self.said_no_room = None, False
        on_gpu = torch.cuda.is_initialized() # pinned here: to ask for it later would stop what runs on the GPU
        self.pinned = torch.empty(PINNED_bytes, dtype=torch.uint8, pin_memory=True) if on_gpu else None
        try:
            for part in self.out_dir.glob('*.part'): # a run was killed while it wrote
                part.unlink(missing_ok=True)
        except OSError as e:
            say(f"warning: {part} of a run that was killed stays ({e.strerror})")

    def save(self, checkpoint, names):
        """Copy the checkpoint as it is now, and write it as last-STEP.pt and under each of `names`."""
        self.wait() # two at a time would only share the disk
        copied, arrived, had_room = _copy(checkpoint)
        if not (had_room or self.said_no_room):
            self.say("the GPU has no room for a copy of the checkpoint: training waits while one goes to the host")
            self.said_no_room = True
        self.thread = threading.Thread(target=self._write, args=(copied, arrived, names))
        self.thread.start()

    def wait(self):
        """Until the checkpoint that is being written, if any, is on the disk."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def _write(self, checkpoint, arrived, names):
        last = self.out_dir / f"last-{checkpoint['iter_num']:08d}.pt"
        try:
            self._set_aside()
            _replace(last, lambda part: self._take_the_place(_to_host(checkpoint, arrived, self.pinned), part))
            self.newest = last
            for name in names:
                _replace(self.out_dir / name, lambda part: _link(last, part))
            self._forget_all_but(last)
        except (OSError, RuntimeError) as e: # torch.save turns a full disk into a RuntimeError
            reason = getattr(e, 'strerror', None) or str(e).splitlines()[0]
            self.say(f"warning: no checkpoint at step {checkpoint['iter_num']} ({reason}); the earlier ones are whole")

    def _set_aside(self):
        """
        A second name in earlier/ for what an earlier run left here. If a model is among it, it takes the place of what
        was there; if the run had got to no evaluation yet, it goes beside that, under names that nothing else has.
        """
        self.others, folder = [path for path in self.others if path.exists()], self.out_dir / 'earlier'
        has_model = any(path.name == 'ckpt.pt' for path in self.others)
        new = {folder / (path.name if has_model else f'{path.stem}-{path.stat().st_mtime_ns}.pt'): path
               for path in self.others}
        if new:
            folder.mkdir(exist_ok=True)
        for name, path in new.items():
            _replace(name, lambda part, path=path: _link(path, part))
        for path in {*_checkpoints_in(folder)} - {*new} if has_model else ():
            path.unlink(missing_ok=True)

    def _take_the_place(self, checkpoint, part):
        """Write `part`, which is renamed next, and only then unlink what an earlier run left here."""
        _torch_save(checkpoint, part)
        for path in self.others:
            path.unlink(missing_ok=True)
        if self.others:
            self.say(f"the checkpoints of an earlier run here are in {self.out_dir / 'earlier'} now")
        self.others = []

    def _forget_all_but(self, last):
        """Unlink the oldest, and what would be taken for newer than `last` but was passed over."""
        lasts = sorted(self.out_dir.glob('last-*.pt'))
        n = lasts.index(last) + 1
        for path in lasts[:n][:-self.keep_last] + lasts[n:]:
            path.unlink(missing_ok=True)


def _replace(path, write):
    """Write aside, then rename: whenever the process is killed, `path` is whole, the old one or the new one."""
    part = path.with_name(path.name + '.part')
    try:
        part.unlink(missing_ok=True)
        write(part)
        os.replace(part, path)
        part.unlink(missing_ok=True) # two names of one file: the rename did nothing
    except (OSError, RuntimeError):
        try:
            part.unlink(missing_ok=True)
        except OSError:
            pass # the folder went read-only: the half-written file bears another name and harms nobody
        raise


def _torch_save(checkpoint, path):
    with open(path, 'wb') as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())


def _link(source, path):
    """A second name for the same bytes; a copy where the file system has no such thing."""
    try:
        os.link(source, path)
    except OSError:
        path.write_bytes(source.read_bytes())


def _map_tensors(value, f):
    if isinstance(value, torch.Tensor):
        return f(value)
    if isinstance(value, dict):
        return {k: _map_tensors(v, f) for k, v in value.items()}
    return [_map_tensors(v, f) for v in value] if isinstance(value, list) else value


def _copy(checkpoint):
    """
    The checkpoint with copies of its tensors, all those of a GPU side by side in one piece of its memory: a second
    copy there takes a millisecond a gigabyte, the way to the host hundreds.

    returns  (checkpoint, event, had_room): on a GPU the copies are complete after the event, elsewhere it is None; a
             GPU without room for them has them on the host at once
    """
    tensors = {} # tied weights stay tied
    _map_tensors(checkpoint, lambda t: tensors.setdefault(_place(t), t.detach()))
    on_gpu = {place: t for place, t in tensors.items() if t.is_cuda}
    ends = list(accumulate(-t.nbytes % 16 + t.nbytes for t in on_gpu.values())) # each begins where any dtype may
    had_room = not on_gpu or torch.cuda.mem_get_info()[0] > 1.1 * ends[-1]
    copies = {place: t.cpu() if t.is_cuda else t.clone() for place, t in tensors.items()
              if not (had_room and t.is_cuda)}
    event = None
    if on_gpu and had_room:
        memory = torch.empty(ends[-1], dtype=torch.uint8, device=next(iter(on_gpu.values())).device)
        for (place, t), start in zip(on_gpu.items(), [0, *ends]):
            copies[place] = memory[start:start + t.nbytes].view(t.dtype).view(t.shape)
        torch._foreach_copy_([copies[place] for place in on_gpu], list(on_gpu.values()))
        event = torch.cuda.current_stream().record_event()
    return _map_tensors(checkpoint, lambda t: copies[_place(t)]), event, had_room


def _place(t):
    """What two tensors that are the same one have in common."""
    return t.device, t.data_ptr(), t.dtype, t.shape, t.stride()


def _to_host(checkpoint, event, pinned):
    """
    The checkpoint on the host, for the thread that writes it. On a stream of its own and by way of pinned memory, or
    the driver would keep the training from launching its kernels until the last byte is there.
    """
    if event is None:
        return checkpoint
    on_host = {}

    def move(t):
        if t.is_cuda and _place(t) not in on_host:
            on_host[_place(t)] = host = torch.empty(t.shape, dtype=t.dtype)
            for source, target in zip(_as_bytes(t).split(len(pinned)), _as_bytes(host).split(len(pinned))):
                pinned[:len(source)].copy_(source, non_blocking=True)
                stream.synchronize()
                target.numpy()[:] = pinned[:len(source)].numpy() # by one core: torch's copy would take them all
        return on_host[_place(t)] if t.is_cuda else t
    stream = torch.cuda.Stream(event.device)
    with torch.cuda.stream(stream):
        event.wait()
        return _map_tensors(checkpoint, move)


def _as_bytes(t):
    return t.reshape(-1).view(torch.uint8)


_locked = None # the folder that this process holds, open: the lock ends with the process, however that ends


def lock(out_dir, say):
    """
    Keep other runs from writing to out_dir, which exists: a killed torchrun may leave its processes behind. SystemExit
    with one line where one does; where the system cannot tell, a warning. The folder that was locked before is let go,
    which is all where out_dir is None.
    """
    global _locked
    before, _locked = _locked, None
    if before is not None:
        os.close(before)
    if out_dir is None:
        return
    try:
        if fcntl is None:
            raise OSError(0, "this system has no flock")
        _locked = os.open(out_dir, os.O_RDONLY)
        fcntl.flock(_locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"--out_dir={out_dir}: another run is writing there; end its processes, or name another folder")
    except OSError as e:
        say(f"warning: nothing keeps a second run from writing to {out_dir} ({e.strerror})")


def _checkpoints_in(folder):
    return [folder / 'ckpt.pt', folder / 'best.pt', *folder.glob('last-*.pt')]


def newest_checkpoint(out_dir, say):
    """
    The newest whole checkpoint in out_dir, to go on from; damaged ones are named and passed over.
    SystemExit with one line where there is none.
    """
    found = []
    for path in _checkpoints_in(Path(out_dir)):
        try:
            checkpoint = load_checkpoint(path)
            step = checkpoint.get('iter_num')
            if type(step) is not int or step < 0:
                raise ValueError(f"its iter_num is {str(step)[:20]}")
            found.append((step, path.name, checkpoint))
        except FileNotFoundError:
            pass
        except ValueError as e:
            say(f"warning: {path} is not a whole checkpoint ({e}); it is passed over")
    for step, name, checkpoint in sorted(found, key=lambda entry: entry[:2], reverse=True):
        why_not = _why_damaged(Path(out_dir, name))
        if not why_not:
            return checkpoint
        say(f"warning: {out_dir}/{name} of step {step} is damaged ({why_not}); it is passed over")
    sys.exit(f"{out_dir}: no whole checkpoint there; train first, or name another --out_dir")


def read_checkpoint(path):
    """The dict in a ckpt.pt of ours or nanoGPT's, on the CPU; SystemExit with one line if there is no whole one."""
    try:
        checkpoint = load_checkpoint(path)
    except FileNotFoundError:
        hint = "train first, or name another --out_dir"
        if any(path.parent.glob('last-*.pt')):
            hint = "but a run that was stopped before its first: --init_from=resume of train.py goes on with it"
        elif (path.parent / 'earlier' / path.name).exists():
            hint = f"but in {path.parent / 'earlier'}, of an earlier run"
        sys.exit(f"{path}: no checkpoint there; {hint}")
    except ValueError as e:
        sys.exit(f"{path}: {e}")
    why_not = _why_damaged(path)
    return sys.exit(f"{path}: damaged ({why_not})") if why_not else checkpoint


def check_init_from(init_from, *more):
    """SystemExit with one line where it is neither one of `more` nor a GPT-2: nothing is looked for in the network."""
    allowed = [*more, 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl']
    if init_from not in allowed and not Path(init_from).is_dir():
        sys.exit(f"--init_from must be {', '.join(allowed)} or a folder in transformers' format, not {init_from!r}")


def load_model(config):
    """
    The model that a script's settings name, for inference, and how its tokens are read.

    config   with init_from, out_dir, device, dtype, TK_kernel; what is 'auto' in it is chosen here
    returns  (GPT in eval mode on the CPU, meta for data.tokens.tokenizer)
    raises   SystemExit with one line where there is no such model
    """
    init_from, resume = config['init_from'], config['init_from'] == 'resume'
    check_init_from(init_from, 'resume')
    checkpoint = read_checkpoint(Path(config['out_dir'], 'ckpt.pt')) if resume else {}
    config.update(known_heads(init_from, checkpoint))
    choose(config, for_training=False)
    ours = dict(dropout=0.0, TK_kernel=config['TK_kernel'])
    try:
        model = GPT.from_checkpoint(checkpoint, **ours) if resume else GPT.from_pretrained(init_from, ours)
    except (ValueError, OSError) as e:
        sys.exit(f"--init_from={init_from}: {e}")
    return model.eval(), how_read(checkpoint) if resume else {}


def how_read(checkpoint):
    """The meta of a checkpoint's tokens; one of nanoGPT's own has none: the data set that it names says it."""
    meta = checkpoint.get('tokenizer')
    if meta is not None:
        return meta
    dataset = Path('data', str(checkpoint.get('config', {}).get('dataset', '')))
    meta, vocab_size = read_meta(dataset), checkpoint['model_args']['vocab_size']
    if not meta and vocab_size < 50257:
        sys.exit(f"{dataset}/meta.pkl is not there, which says what the model's {vocab_size} tokens are: prepare it")
    return meta


def known_heads(init_from, checkpoint):
    """n_head and n_embd of a checkpoint or a folder in transformers' format, in a dict: choose() looks at them."""
    known = checkpoint.get('model_args')
    if Path(init_from).is_dir():
        try:
            known = json.loads(Path(init_from, 'config.json').read_text(encoding='utf-8'))
        except (OSError, ValueError): # whoever loads the model says what is wrong
            pass
    known = known if isinstance(known, dict) else {}
    return {name: known[name] for name in ('n_head', 'n_embd') if type(known.get(name)) is int and known[name] > 0}


def load_checkpoint(path):
    """The dict that torch.load gives, FileNotFoundError, or ValueError with the reason in a few words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore') # torch wonders at foreign pickles; the refusals below say it all
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise
    except OSError as e:
        raise ValueError(e.strerror) from None
    except pickle.UnpicklingError as e:
        raise ValueError(f"damaged, or it holds more than weights and plain values: {str(e).splitlines()[0]}") from None
    except Exception as e: # damaged bytes can raise anything in torch's reader; every case becomes one line
        raise ValueError(f"damaged: {type(e).__name__} {str(e).splitlines()[0] if str(e) else ''}".strip()) from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"a checkpoint is a dict, got {type(checkpoint).__name__}")
    return checkpoint


def _why_damaged(path):
    """'' where every entry of the file fits its checksum, else the reason; files of torch before 1.6 have none."""
    try:
        with zipfile.ZipFile(path) as entries:
            bad = entries.testzip()
            return f"the checksum of {bad} is wrong" if bad else ''
    # zipfile: the last for a way to compress that it does not know, as flipped bits may name
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, NotImplementedError) as e:
        return '' if not zipfile.is_zipfile(path) else str(e)


class RunLog:
    """
    log.csv, machine.txt, loss.png and, if asked for, wandb. A disk or a network that refuses is a warning, and the run
    goes on.

    out_dir     the folder; it exists. None: wandb alone, nothing on the disk
    first_step  rows of an earlier run before this step are kept, 0 starts anew
    title       of the picture
    say         prints a line
    """
    FIELDS = ('step', 'train_loss', 'val_loss', 'loss', 'lr', 'time_ms', 'tokens_per_s', 'mfu', 'elapsed_s')

    def __init__(self, out_dir, first_step, title, say):
        self.title, self.say, self.wandb_run, self.warned = title, say, None, set()
        self.no_drawing_before, self.undrawn = time.monotonic() + FIRST_PICTURE_after_s, False
        self.rows, self.csv_path = [], None
        if out_dir is None:
            return
        self.csv_path, self.png_path = Path(out_dir, 'log.csv'), Path(out_dir, 'loss.png')
        try:
            self.rows = self._read(first_step) if first_step else []
            header = dict(zip(self.FIELDS, self.FIELDS))
            _replace(self.csv_path, lambda part: self._write(part, 'w', [header, *self.rows]))
        except OSError as e:
            self._warn(f"{self.csv_path}: {e.strerror}")
        try:
            with open(Path(out_dir, 'machine.txt'), 'a' if first_step else 'w') as f:
                f.write(f"step {first_step}: {machine()}\n")
        except OSError as e:
            self._warn(f"{out_dir}/machine.txt: {e.strerror}")

    def _read(self, first_step):
        """The rows before first_step; of that step, only its evaluation has been. Spoiled lines are left out."""
        if not self.csv_path.exists():
            return []
        kept, unreadable = [], 0
        for line in self.csv_path.read_text(encoding='utf-8', errors='replace').splitlines()[1:]:
            values = line.split(',') # no csv.reader: to it, one quote that the disk made would swallow what follows
            try:
                row = dict(zip(self.FIELDS, values, strict=True))
                step, _ = int(row['step']), [float(value) for value in values if value]
                kept += [row] if step < first_step or step == first_step and row['val_loss'] else []
            except ValueError:
                unreadable += 1
        if unreadable:
            self._warn(f"{self.csv_path}: {unreadable} rows that cannot be read are left out")
        return kept

    def _write(self, path, mode, rows):
        with open(path, mode, newline='') as f:
            csv.DictWriter(f, self.FIELDS).writerows(rows)
            f.flush()
            if mode == 'w':
                os.fsync(f.fileno())

    def _warn(self, line):
        if line not in self.warned: # once
            self.say(f"warning: {line}")
            self.warned.add(line)

    def start_wandb(self, project, name, config, run_id=None):
        """A wandb run, the same one again where `run_id` is given; without key or network a warning."""
        try:
            import wandb
        except ImportError:
            return self._warn("no wandb log, the package is not installed; log.csv has it all")
        try:
            settings = wandb.Settings(init_timeout=20, login_timeout=20)
            self.wandb_run = wandb.init(project=project, name=name, config=config, settings=settings, id=run_id,
                                        resume='allow' if run_id else None)
        except wandb.Error as e:
            self._warn(f"no wandb log ({str(e).splitlines()[0]}); log.csv has it all")

    def add(self, row):
        """One row, a dict of some of FIELDS."""
        self.rows.append(row)
        try:
            if self.csv_path:
                self._write(self.csv_path, 'a', [row])
        except OSError as e:
            self._warn(f"{self.csv_path}: {e.strerror}")
        if self.wandb_run:
            self.wandb_run.log({k: v for k, v in row.items() if v is not None}, step=row['step'])

    def draw(self):
        """loss.png: the curves so far; not while drawing would take more than a twentieth of the run's time."""
        began = time.monotonic()
        self.undrawn = began < self.no_drawing_before
        if self.undrawn:
            return
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
        self.no_drawing_before = time.monotonic() + 19 * (time.monotonic() - began)

    def finish(self):
        if self.undrawn:
            self.no_drawing_before = 0.0
            self.draw()
        if self.wandb_run:
            self.wandb_run.finish()


def machine():
    """What this process runs on, in a line: the card, the versions, the commit."""
    on_gpu = torch.cuda.is_initialized() # else the run is on the CPU, whatever card is there
    device = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    n = dist.get_world_size() if on_gpu and dist.is_initialized() else 1
    return (f"{n} x " * (n > 1) + f"{device}, torch {torch.__version__}" + f", CUDA {torch.version.cuda}" * on_gpu
            + f", commit {commit()}")


def commit():
    """This tree's commit, '+' behind it where files have changed since; 'unknown' outside git."""
    try:
        done = subprocess.run(['git', 'describe', '--always', '--dirty=+'], cwd=Path(__file__).parent, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError: # no git here
        return 'unknown'
    return done.stdout.strip() or 'unknown'


def explain_error(kind, error, trace):
    """For sys.excepthook: memory that ran out gets one line with what to lower, anything else its traceback."""
    if not issubclass(kind, torch.OutOfMemoryError):
        return sys.__excepthook__(kind, error, trace)
    reason = str(error).partition('. GPU')[0].partition('\n')[0]
    print(f"{reason}: lower --batch_size, and raise --gradient_accumulation_steps by as much, or lower --block_size, "
          "or take a smaller model", file=sys.stderr)
