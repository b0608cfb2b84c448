"""Runs that cannot be lost: processes and nodes are killed, links cut, files damaged, and the run goes on."""
import csv
import os
import random
import shutil
import signal
import subprocess
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import PYTHON, ROOT, TINY

import data.run
from data.processes import begun_before, launcher
from data.run import Checkpoints, RunLog, explain_error, known_heads, newest_checkpoint, read_checkpoint

LONG = [*TINY, '--data_order=permutation', '--max_iters=60', '--lr_decay_iters=60', '--save_interval=5',
        '--eval_interval=20', '--log_interval=1', '--dropout=0.1', '--TK_kernel=False', '--compile=False']


def torchrun(*flags, processes=2, options=('--standalone',), prefix=(), quiet=False, **keywords):
    """A run under torchrun, in a process group of its own; the prefix may put it onto another host."""
    command = [*prefix, PYTHON, '-m', 'torch.distributed.run', *options, f'--nproc_per_node={processes}',
               str(ROOT / 'train.py'), *LONG, *flags]
    return subprocess.Popen(command, start_new_session=True, text=True, stderr=subprocess.STDOUT,
                            stdout=subprocess.DEVNULL if quiet else subprocess.PIPE, # a pipe that nobody reads fills up
                            env={**os.environ, 'OMP_NUM_THREADS': '1'}, **keywords)


def children(pid):
    with suppress(FileNotFoundError), open(f'/proc/{pid}/task/{pid}/children') as f:
        return [int(p) for p in f.read().split()]
    return []


def kill(run):
    """kill -9 to torchrun and everything that it started: its processes have sessions of their own."""
    family = [run.pid]
    for pid in family:
        family += children(pid)
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.wait()
    if run.stdout:
        run.stdout.close()


def read_until(run, words, timeout=60):
    """Read the run's lines up to one that holds `words`; all that was read."""
    lines, end = [], time.monotonic() + timeout
    while time.monotonic() < end:
        line = run.stdout.readline()
        lines.append(line)
        if words in line:
            return ''.join(lines)
        if not line:
            break
    raise AssertionError(f"{words!r} did not come in:\n" + ''.join(lines))


def finish(run, timeout=120):
    out, _ = run.communicate(timeout=timeout)
    assert run.returncode == 0, out
    return out


def losses(out_dir):
    """Every loss in log.csv by its step; a step that ran twice must have said the same twice."""
    with open(f'{out_dir}/log.csv', newline='') as f:
        return {(row['step'], kind): row[kind] for row in csv.DictReader(f)
                for kind in ('loss', 'train_loss', 'val_loss') if row[kind]}


def weights(out_dir):
    return torch.load(f'{out_dir}/ckpt.pt', weights_only=True)['model']


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def unbroken(tiny):
    """The run that nobody disturbs, by two processes."""
    finish(torchrun('--out_dir=unbroken'))
    return 'unbroken'


def kill_at_random_moments(start, kills):
    """Kill a run of start(flag, ...) and go on, so many times; it must end as the one in 'unbroken' did."""
    saved, rng = 0, random.Random(1)
    for i in range(kills):
        run = start('--out_dir=broken', *['--init_from=resume'] * (saved > 0))
        read_until(run, 'iter ')
        time.sleep(rng.random() * 0.5) # not to wait for something: to kill at any moment
        kill(run)
        left = [p for p in os.listdir('broken') if p.endswith('.pt')]
        if left:
            said = []
            saved_now = newest_checkpoint('broken', said.append)['iter_num']
            assert not said, said # nothing was damaged
            assert saved_now >= saved, f"kill {i}: fell back from step {saved} to {saved_now}"
            saved = saved_now
        if saved >= 55: # nearly through: once more from the beginning
            finish(start('--out_dir=broken', '--init_from=resume'))
            assert same(weights('broken'), weights('unbroken')) and losses('broken') == losses('unbroken')
            shutil.rmtree('broken')
            saved = 0
    finish(start('--out_dir=broken', *['--init_from=resume'] * (saved > 0)))
    assert same(weights('broken'), weights('unbroken')) and losses('broken') == losses('unbroken')


def test_a_run_killed_at_random_moments_ends_as_the_unbroken_one_does(unbroken, pytestconfig):
    kill_at_random_moments(torchrun, pytestconfig.getoption('--kills'))


@pytest.mark.gpu
def test_a_run_on_a_gpu_killed_at_random_moments_ends_as_the_unbroken_one_does(tiny, pytestconfig):
    deterministic = ("import runpy, sys, torch; torch.use_deterministic_algorithms(True); del sys.argv[0]; "
                     "sys.path.insert(0, sys.argv[0][:-8]); runpy.run_path(sys.argv[0], run_name='__main__')")

    def start(*flags):
        return subprocess.Popen(
            [PYTHON, '-c', deterministic, str(ROOT / 'train.py'), *LONG, '--device=cuda', *flags],
            start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, 'CUBLAS_WORKSPACE_CONFIG': ':4096:8'})
    finish(start('--out_dir=unbroken'))
    kill_at_random_moments(start, pytestconfig.getoption('--kills'))


@pytest.mark.gpu
@pytest.mark.parametrize('room', [True, False])
def test_a_checkpoint_on_a_gpu_holds_what_there_was_when_it_was_saved(room, tmp_path, monkeypatch):
    torch.cuda.init()
    said = []
    if not room:
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda *_: (0, 0))
    checkpoints = Checkpoints(tmp_path, 2, said.append, anew=True)
    w = torch.randn(3000, 5001, device='cuda') # more than one piece of pinned memory, and no multiple of it
    mixed = {'w': w, 'tied': w, 'turned': w[:99, :99].t(), 'half': torch.randn(7, device='cuda').bfloat16(),
             'step': torch.tensor(3.0, device='cuda'), 'empty': torch.empty(0, 2, device='cuda'),
             'on the host': torch.randn(5)}
    want = {name: t.cpu().clone() for name, t in mixed.items()}
    for step in (1, 2): # the second finds memory and buffers used
        checkpoints.save({'model': dict(mixed), 'iter_num': step}, ['ckpt.pt'])
        for t in mixed.values():
            t.zero_() # training goes on at once
        checkpoints.wait()
        found = read_checkpoint(tmp_path / 'ckpt.pt')['model']
        assert found.keys() == want.keys()
        for name, t in want.items():
            assert found[name].dtype == t.dtype and torch.equal(found[name], t), name
            mixed[name].copy_(t)
        assert found['w'].data_ptr() == found['tied'].data_ptr()
    assert len(said) == (0 if room else 1) and all('no room' in line for line in said)


def test_a_picture_that_was_left_out_to_save_time_is_drawn_at_the_end(tmp_path):
    run_log, picture = RunLog(tmp_path, 0, "a title", print), tmp_path / 'loss.png'
    run_log.add({'step': 0, 'val_loss': 2.0})
    run_log.draw()
    assert not picture.exists(), "a run that has just begun has better things to do"
    run_log.no_drawing_before = 0.0 # as if it had run for a while
    run_log.draw()
    first = picture.read_bytes()
    run_log.add({'step': 10, 'val_loss': 1.0})
    run_log.draw() # less than 19 times the first drawing's time later
    assert picture.read_bytes() == first
    run_log.finish()
    assert picture.read_bytes() != first


def test_the_documented_run_of_eight_processes_trains_as_one_does(tiny, run_here):
    flags = ['config/train_gpt2.py', *LONG, '--wandb_log=False', '--gradient_accumulation_steps=40', '--max_iters=3',
             '--dropout=0', '--out_dir=eight', '--full_val=True']
    shutil.copytree(ROOT / 'config', 'config')
    run = torchrun(*flags, processes=8)
    said = finish(run)
    assert f'tokens per step: {40 * 4 * 16:,}' in said and said.count('iter 2:') == 1
    one = run_here('train.py', *flags, '--out_dir=one')
    full_val = [float(out.split('val loss over all of val.bin: ')[1].split()[0]) for out in (said, one.out)]
    assert abs(full_val[0] - full_val[1]) < 1e-3, full_val
    for (name, a), b in zip(weights('eight').items(), weights('one').values()):
        assert (a - b).norm() <= 1e-4 * b.norm(), name


def test_torchrun_starts_a_killed_process_again_and_the_run_goes_on_by_itself(unbroken):
    run = torchrun('--out_dir=elastic', options=('--standalone', '--max-restarts=2'))
    read_until(run, 'iter 30')
    os.kill(children(run.pid)[1], signal.SIGKILL)
    out = finish(run)
    assert 'resuming from step' in out
    assert same(weights('elastic'), weights(unbroken))


def test_an_old_run_in_the_same_folder_is_not_taken_for_the_restarted_one(tiny):
    finish(torchrun('--out_dir=folder', '--seed=5', options=('--nnodes=1', '--rdzv_backend=c10d', '--rdzv_id=old')))
    old = newest_checkpoint('folder', print)['iter_num']
    assert old == 60
    run = torchrun('--out_dir=folder', '--save_interval=0', '--eval_interval=1000',
                   options=('--nnodes=1', '--rdzv_backend=c10d', '--rdzv_id=new', '--max-restarts=1'))
    read_until(run, 'iter 10')
    os.kill(children(run.pid)[0], signal.SIGKILL)
    out = finish(run)
    assert 'resuming' not in out and out.count('iter 0:') == 1 # the first one was read above


def test_a_new_run_in_an_old_ones_folder_goes_on_from_its_own_checkpoints(tiny, run_here):
    run_here('train.py', *LONG, '--out_dir=folder', '--seed=5')
    run_here('train.py', *LONG, '--out_dir=folder', '--max_iters=25')
    ran = run_here('train.py', *LONG, '--out_dir=folder', '--init_from=resume', '--max_iters=30')
    assert 'resuming from step 25' in ran.out


@pytest.mark.parametrize('left', [[], ['ckpt.pt', 'best.pt']])
def test_the_first_checkpoint_of_a_new_run_takes_the_place_of_an_old_runs(left, tmp_path):
    old = Checkpoints(tmp_path, 2, print, anew=True)
    for step in (90, 100):
        old.save({'iter_num': step}, left)
    old.wait()
    new = Checkpoints(tmp_path, 2, print, anew=True)
    assert newest_checkpoint(tmp_path, print)['iter_num'] == 100 # until then nothing is lost
    new.save({'iter_num': 5}, [])
    new.wait()
    assert newest_checkpoint(tmp_path, print)['iter_num'] == 5
    assert newest_checkpoint(tmp_path / 'earlier', pytest.fail)['iter_num'] == 100
    if left: # a model that was sampled from yesterday is not lost
        assert torch.load(tmp_path / 'earlier' / 'ckpt.pt')['iter_num'] == 100
    another = Checkpoints(tmp_path, 2, print, anew=True) # after a run that left no ckpt.pt
    another.save({'iter_num': 7}, ['ckpt.pt'])
    another.wait()
    assert newest_checkpoint(tmp_path / 'earlier', pytest.fail)['iter_num'] == 100
    final = Checkpoints(tmp_path, 2, print, anew=True)
    final.save({'iter_num': 3}, ['ckpt.pt'])
    final.wait()
    assert newest_checkpoint(tmp_path / 'earlier', pytest.fail)['iter_num'] == 7
    assert newest_checkpoint(tmp_path, pytest.fail)['iter_num'] == 3


def test_a_save_that_fails_half_way_does_not_cost_the_earlier_run(tmp_path, monkeypatch):
    old = Checkpoints(tmp_path, 2, print, anew=True)
    old.save({'iter_num': 100}, ['ckpt.pt'])
    old.wait()
    new, said, link = Checkpoints(tmp_path, 2, lambda line: said.append(line), anew=True), [], data.run._link

    def no_best(source, path):
        if path.name == 'best.pt.part':
            raise OSError(28, 'No space left on device')
        link(source, path)
    monkeypatch.setattr(data.run, '_link', no_best)
    new.save({'iter_num': 5}, ['ckpt.pt', 'best.pt'])
    new.wait()
    assert any('No space left' in line for line in said)
    monkeypatch.setattr(data.run, '_link', link)
    new.save({'iter_num': 7}, ['ckpt.pt', 'best.pt'])
    new.wait()
    assert torch.load(tmp_path / 'earlier' / 'ckpt.pt')['iter_num'] == 100
    assert newest_checkpoint(tmp_path, pytest.fail)['iter_num'] == 7


def test_a_damaged_checkpoint_that_was_passed_over_costs_no_later_one(tmp_path):
    (tmp_path / 'last-00000100.pt').write_bytes(b'no checkpoint')
    again = Checkpoints(tmp_path, 1, print, anew=False) # it went on from an earlier one
    again.save({'iter_num': 50}, [])
    again.wait()
    assert newest_checkpoint(tmp_path, pytest.fail)['iter_num'] == 50


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(number, tiny):
    run = subprocess.Popen([PYTHON, str(ROOT / 'train.py'), *LONG, '--max_iters=100000', '--out_dir=out'], text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    read_until(run, 'iter 7:')
    run.send_signal(number)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + number, out
    assert ('Ctrl-C once more stops at once' in out) == (number == signal.SIGINT)
    said = f"stopped by {number.name} after step "
    step = int(out.split(said)[1].split(';')[0])
    assert newest_checkpoint('out', print)['iter_num'] == step


def test_a_signal_to_one_process_stops_all_at_the_same_step(tiny):
    run = torchrun('--max_iters=100000', '--out_dir=out')
    read_until(run, 'iter 7:')
    os.kill(children(run.pid)[1], signal.SIGUSR1)
    out, _ = run.communicate(timeout=60)
    assert 'stopped by SIGUSR1' in out and run.returncode != 0
    assert newest_checkpoint('out', print)['iter_num'] > 7


def test_a_process_that_fails_ends_all_within_seconds(tiny):
    run = torchrun('--max_iters=100000', '--out_dir=out')
    read_until(run, 'iter 7:')
    os.kill(children(run.pid)[1], signal.SIGKILL)
    began = time.monotonic()
    run.communicate(timeout=60)
    assert run.returncode != 0 and time.monotonic() - began < 20


def damage_newest(out_dir):
    newest = sorted(p for p in os.listdir(out_dir) if p.startswith('last-'))[-1]
    with zipfile.ZipFile(f'{out_dir}/{newest}') as entries: # flip a bit inside the largest tensor
        entry = max(entries.infolist(), key=lambda e: e.file_size)
    with open(f'{out_dir}/{newest}', 'r+b') as f:
        f.seek(entry.header_offset + 200 + entry.file_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 16]))
    return newest


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_used(tiny, run_here):
    full = run_here('train.py', *LONG, '--out_dir=full')
    assert run_here('train.py', *LONG, '--out_dir=out', '--max_iters=35').status == 0
    os.remove('out/ckpt.pt') # the same bytes as the newest under another name
    os.remove('out/best.pt')
    newest = damage_newest('out')
    ran = run_here('train.py', *LONG, '--out_dir=out', '--init_from=resume')
    assert ran.status == 0 and newest in ran.out and 'checksum' in ran.out and 'resuming from step 30' in ran.out
    assert same(weights('out'), weights('full')) and full.status == 0


def test_where_every_checkpoint_is_damaged_the_run_is_refused(tiny, run_here):
    run_here('train.py', *LONG, '--out_dir=out', '--max_iters=5', '--keep_last=1')
    damage_newest('out') # all names share these bytes
    ran = run_here('train.py', *LONG, '--out_dir=out', '--init_from=resume')
    assert ran.status == 1 and 'no whole checkpoint' in ran.err


def test_a_disk_without_room_costs_no_checkpoint_and_not_the_run(tiny, run_here):
    os.mkdir('out')
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=600k', 'none', 'out']
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        ran = run_here('train.py', *LONG, '--out_dir=out', '--keep_last=8')
        assert ran.status == 0 and 'No space left' in ran.out and 'iter 59' in ran.out
        assert newest_checkpoint('out', lambda line: pytest.fail(line))['iter_num'] > 0
    finally:
        subprocess.run(['umount', 'out'], check=True)


def test_steps_with_a_nan_are_skipped_counted_and_end_the_run_when_they_do_not_end(tiny, run_here, monkeypatch):
    import model
    forward, calls = model.GPT.forward, []

    def sometimes_nan(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        if self.training:
            calls.append(1)
        return logits, loss * float('nan') if self.training and bad(len(calls)) else loss
    monkeypatch.setattr(model.GPT, 'forward', sometimes_nan)
    bad = {5}.__contains__ # the call that is the first micro-batch of the third step
    ran = run_here('train.py', *LONG, '--out_dir=out', '--max_iters=8', '--eval_interval=8')
    assert ran.status == 0 and '1 steps up to 2 had a NaN or Inf and were skipped' in ran.out
    assert all(t.isfinite().all() for t in weights('out').values())
    calls.clear()
    bad = range(21, 1000).__contains__
    ran = run_here('train.py', *LONG, '--out_dir=out2', '--max_bad_steps=4')
    assert ran.status == 1 and '4 steps in a row' in ran.err and 'out2' in ran.err


def test_a_run_may_go_on_with_another_number_of_processes(unbroken, tiny, run_here):
    flags = ['--dropout=0', '--out_dir=one']
    assert run_here('train.py', *LONG, *flags, '--max_iters=30').status == 0
    finish(torchrun(*flags, '--init_from=resume'))
    assert run_here('train.py', *LONG, '--dropout=0', '--out_dir=whole').status == 0
    for (name, a), b in zip(weights('one').items(), weights('whole').values()):
        assert (a - b).norm() <= 1e-4 * b.norm(), name


def test_memory_that_runs_out_is_one_line_that_says_what_to_lower(capsys):
    said = "CUDA out of memory. Tried to allocate 9.38 GiB. GPU 0 has a total capacity of 79.18 GiB of which 5 is free."
    explain_error(torch.OutOfMemoryError, torch.OutOfMemoryError(said), None)
    line, = capsys.readouterr().err.splitlines()
    assert 'Tried to allocate 9.38 GiB: lower --batch_size' in line
    explain_error(ValueError, ValueError("ours"), None)
    assert 'ValueError: ours' in capsys.readouterr().err


# -----------------------------------------------------------------------------
# two hosts: network namespaces on this machine, a cable between them

def ip(*words):
    return subprocess.run(['ip', *words], capture_output=True, text=True)


@pytest.fixture
def two_hosts():
    names = [f'nano{os.getpid()}{c}' for c in 'ab']
    if shutil.which('ip') is None or any(ip('netns', 'add', name).returncode != 0 for name in names):
        pytest.skip("needs the right to make network namespaces")
    try:
        ip('link', 'add', 'cable0', 'netns', names[0], 'type', 'veth', 'peer', 'name', 'cable0', 'netns', names[1])
        for i, name in enumerate(names):
            ip('-n', name, 'addr', 'add', f'10.77.0.{i + 1}/24', 'dev', 'cable0')
            ip('-n', name, 'link', 'set', 'lo', 'up')
            if ip('-n', name, 'link', 'set', 'cable0', 'up').returncode != 0:
                pytest.skip("needs the right to make virtual network devices")
        yield names
    finally:
        for name in names:
            ip('netns', 'del', name)


def node(host, number, *flags):
    """This node's torchrun: the documented launch, with its own address."""
    prefix = ['ip', 'netns', 'exec', host, 'env', 'GLOO_SOCKET_IFNAME=cable0',
              'TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1'] # else an agent that joins later waits for ever, README
    options = ['--nnodes=2', '--max-restarts=5', '--rdzv_backend=c10d', '--rdzv_endpoint=10.77.0.1:29400',
               '--rdzv_id=run', f'--local-addr=10.77.0.{number + 1}',
               f'--rdzv_conf=is_host={number == 0}'] # a namespace has no host name of its own to tell it by
    return torchrun('--out_dir=shared', *flags, processes=1, options=options, prefix=prefix)


def test_a_run_on_two_hosts_outlives_a_cut_link_and_a_killed_node(unbroken, two_hosts):
    nodes = [node(host, i) for i, host in enumerate(two_hosts)]
    try:
        wait_for_step(10)
        ip('-n', two_hosts[1], 'link', 'set', 'cable0', 'down') # cut the link
        kill(nodes[1]) # and the node goes down
        ip('-n', two_hosts[1], 'link', 'set', 'cable0', 'up')
        nodes[1] = node(two_hosts[1], 1) # it comes back
        outs = [n.communicate(timeout=120)[0] for n in nodes]
        assert [n.returncode for n in nodes] == [0, 0], outs
        assert any('resuming from step' in out for out in outs), outs
        assert same(weights('shared'), weights(unbroken))
    finally:
        for n in nodes:
            if n.poll() is None:
                kill(n)


def test_a_node_that_joins_makes_all_go_on_where_they_are(tiny):
    """torchrun counts no restart then, so nothing in the environment says that the run is not a new one."""
    options = ['--nnodes=1:2', '--max-restarts=5', '--rdzv_backend=c10d', '--rdzv_id=grows',
               f'--rdzv_endpoint=localhost:{random.randrange(20_000, 30_000)}']
    flags = ['--out_dir=shared', '--dropout=0', '--max_iters=1000000', '--save_interval=100', '--eval_interval=1000000']
    nodes, machines = [], Path('shared', 'machine.txt') # a line for every start of a run, in a new one the first
    try:
        for _ in range(2):
            nodes.append(torchrun(*flags, processes=1, options=options, quiet=True,
                                  prefix=['env', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1']))
            wait_for_step(100)
        alone, end = machines.read_text(), time.monotonic() + 90
        while machines.read_text() == alone and time.monotonic() < end:
            time.sleep(0.05)
        first, second = machines.read_text().splitlines()
        went_on_from = int(second.removeprefix('step ').partition(':')[0])
        assert first.startswith('step 0: ') and went_on_from >= 100
        wait_for_step(went_on_from + 100)
        assert [n.poll() for n in nodes] == [None, None]
    finally:
        for n in nodes:
            kill(n)


def wait_for_step(step, timeout=90):
    """Until a checkpoint of this step or a later one is there."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if os.path.isdir('shared') and any(int(p[5:13]) >= step for p in os.listdir('shared') if p.startswith('last-')
                                           and p.endswith('.pt')):
            return
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint of step {step} after {timeout} s")


def test_the_heads_of_a_model_are_known_before_it_is_loaded(tmp_path):
    args = {'n_head': 3, 'n_embd': 36, 'n_layer': 2}
    assert known_heads('resume', {'model_args': args}) == {'n_head': 3, 'n_embd': 36}
    assert known_heads('scratch', {}) == known_heads('resume', {'model_args': 7}) == known_heads('gpt2', {}) == {}
    assert known_heads(str(tmp_path), {}) == {}
    for text, heads in (('{"n_head": 25, "n_embd": 1600}', {'n_head': 25, 'n_embd': 1600}), ('{"n_head": 0}', {}),
                        ('{"n_head": "2"}', {}), ('[1]', {}), ('{', {}), ('\xff', {})):
        (tmp_path / 'config.json').write_text(text, encoding='latin-1')
        assert known_heads(str(tmp_path), {}) == heads


def test_a_launch_knows_its_own_checkpoints_and_all_processes_heed_the_one_that_does(tmp_path):
    def begun(*asked):
        store = torch.distributed.HashStore()
        for rank in range(1, len(asked)):
            store.set(f'begun/{rank}', str(asked[rank]))
        return begun_before(tmp_path, asked[0], store, 0, len(asked))
    assert not begun('none')
    ours = {'launcher': launcher()}
    for run_id, ranks, goes_on in (('none', [ours], True), ('none', [{}, ours], True), ('other', [ours], False),
                                   ('none', [{'launcher': 'another'}], False), ('none', [], False), ('none', 3, False),
                                   ('none', [4], False), ('', [ours], False)):
        torch.save({'run_id': run_id, 'ranks': ranks}, tmp_path / 'last-00000005.pt')
        assert begun('none') == goes_on, (run_id, ranks)
    assert begun('none', True), "another process knows it"
    assert not begun('', False), "not under torchrun"
    (tmp_path / 'last-00000009.pt').write_bytes(b'damaged')
    assert not begun('none')
