"""
The processes of a run: how they find each other when torchrun starts them again, how they are asked to stop, and how
they leave.
"""
import os
import platform
import signal
import sys
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from data.run import load_checkpoint


def fresh_store(rank, world_size):
    """
    torchrun's key-value store, the part that only this attempt uses. The store outlives a restart, and addresses of
    processes that are gone must not be taken for those of their successors. Every process calls this.
    """
    store, _, _ = next(dist.rendezvous('env://'))
    if rank > 0: # ask under a name that nobody had before
        call = uuid.uuid4().hex
        store.set(f'call/{rank}', call)
        attempt = store.get(f'answer/{call}').decode()
        store.set(f'heard/{attempt}/{rank}', '')
    else: # answer each one's newest call until it has heard; an older call may still stand there
        attempt = uuid.uuid4().hex
        for other in range(1, world_size):
            while not store.check([f'heard/{attempt}/{other}']):
                store.set(f"answer/{store.get(f'call/{other}').decode()}", attempt)
                time.sleep(0.01)
    return dist.PrefixStore(attempt, store)


def launcher():
    """A name for the process that started this one: torchrun's agent, which stays the same over all its restarts."""
    parent = os.getppid()
    try: # where there is /proc, its start too: in a container every launch may have the same number
        began = Path(f'/proc/{parent}/stat').read_text().rpartition(')')[2].split()[19]
    except OSError:
        began = ''
    return f'{platform.node()} {parent} {began}'


def begun_before(out_dir, run_id, store, rank, world_size):
    """
    Whether a last-*.pt in out_dir is of this run: an --rdzv_id that was given names it, also when torchrun is launched
    anew after a node's death. Without one it is of this very launch: it was saved while the agent of one of the
    processes, which all call this, was there. The count of restarts does not tell: it stays 0 when a node joins.
    """
    mine = False
    for path in sorted(Path(out_dir).glob('last-*.pt'), reverse=True):
        try:
            saved = load_checkpoint(path)
        except (FileNotFoundError, ValueError): # whoever goes on from it says so
            continue
        ranks = saved.get('ranks') if isinstance(saved.get('ranks'), list) else []
        ours = any(isinstance(state, dict) and state.get('launcher') == launcher() for state in ranks)
        mine = mine or bool(run_id) and saved.get('run_id') == run_id and (ours or run_id != 'none')
    store.set(f'begun/{rank}', str(mine))
    return any([store.get(f'begun/{other}') == b'True' for other in range(world_size)])


def leave_group(status):
    """
    End this process of a group, at once: a thread of the group's that asked for the interpreter while it shuts down
    would abort the process, and the run would count as failed. Its GPU ends what it has to do first, for which other
    processes' GPUs may wait, or read its memory.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class StopSignal:
    """
    SIGTERM, SIGINT and SIGUSR1 (Slurm's warning) ask the run to stop after its step; a second Ctrl-C ends it at once.

    group    of all processes, for tensors on the CPU; None for a single process
    agreed   () int32: the signal's number once every process knows, until then 0
    """

    def __init__(self, group=None):
        self.group, self.work = group, None
        self.mine = torch.zeros((), dtype=torch.int32)
        self.agreed = torch.zeros_like(self.mine) if group else self.mine
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number, frame):
        if number == signal.SIGINT and self.mine.item() == number:
            os._exit(128 + number)
        if number == signal.SIGINT and os.environ.get('RANK', '0') == '0':
            os.write(2, b"\nfinishing this step, then saving; Ctrl-C once more stops at once\n") # no print in a handler
        self.mine.fill_(number)

    def ask_all(self):
        """Begin to find out whether any process was asked; all processes call this together, then agree()."""
        if self.group:
            self.agreed.copy_(self.mine)
            self.work = dist.all_reduce(self.agreed, op=dist.ReduceOp.MAX, group=self.group, async_op=True)

    def agree(self):
        """Wait for the others' answers; SystemExit with one line where one of them is gone."""
        if self.group:
            try:
                self.work.wait()
            except RuntimeError as e:
                sys.exit(f"another process of this run is gone, its own message says why ({str(e).splitlines()[0]})")
