"""What a run that goes on must find again: its own checkpoints, its best model, its log; and that it writes alone."""
import csv
import fcntl
import os
import resource
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_refused, run_script, write_ids
from test_runs import LONG, children, finish, kill, newest_checkpoint, read_until, same, torchrun, unbroken, weights

from data.processes import begun_before, launcher
from data.run import Checkpoints, RunLog
from data.tokens import Tokens

__all__ = ['unbroken'] # a fixture
TWO = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')


def rows(out_dir='out'):
    with open(f'{out_dir}/log.csv', newline='') as f:
        return list(csv.DictReader(f))


def load(path):
    return torch.load(path, weights_only=True)


# -----------------------------------------------------------------------------
# its own checkpoints

class Killed(BaseException):
    """kill -9, as far as the files are concerned."""


@pytest.mark.parametrize('names', [[], ['ckpt.pt', 'best.pt']])
def test_whenever_a_new_run_is_killed_its_folder_holds_one_runs_checkpoints_and_the_old_ones_are_whole(
        names, tmp_path, monkeypatch):
    monkeypatch.setattr(threading, 'excepthook', lambda args: None) # of the thread that was "killed"
    left = 1_000_000 # operations until the kill

    def counted(operation):
        def count(*args, **keywords):
            nonlocal left
            left -= 1
            if left <= 0:
                raise Killed
            return operation(*args, **keywords)
        return count
    for name in ('link', 'replace', 'unlink'):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))

    def save(folder, run, *steps):
        checkpoints = Checkpoints(folder, 2, print, anew=True)
        for step in steps:
            checkpoints.save({'iter_num': step, 'run': run}, names)
            checkpoints.wait()

    def runs(folder):
        return {load(path)['run'] for path in folder.glob('*.pt')}

    for kill_at in range(1, 100):
        folder, left = tmp_path / str(kill_at), 1_000_000
        folder.mkdir()
        save(folder, 'old', 50, 60)
        left = kill_at
        save(folder, 'new', 5)
        went_through, left = left > 0, 1_000_000
        assert len(runs(folder)) <= 1, f"killed at operation {kill_at}: {sorted(folder.glob('*.pt'))}"
        assert any(newest_checkpoint(place, print)['iter_num'] == 60 for place in (folder, folder / 'earlier')
                   if 'old' in runs(place))
        had_model = (folder / 'ckpt.pt').exists() and runs(folder) == {'new'}
        save(folder, 'newest', 5) # and once more from the beginning
        assert runs(folder) == {'newest'} and ('old' in runs(folder / 'earlier') or had_model)
        if went_through:
            return
    pytest.fail("it had no end")


def test_false_starts_cost_no_checkpoint_of_an_earlier_run(tmp_path):
    for run in 'abc': # each in the last one's folder, none with an evaluation
        checkpoints = Checkpoints(tmp_path, 1, print, anew=True)
        checkpoints.save({'iter_num': 5, 'run': run}, [])
        checkpoints.wait()
    assert {load(path)['run'] for path in (tmp_path / 'earlier').glob('last-*.pt')} == {'a', 'b'}
    assert [load(path)['run'] for path in tmp_path.glob('*.pt')] == ['c']


def test_a_checkpoint_that_somebody_removed_meanwhile_stops_no_save(tmp_path):
    (tmp_path / 'last-00000009.pt').write_bytes(b'old')
    said = []
    checkpoints = Checkpoints(tmp_path, 1, said.append, anew=True)
    (tmp_path / 'last-00000009.pt').unlink()
    checkpoints.save({'iter_num': 5}, [])
    checkpoints.wait()
    assert not said and newest_checkpoint(tmp_path, pytest.fail)['iter_num'] == 5


def killed_once(where):
    """A train.py that kills itself with -9 the first time that Checkpoints comes to `where`."""
    Path('killed_once.py').write_text(f"""import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from data.run import Checkpoints
there = Checkpoints.{where}
def kill(*args):
    if not os.path.exists('killed'):
        open('killed', 'w').close()
        os.kill(os.getpid(), signal.SIGKILL)
    there(*args)
Checkpoints.{where} = kill
runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')
""")
    return 'killed_once.py'


def test_a_restart_goes_on_from_its_own_run_not_from_an_older_one(tiny, run_here):
    Path('killed').touch() # not yet
    script = killed_once('_forget_all_but') # after the first checkpoint's rename
    launch = ['-m', 'torch.distributed.run', '--nproc_per_node=2', '--max-restarts=1', '--master-port=29617']
    old = run_script(Path(script).resolve(), *LONG, '--seed=5', '--out_dir=folder', cwd='.', python=launch)
    assert old.status == 0, old.err
    Path('killed').unlink()
    new = run_script(Path(script).resolve(), *LONG, '--out_dir=folder', cwd='.', python=launch)
    assert new.status == 0 and 'resuming from step 5 ' in new.out, new.out + new.err


def test_the_same_launch_given_again_goes_on_where_the_killed_one_was(unbroken):
    launch = ['--nnodes=1', '--rdzv_backend=c10d', '--rdzv_endpoint=localhost:0', '--rdzv_id=once']
    run = torchrun('--out_dir=again', options=launch)
    read_until(run, 'iter 12:')
    kill(run) # torchrun too, and before the run has a ckpt.pt
    assert not Path('again/ckpt.pt').exists()
    assert 'resuming from step 10' in finish(torchrun('--out_dir=again', options=launch))
    assert same(weights('again'), weights(unbroken))


def test_a_run_id_that_was_given_is_known_whichever_agent_asks(tmp_path):
    store = torch.distributed.HashStore()
    for run_id in ('mine', 'none'):
        torch.save({'run_id': run_id, 'ranks': [{'launcher': 'of a node that died'}]}, tmp_path / 'last-00000005.pt')
        assert begun_before(tmp_path, run_id, store, 0, 1) == (run_id == 'mine')
        assert not begun_before(tmp_path, 'other', store, 0, 1)
    torch.save({'run_id': 'none', 'ranks': [{'launcher': launcher()}]}, tmp_path / 'last-00000005.pt')
    assert begun_before(tmp_path, 'none', store, 0, 1)


def test_a_run_that_went_on_without_torchrun_is_still_the_one_that_torchrun_knows(tiny, run_here):
    launch = ('-m', 'torch.distributed.run', '--nnodes=1', '--rdzv_backend=c10d', '--rdzv_endpoint=localhost:0',
              '--rdzv_id=mine', '--nproc_per_node=1')
    run_script('train.py', *TINY, '--max_iters=4', cwd='.', python=launch)
    assert run_here('train.py', *TINY, '--max_iters=6', '--init_from=resume').status == 0
    ran = run_script('train.py', *TINY, cwd='.', python=launch)
    assert 'resuming from step 6 ' in ran.out, ran


@pytest.mark.parametrize('step', [None, 'ten', -1, True, torch.tensor(3)])
def test_a_checkpoint_without_a_step_is_named_and_passed_over(step, tmp_path):
    torch.save({'iter_num': 5}, tmp_path / 'last-00000005.pt')
    torch.save({'iter_num': step}, tmp_path / 'ckpt.pt')
    said = []
    assert newest_checkpoint(tmp_path, said.append)['iter_num'] == 5
    line, = said
    assert 'ckpt.pt' in line and 'iter_num' in line


def test_what_a_killed_save_left_on_a_disk_that_is_read_only_now_is_a_warning(tiny, run_here, monkeypatch):
    Path('out').mkdir()
    Path('out/last-00000005.pt.part').touch()
    unlink = os.unlink

    def refuse(path, **keywords):
        if str(path).endswith('5.pt.part'):
            raise OSError(30, 'Read-only file system')
        unlink(path, **keywords)
    monkeypatch.setattr(os, 'unlink', refuse)
    ran = run_here('train.py', *TINY)
    assert ran.status == 0 and 'last-00000005.pt.part of a run that was killed stays (Read-only file' in ran.out


# -----------------------------------------------------------------------------
# its best model

def test_a_resumed_run_that_finds_its_best_loss_at_once_keeps_that_model(tiny, run_here):
    run_here('train.py', *TINY, '--max_iters=4', '--save_interval=3', '--eval_interval=100')
    for name in ('last-00000004.pt', 'ckpt.pt', 'best.pt'):
        os.remove(f'out/{name}')
    ran = run_here('train.py', *TINY, '--init_from=resume', '--max_iters=3')
    first, best = (float(row['val_loss']) for row in rows() if row['val_loss'])
    assert ran.status == 0 and ran.names['best_val_loss'] == best < first
    for name in ('ckpt.pt', 'best.pt'):
        assert load(f'out/{name}')['iter_num'] == 3
        assert load(f'out/{name}')['best_val_loss'] == ran.names['best_val_loss']


def test_an_evaluation_is_not_made_again_by_another_number_of_processes(tiny, run_here):
    run_here('train.py', *TINY, '--max_iters=4')
    ran = run_script('train.py', *TINY, '--init_from=resume', cwd='.', python=TWO)
    assert ran.status == 0 and 'resuming from step 4 ' in ran.out, ran
    assert [row['step'] for row in rows() if row['val_loss']] == ['0', '4', '8']


def test_a_val_loss_that_is_nan_costs_no_later_best_model(tiny, run_here, monkeypatch):
    import model
    forward, n = model.GPT.forward, 0

    def sometimes_nan(self, idx, targets=None):
        nonlocal n
        logits, loss = forward(self, idx, targets)
        n += not self.training
        return logits, loss * float('nan') if not self.training and n == 8 else loss # the second evaluation's last
    monkeypatch.setattr(model.GPT, 'forward', sometimes_nan)
    run_here('train.py', *TINY)
    assert [row['val_loss'] == 'nan' for row in rows() if row['val_loss']] == [False, True, False]
    assert load('out/best.pt')['iter_num'] == 8
    for path in Path('out').glob('*.pt'): # as an older version saved it
        checkpoint = load(path)
        path.unlink()
        torch.save({**checkpoint, 'best_val_loss': float('nan')}, path)
    run_here('train.py', *TINY, '--init_from=resume', '--max_iters=12')
    assert load('out/best.pt')['iter_num'] == 12


# -----------------------------------------------------------------------------
# its log

def test_a_kill_as_a_resumed_run_rewrites_the_log_costs_no_row(tmp_path, monkeypatch):
    run_log = RunLog(tmp_path, 0, "a title", print)
    for step in range(9):
        run_log.add({'step': step, 'loss': 1.5})
    before = (tmp_path / 'log.csv').read_bytes()

    def kill(self, rows):
        raise Killed
    monkeypatch.setattr(csv.DictWriter, 'writerows', kill)
    with pytest.raises(Killed):
        RunLog(tmp_path, 5, "a title", print)
    assert (tmp_path / 'log.csv').read_bytes() == before
    monkeypatch.undo()
    assert len(RunLog(tmp_path, 5, "a title", print).rows) == 5 == len(rows(tmp_path))


@pytest.mark.parametrize('n', [20, 5000]) # more than the 128 KiB that csv takes for one field
@pytest.mark.parametrize('line', [0, 7])
def test_a_damaged_byte_costs_the_log_one_row_at_most_and_that_is_said(n, line, tmp_path):
    run_log = RunLog(tmp_path, 0, "a title", print)
    for step in range(n):
        run_log.add({'step': step, 'loss': 1.5, 'lr': 1e-3, 'time_ms': 2.5, 'tokens_per_s': 7, 'elapsed_s': 123.4})
    lines = (tmp_path / 'log.csv').read_bytes().splitlines(keepends=True)
    lines[line] = b'"' + lines[line][1:]
    (tmp_path / 'log.csv').write_bytes(b''.join(lines))
    said = []
    RunLog(tmp_path, n, "a title", said.append)
    assert [int(row['step']) for row in rows(tmp_path)] == [step for step in range(n) if step + 1 != line]
    assert said == ([f"warning: {tmp_path}/log.csv: 1 rows that cannot be read are left out"] if line else [])


def test_a_log_that_cannot_be_read_is_a_warning(tmp_path):
    (tmp_path / 'log.csv').mkdir()
    said = []
    RunLog(tmp_path, 5, "a title", said.append).add({'step': 5})
    assert said == [f"warning: {tmp_path}/log.csv: Is a directory"]


def test_the_wandb_run_is_still_known_after_a_start_without_wandb(tiny, run_here, monkeypatch):
    asked, fake = [], ModuleType('wandb')
    fake.Settings, fake.Error = SimpleNamespace, ConnectionError

    def init(id=None, **_):
        asked.append(id)
        return SimpleNamespace(id='abc123', log=lambda *_, **__: None, finish=lambda: None)
    fake.init = init
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    for max_iters, wandb_log in ((2, True), (4, False), (6, True)):
        assert run_here('train.py', *TINY, f'--max_iters={max_iters}', f'--wandb_log={wandb_log}',
                        *['--init_from=resume'] * (max_iters > 2)).status == 0
    assert asked == [None, 'abc123']


# -----------------------------------------------------------------------------
# its data

def test_a_set_may_have_more_shards_than_a_process_may_have_files_open(tmp_path):
    ids = np.arange(300 * 9) % 1000
    for i in range(300):
        write_ids(tmp_path / f'train_{i:04}.bin', ids[i * 9:i * 9 + 9])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = set(map(int, os.listdir('/proc/self/fd')))
    resource.setrlimit(resource.RLIMIT_NOFILE, ([fd for fd in range(soft) if fd not in taken][100], hard)) # 100 more
    try:
        tokens = Tokens(tmp_path, 'train', 8, 1000)
        order = np.random.default_rng(0).permutation(300).tolist()
        x, y = tokens.windows(order + order)
        for row, (a, b) in enumerate(zip(x.tolist(), y.tolist())):
            want = ids[order[row % 300] * 9:][:9].tolist()
            assert a == want[:8] and b == want[1:]
        (tmp_path / 'train_0000.bin').unlink()
        with pytest.raises(SystemExit, match='train_0000.bin: No such file'):
            tokens.windows([*range(299, -1, -1)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -----------------------------------------------------------------------------
# it writes alone

def test_a_second_run_in_a_folder_is_refused_while_the_first_is_there(tiny, run_here):
    run_here('train.py', *TINY, '--max_iters=4')
    before = {path: path.read_bytes() for path in Path('out').iterdir()}
    first = os.open('out', os.O_RDONLY)
    fcntl.flock(first, fcntl.LOCK_EX)
    try:
        for init_from in ('scratch', 'resume'):
            assert_refused(run_here('train.py', *TINY, f'--init_from={init_from}'), '--out_dir=out: another run is')
        assert before == {path: path.read_bytes() for path in Path('out').iterdir()}
        assert run_here('train.py', *TINY, '--eval_only=True').status == 0, "this one writes nothing"
    finally:
        os.close(first)
    assert run_here('train.py', *TINY, '--init_from=resume').status == 0


@pytest.mark.parametrize('why', ['No locks available', 'this system has no flock'])
def test_where_nothing_can_be_locked_the_run_says_so_once_and_goes_on(why, tiny, run_here, monkeypatch):
    def refuse(*_):
        raise OSError(37, why)
    monkeypatch.setattr('data.run.fcntl', None if 'system' in why else SimpleNamespace(flock=refuse, LOCK_EX=2,
                                                                                       LOCK_NB=4))
    ran = run_here('train.py', *TINY)
    assert ran.status == 0 and ran.out.count(f'keeps a second run from writing to out ({why})') == 1


def test_processes_that_a_killed_torchrun_left_behind_are_not_joined_by_a_second_run(tiny):
    flags = ['--max_iters=1000000', '--eval_interval=1000000', '--out_dir=out']
    first, workers = torchrun(*flags), []
    try:
        read_until(first, 'iter 6:')
        workers = children(first.pid)
        os.kill(first.pid, signal.SIGKILL)
        second = run_script('train.py', *LONG, *flags, '--init_from=resume', cwd='.', timeout=60)
        assert_refused(second, '--out_dir=out: another run is writing there')
    finally:
        kill(first)
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
