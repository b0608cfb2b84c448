"""
The processes of a run: how they find each other when torchrun starts them again, how they are asked to stop, and how
they leave.
"""
import os
import platform
import signal
import sys
import threading
import time
import uuid
from contextlib import suppress
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


def leave_group(status, group=None, final=False):
    """
    End this process of a group, at once: a thread of the group's that asked for the interpreter while it shuts down
    would abort the process, and the run would count as failed. Its GPU ends what it has to do first, for which other
    processes' GPUs may wait, or read its memory.

    status  the exit status
    group   where given, nobody leaves before all are here, rank 0 with its checkpoint on the disk: torchrun ends the
            others when one leaves with a status
    final   whether torchrun is to end, too, instead of starting the run again
    """
    if group:
        with suppress(RuntimeError): # one of them is gone already
            dist.barrier(group)
    if final and 'TORCHELASTIC_RUN_ID' in os.environ and os.environ['LOCAL_RANK'] == '0':
        os.kill(os.getppid(), signal.SIGTERM)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class StopSignal:
    """
    SIGTERM, SIGINT and SIGUSR1 (Slurm's warning) ask the run to stop; a second Ctrl-C ends it at once, which torchrun
    passes on as SIGTERM. A thread hears them: a handler of Python's waits until the call into torch returns, and two
    signals until then are one call.

    group    of all processes, for tensors on the CPU; None for a single process
    agreed   the signal's number once every process knows, until then 0; only agree() changes it
    final    whether the run is not to be started again by torchrun, which itself sends SIGTERM before it does so
    """
    NUMBERS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1

    def __init__(self, group=None):
        self.group, self.work, self.asked = group, None, None
        self.mine = self.agreed = 0
        heard, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        for number in self.NUMBERS:
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    def _listen(self, heard):
        interrupted, torchrun = False, 'TORCHELASTIC_RUN_ID' in os.environ
        with open(heard, 'rb', buffering=0) as pipe:
            while byte := pipe.read(1): # of every signal that Python handles
                number = byte[0]
                if interrupted and (number == signal.SIGINT or number == signal.SIGTERM and torchrun):
                    os._exit(128 + signal.SIGINT)
                if number == signal.SIGINT:
                    interrupted = True
                    if os.environ.get('RANK', '0') == '0':
                        os.write(2, b"\nfinishing this step, then saving; Ctrl-C once more stops at once\n")
                if number in self.NUMBERS:
                    self.mine = self.mine or number

    @property
    def final(self):
        return self.agreed in (signal.SIGINT, signal.SIGUSR1)

    def ask_all(self):
        """Begin to find out whether any process was asked; all processes call this together, then agree()."""
        if self.group:
            self.asked = torch.tensor(self.mine, dtype=torch.int32)
            self.work = dist.all_reduce(self.asked, op=dist.ReduceOp.MAX, group=self.group, async_op=True)

    def agree(self):
        """Wait for the others' answers; SystemExit with one line where one of them is gone."""
        if not self.group:
            self.agreed = self.mine
            return
        try:
            self.work.wait()
        except RuntimeError as e:
            sys.exit(f"another process of this run is gone, its own message says why ({str(e).splitlines()[0]})")
        self.agreed = self.asked.item()

    def until_agreed(self, items):
        """The items, as many in every process, one after the other, but no more once a stop is agreed."""
        for item in items:
            self.ask_all()
            yield item
            self.agree()
            if self.agreed:
                return
