"""Stops: a signal or the guard ends the run where it says, with everything saved, and nobody undoes it."""
import os
import re
import signal
import subprocess
import time
from contextlib import suppress

import pytest
import torch
from conftest import PYTHON, ROOT, TINY
from test_runs import LONG, children, finish, kill, read_until, same, torchrun, weights

import data.processes
import model
from data.run import newest_checkpoint

ENDLESS = ['--max_iters=1000000', '--save_interval=1000000', '--eval_interval=1000000', '--out_dir=out']


@pytest.fixture
def in_forward(monkeypatch):
    """in_forward(f): the model calls f(model, loss), which may return another loss, after each forward."""
    forward = model.GPT.forward

    def use(f):
        def called(self, idx, targets=None):
            logits, loss = forward(self, idx, targets)
            return logits, f(self, loss)
        monkeypatch.setattr(model.GPT, 'forward', called)
    return use


def kill_in_evaluation(in_forward, call):
    """SIGTERM to this process in the forward of an evaluation that is the call-th of all."""
    calls = []

    def f(gpt, loss):
        if not gpt.training:
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2) # another thread hears it
        return loss
    in_forward(f)
    return calls


def ended(run, timeout):
    """What a run still says until it ends within so many seconds."""
    try:
        return run.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        kill(run)
        pytest.fail(f"the run did not end in {timeout} s")


# -----------------------------------------------------------------------------
# evaluations

def test_a_stop_cuts_an_evaluation_short_and_the_resumed_run_is_the_unbroken_one(tiny, run_here, in_forward):
    flags = [*LONG, '--data_order=random', '--max_iters=30', '--eval_interval=10', '--eval_iters=20']
    assert run_here('train.py', *flags, '--out_dir=unbroken').status == 0
    calls = kill_in_evaluation(in_forward, 40 + 25) # of step 10, in the second split
    ran = run_here('train.py', *flags, '--out_dir=out')
    assert ran.status == 128 + signal.SIGTERM and 'stopped by SIGTERM after step 10' in ran.out
    assert len(calls) == 65 and 'out/last-00000010.pt' in ran.out and not os.path.exists('out/ckpt.pt')
    ran = run_here('train.py', *flags, '--out_dir=out', '--init_from=resume')
    assert ran.status == 0 and 'step 10: train loss' in ran.out
    assert same(weights('out'), weights('unbroken'))


def test_a_run_that_was_stopped_in_its_last_evaluation_saves_the_result_when_it_goes_on(tiny, run_here, in_forward):
    flags = [*TINY, '--TK_kernel=False', '--out_dir=out']
    kill_in_evaluation(in_forward, 2 * 4 + 1) # those of steps 0 and 4 are complete
    assert run_here('train.py', *flags).status == 128 + signal.SIGTERM
    assert torch.load('out/ckpt.pt', weights_only=True)['iter_num'] == 4
    assert run_here('train.py', *flags, '--init_from=resume').status == 0
    assert torch.load('out/ckpt.pt', weights_only=True)['iter_num'] == 8


def test_torchrun_does_not_have_to_kill_a_run_in_its_evaluation(tiny):
    finish(torchrun('--out_dir=out', '--max_iters=5', '--eval_interval=1000'))
    run = torchrun('--out_dir=out', '--init_from=resume', '--eval_interval=10', '--eval_iters=1000000')
    read_until(run, 'iter 9:')
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    out = ended(run, 20)
    assert 'stopped by SIGTERM after step 10' in out and newest_checkpoint('out', pytest.fail)['iter_num'] == 10


def test_a_run_that_is_stopped_before_its_first_step_does_not_say_that_it_can_go_on(tiny, run_here, in_forward):
    kill_in_evaluation(in_forward, 1)
    ran = run_here('train.py', *LONG, '--out_dir=out')
    assert ran.status == 128 + signal.SIGTERM and 'stopped by SIGTERM after step 0; no checkpoint is saved' in ran.out
    assert 'resume' not in ran.out and not [p for p in os.listdir('out') if p.endswith('.pt')]


def test_a_stop_also_cuts_the_loss_over_all_of_val_short(tiny, run_here, in_forward):
    calls = kill_in_evaluation(in_forward, 3 * 4 + 2)
    ran = run_here('train.py', *TINY, '--TK_kernel=False', '--full_val=True', '--out_dir=out')
    assert ran.status == 128 + signal.SIGTERM and len(calls) == 3 * 4 + 2
    assert 'over all of val.bin' not in ran.out and 'goes on from out/last-00000008.pt' in ran.out


# -----------------------------------------------------------------------------
# signals

@pytest.fixture
def stop():
    handlers = {number: signal.getsignal(number) for number in data.processes.StopSignal.NUMBERS}
    yield data.processes.StopSignal()
    os.close(signal.set_wakeup_fd(-1))
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize('number, final', [(signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGUSR1, True)])
def test_a_signal_counts_from_the_step_in_which_all_hear_of_it(number, final, stop):
    os.kill(os.getpid(), number)
    end = time.monotonic() + 10
    while not stop.mine and time.monotonic() < end:
        time.sleep(0.01)
    assert stop.mine == number and stop.agreed == 0 # else the loop could end between its look and its save
    stop.ask_all()
    stop.agree()
    assert stop.agreed == number and stop.final == final
    assert list(stop.until_agreed([1, 2, 3])) == [1]


def test_a_second_ctrl_c_does_not_wait_for_the_call_into_torch_to_return(tmp_path):
    (tmp_path / 'long.py').write_text(
        "import torch\nfrom data.processes import StopSignal\nStopSignal()\ntorch.set_num_threads(1)\n"
        "a = torch.ones(9000, 9000, dtype=torch.float64)\nprint('in', flush=True)\na @ a\nprint('out', flush=True)\n")
    run = subprocess.Popen([PYTHON, tmp_path / 'long.py'], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           env={**os.environ, 'PYTHONPATH': str(ROOT)})
    read_until(run, 'in')
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    read_until(run, 'Ctrl-C once more', timeout=5)
    run.send_signal(signal.SIGINT)
    out = ended(run, 5)
    assert run.returncode == 128 + signal.SIGINT and 'out' not in out


def test_a_second_ctrl_c_ends_torchrun_too_in_the_middle_of_a_long_step(tiny):
    run = torchrun(*ENDLESS, '--gradient_accumulation_steps=100000')
    read_until(run, 'step 0: train loss')
    time.sleep(0.5)
    workers = children(run.pid)
    run.send_signal(signal.SIGINT)
    read_until(run, 'Ctrl-C once more', timeout=10)
    time.sleep(0.5) # until torchrun has told the other one too
    run.send_signal(signal.SIGINT)
    ended(run, 15)
    assert run.returncode != 0 and len(workers) == 2 and not any(os.path.exists(f'/proc/{pid}') for pid in workers)


def test_a_run_that_was_asked_to_stop_is_not_started_again(tiny):
    run = torchrun(*ENDLESS, options=('--standalone', '--max-restarts=3'))
    read_until(run, 'iter 7:')
    os.kill(children(run.pid)[1], signal.SIGUSR1)
    out = ended(run, 60)
    assert out.count('stopped by SIGUSR1') == 1 and 'resuming' not in out and run.returncode != 0
    assert newest_checkpoint('out', pytest.fail)['iter_num'] == int(re.search(r'after step (\d+)', out)[1])


def test_no_process_leaves_with_a_status_before_the_one_that_still_saves(tmp_path):
    (tmp_path / 'leave.py').write_text(
        "import time\nfrom pathlib import Path\nimport torch.distributed as dist\n"
        "from data.processes import leave_group\ndist.init_process_group('gloo')\n"
        "if dist.get_rank() == 0:\n    time.sleep(3)\n    Path('saved').touch()\n"
        "leave_group(138, dist.group.WORLD)\n")
    done = subprocess.run([PYTHON, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'leave.py'],
                          cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, timeout=90)
    assert done.returncode != 0 and (tmp_path / 'saved').exists() # torchrun would have ended the other


def test_torchrun_is_to_be_given_the_signal_of_slurm_as_the_readme_says(tiny):
    option, = set(re.findall(r'--signals-to-handle=\S*USR1\b', (ROOT / 'README.md').read_text()))
    run = torchrun(*ENDLESS, options=('--standalone', '--max-restarts=3', option))
    read_until(run, 'iter 7:')
    workers = children(run.pid)
    run.send_signal(signal.SIGUSR1)
    try:
        out = ended(run, 60)
        assert len(workers) == 2 and not any(os.path.exists(f'/proc/{pid}') for pid in workers)
    finally: # those of a torchrun that the signal killed are nobody's children
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert out.count('stopped by SIGUSR1') == 1 and 'resuming' not in out and run.returncode != 0
    assert newest_checkpoint('out', pytest.fail)['iter_num'] == int(re.search(r'after step (\d+)', out)[1])


# -----------------------------------------------------------------------------
# the guard

def bad_steps(in_forward, bad):
    """The loss of the steps of which bad(step) holds is NaN; LONG has two micro-batches a step."""
    calls = []

    def f(gpt, loss):
        calls.extend([1] * gpt.training)
        return loss * float('nan') if gpt.training and bad((len(calls) - 1) // 2) else loss
    in_forward(f)
    return calls


def test_bad_steps_in_a_row_end_a_run_that_seldom_logs(tiny, run_here, in_forward):
    calls = bad_steps(in_forward, lambda step: step >= 13)
    ran = run_here('train.py', *LONG, '--out_dir=out', '--log_interval=1000', '--max_bad_steps=4')
    assert ran.status == 1 and len(calls) == 2 * 20 # steps 13 to 16 are four; looked at after 16 and 20 steps
    assert 'steps in a row had a NaN or Inf; --init_from=resume goes on from out/last-00000015.pt' in ran.err


def test_a_row_of_bad_steps_that_is_over_at_the_next_look_ends_the_run_all_the_same(tiny, run_here, in_forward):
    bad_steps(in_forward, range(2, 6).__contains__)
    ran = run_here('train.py', *LONG, '--out_dir=out', '--log_interval=1000', '--max_bad_steps=4', '--save_interval=0')
    assert ran.status == 1 and '4 steps in a row had a NaN or Inf; no checkpoint is saved yet' in ran.err


def test_bad_steps_after_the_last_line_of_the_log_are_said(tiny, run_here, in_forward):
    bad_steps(in_forward, {5, 6}.__contains__)
    ran = run_here('train.py', *LONG, '--out_dir=out', '--log_interval=1000', '--max_iters=8')
    assert ran.status == 0 and 'warning: 2 steps up to 7 had a NaN or Inf' in ran.out


def test_a_run_that_the_guard_ended_is_not_started_again(tiny):
    run = torchrun(*ENDLESS, '--learning_rate=1e30', options=('--standalone', '--max-restarts=3'))
    out = ended(run, 90)
    assert out.count('20 steps in a row had a NaN or Inf; no checkpoint is saved yet') == 1 and run.returncode != 0
    assert out.count('iter 0:') == 1
