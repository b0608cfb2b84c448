"""What a training run computes, prints and leaves behind, and how it refuses what it cannot do."""
import csv
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from configurator import _why_no_kernel, choose
from conftest import PYTHON, ROOT, TINY, assert_refused, run_script, write_ids
from plain_gpt import PlainGPT, nanogpt_losses, nanogpt_optimizer

SHAPE = dict(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=32, bias=False)
TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')


def rows(out_dir='out'):
    """log.csv's rows, numbers as numbers, empty fields left out."""
    with open(Path(out_dir, 'log.csv'), newline='') as f:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]


def load(out_dir='out'):
    """The checkpoint, read as an untrusting reader does."""
    return torch.load(Path(out_dir, 'ckpt.pt'), weights_only=True)


def lines(ran, start):
    return [line for line in ran.out.splitlines() if line.startswith(start)]


def same(a, b):
    """Equal to the bit, through dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def after_each_step(monkeypatch, call):
    """From now on train.py calls call(n) when it has done n steps: at their end its loop moves the bar."""
    update = tqdm.update

    def update_and_call(self, n=1):
        self.steps = getattr(self, 'steps', 0) + 1
        call(self.steps)
        return update(self, n)
    monkeypatch.setattr(tqdm, 'update', update_and_call)


# -----------------------------------------------------------------------------
# the run itself

@pytest.mark.parametrize('accumulation, grad_clip', [(1, 1.5), (3, 0.75)]) # some steps have a larger norm, some not
def test_the_first_losses_are_nanogpts_own(accumulation, grad_clip, tiny, run_here):
    ran = run_here('train.py', *TINY, f'--gradient_accumulation_steps={accumulation}', f'--grad_clip={grad_clip}',
                   '--beta2=0.99', '--max_iters=9')
    evaluations, losses = nanogpt_losses(
        tiny, SHAPE, steps=9, batch_size=4, accumulation=accumulation, eval_interval=4, eval_iters=2, weight_decay=0.1,
        betas=(0.9, 0.99), grad_clip=grad_clip,
        schedule=dict(learning_rate=1e-2, warmup_iters=2, lr_decay_iters=8, min_lr=6e-5))
    for row, (step, train, val) in zip([row for row in rows() if 'val_loss' in row], evaluations):
        assert row['step'] == step and row['train_loss'] == pytest.approx(train, abs=1e-5)
        assert row['val_loss'] == pytest.approx(val, abs=1e-5)
        assert f"step {step}: train loss {row['train_loss']:.4f}, val loss {row['val_loss']:.4f}" in ran.out
    assert len(losses) == len(lines(ran, 'iter ')) == 9 and len(evaluations) == 3
    for row, (step, loss) in zip([row for row in rows() if 'loss' in row], losses):
        assert row['step'] == step and row['loss'] == pytest.approx(loss, abs=1e-5)
        assert f"iter {step}: loss {row['loss']:.4f}, time " in ran.out


def test_a_run_takes_exactly_max_iters_steps_and_prints_nanogpts_lines(tiny, run_here):
    ran = run_here('train.py', *TINY, '--max_iters=7', '--log_interval=2')
    assert ran.status == 0
    assert [line.split(':')[0] for line in lines(ran, 'iter ')] == ['iter 0', 'iter 2', 'iter 4', 'iter 6']
    assert [line.split(':')[0] for line in lines(ran, 'step ')] == ['step 0', 'step 4', 'step 7']
    number = r'\d+\.\d+'
    for line in lines(ran, 'iter '):
        assert re.fullmatch(rf'iter \d+: loss {number}, time {number}ms, mfu -?{number}%', line)
    checkpoint = load()
    assert checkpoint['iter_num'] == 7
    assert {float(state['step']) for state in checkpoint['optimizer']['state'].values()} == {7.0}


@pytest.mark.parametrize('fast', [False, True])
def test_the_loop_reads_the_loss_in_the_steps_that_it_logs_and_in_no_other(fast, tiny, run_here, monkeypatch):
    """Or whatever else is computed: on a GPU each reading would wait for it."""
    monkeypatch.setattr('configurator._why_not_fast', lambda *_: '')
    step, read_in = 0, set()

    def watched(read):
        def reading(tensor, *args, **kw):
            if tensor.is_floating_point() and sys._getframe(1).f_code.co_filename == str(ROOT / 'train.py'):
                read_in.add(step)
            return read(tensor, *args, **kw)
        return reading

    def watch(steps):
        nonlocal step
        step = steps
        if step == 1: # not __bool__: on a CPU the guard asks whether to step
            for name in ('item', 'tolist', 'numpy', 'cpu', '__float__', '__int__', '__format__'):
                monkeypatch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
    after_each_step(monkeypatch, watch)
    assert run_here('train.py', *TINY, f'--fast={fast}', '--log_interval=3', '--eval_interval=1000').status == 0
    assert read_in == {3, 6, 8} # 8: evaluated at the end


def test_what_auto_chose_is_said_in_one_line_and_a_flag_wins(tiny, run_here):
    flags = [flag for flag in TINY if flag != '--device=cpu'] + ['--max_iters=1', '--compile=False']
    auto, = lines(run_here('train.py', *flags, '--device=auto'), 'auto: ')
    assert 'device=' in auto and 'dtype=' in auto and 'TK_kernel=' in auto and 'compile' not in auto
    auto, = lines(run_here('train.py', *flags, '--device=cpu', '--dtype=bfloat16'), 'auto: ')
    assert auto.startswith("auto: fast=False, TK_kernel=False (no kernel: ")


def test_a_log_and_a_picture_are_there_after_each_evaluation(tiny, run_here):
    run_here('train.py', *TINY)
    assert [row['step'] for row in rows() if 'val_loss' in row] == [0, 4, 8]
    first = next(row for row in rows() if 'loss' in row)
    assert first.keys() == {'step', 'loss', 'lr', 'time_ms', 'tokens_per_s', 'elapsed_s'}
    assert first['tokens_per_s'] == pytest.approx(2 * 4 * 16 / first['time_ms'] * 1e3, rel=0.01)
    assert Path('out/loss.png').read_bytes().startswith(b'\x89PNG')


def test_the_bar_shows_loss_speed_and_time_left(tiny, run_here):
    err = run_here('train.py', *TINY).err
    assert 'loss ' in err and ' tokens/s' in err and '8/8 [' in err


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(tiny, run_here):
    get_lr = run_here('train.py', *TINY, '--max_iters=0', '--warmup_iters=10', '--lr_decay_iters=110',
                      '--learning_rate=1e-3', '--min_lr=1e-4').names['get_lr']
    assert [get_lr(it) for it in (0, 4, 10, 60, 110, 111, 999)] == pytest.approx(
        [1e-3 / 11, 5e-3 / 11, 1e-3, 5.5e-4, 1e-4, 1e-4, 1e-4])


def test_eval_only_evaluates_once_and_writes_no_checkpoint(tiny, run_here):
    ran = run_here('train.py', *TINY, '--eval_only=True')
    assert len(lines(ran, 'step 0: ')) == 1 and not lines(ran, 'iter ')
    assert not Path('out/ckpt.pt').exists()


def test_eval_only_leaves_the_log_of_the_run_that_is_there_as_it_is(tiny, run_here):
    run_here('train.py', *TINY)
    before = [Path('out', name).read_bytes() for name in ('log.csv', 'machine.txt', 'ckpt.pt')]
    for init_from in ('scratch', 'resume'):
        ran = run_here('train.py', *TINY, '--eval_only=True', f'--init_from={init_from}')
        assert ran.status == 0 and len(lines(ran, 'step ')) == 1
        assert before == [Path('out', name).read_bytes() for name in ('log.csv', 'machine.txt', 'ckpt.pt')]


def test_what_a_run_says_of_its_model_is_the_models_own(tiny, run_here):
    for flags in ([], ['--init_from=resume', '--n_layer=5', '--bias=True']): # a checkpoint has its own
        ran = run_here('train.py', *TINY, *flags)
        assert lines(ran, '2 layers') == ['2 layers, 2 heads, 32 channels, no biases: 0.03M parameters']


def test_full_val_is_the_loss_of_every_token_of_val_bin(tiny, run_here):
    ran = run_here('train.py', *TINY, '--max_iters=4', '--full_val=True')
    model, ids = PlainGPT(**SHAPE), torch.from_numpy(np.fromfile(tiny / 'val.bin', np.uint16).astype(np.int64))
    model.load_state_dict(load()['model'])
    n = (len(ids) - 1) // 16
    loss = model(ids[:n * 16].view(n, 16), ids[1:n * 16 + 1].view(n, 16))[1]
    line, = lines(ran, 'val loss over all of val.bin: ')
    assert float(line.split(': ')[1]) == pytest.approx(loss.item(), abs=1e-4)


def test_a_permutation_visits_every_place_once_an_epoch(tiny, run_here):
    ran = run_here('train.py', *TINY, '--data_order=permutation', '--max_iters=0')
    places, n = ran.names['places'], ran.names['data']['train'].n_windows
    seen = [place for step in range(n) for micro_step in range(2) for place in places(step, micro_step)]
    assert n == (4000 - 1) // 16
    for epoch in range(3):
        assert sorted(seen[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert seen[:n] != seen[n:2 * n]


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_trains_and_only_float16_scales_its_loss(dtype, tiny, run_here):
    ran = run_here('train.py', *TINY, f'--dtype={dtype}')
    assert ran.status == 0 and len(lines(ran, 'iter ')) == 8
    assert bool(load()['scaler']) == (dtype == 'float16')
    assert all(t.dtype == torch.float32 for t in load()['model'].values())


def test_a_run_learns(tiny, run_here):
    write_ids(tiny / 'train.bin', list(range(20)) * 200)
    write_ids(tiny / 'val.bin', list(range(20)) * 20)
    run_here('train.py', *TINY, '--max_iters=60', '--lr_decay_iters=60', '--eval_interval=60')
    evaluations = [row['val_loss'] for row in rows() if 'val_loss' in row]
    assert evaluations[0] > 2.9 and evaluations[-1] < 0.5


def test_a_real_run_ends_without_a_warning(tiny):
    ran = run_script('train.py', *TINY, '--max_iters=3', '--init_from=scratch', cwd=tiny.parents[1],
                     python=['-W', 'error'])
    assert ran.status == 0, ran.err
    assert 'Warning' not in ran.out + ran.err
    assert 'step 3: train loss ' in ran.out and 'iter 2: loss ' in ran.out


# -----------------------------------------------------------------------------
# going on

@pytest.mark.parametrize('order', ['random', 'permutation'])
def test_a_resumed_run_equals_the_unbroken_one_to_the_bit(order, tiny, run_here):
    flags = [*TINY, f'--data_order={order}', '--dropout=0.2', '--eval_interval=5', '--lr_decay_iters=10']
    run_here('train.py', *flags, '--max_iters=10', '--out_dir=unbroken')
    run_here('train.py', *flags, '--max_iters=5', '--out_dir=broken')
    ran = run_here('train.py', *flags, '--max_iters=10', '--out_dir=broken', '--init_from=resume')
    assert len(lines(ran, 'iter ')) == 5
    for key in ('model', 'optimizer', 'ranks', 'iter_num', 'best_val_loss'):
        assert same(load('broken')[key], load('unbroken')[key]), key
    for ours, theirs in zip(rows('broken'), rows('unbroken'), strict=True):
        assert all(ours[k] == theirs[k] for k in ('step', 'loss', 'lr', 'train_loss', 'val_loss') if k in theirs)


def test_an_epoch_goes_on_where_it_was(tiny, run_here):
    flags = [*TINY, '--data_order=permutation', '--max_iters=4']
    first = run_here('train.py', *flags)
    again = run_here('train.py', *flags, '--init_from=resume', '--max_iters=5')
    assert again.names['step'] == 5 and first.names['places'](4, 0) == again.names['places'](4, 0)


def nanogpts_checkpoint(folder, steps=3):
    """A ckpt.pt as nanoGPT writes it under torch.compile, and the plain model in it."""
    torch.manual_seed(11)
    model = PlainGPT(**SHAPE)
    optimizer = nanogpt_optimizer(model, 0.1, 1e-2, (0.9, 0.95))
    for _ in range(steps):
        x = torch.randint(20, (4, 17))
        model(x[:, :-1], x[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    Path(folder).mkdir()
    torch.save({'model': {f'_orig_mod.{name}': t for name, t in model.state_dict().items()},
                'optimizer': optimizer.state_dict(), 'model_args': {**SHAPE, 'dropout': 0.0}, 'iter_num': steps,
                'best_val_loss': torch.tensor(3.0), 'config': {'dataset': 'tiny', 'device': 'cpu', 'compile': True}},
               Path(folder, 'ckpt.pt'))
    return model, optimizer


def test_a_checkpoint_of_nanogpt_resumes_with_its_optimizer(tiny, run_here):
    model, optimizer = nanogpts_checkpoint('out')
    ran = run_here('train.py', *TINY, '--init_from=resume', '--max_iters=4', '--learning_rate=0', '--weight_decay=0',
                   '--decay_lr=False')
    assert ran.status == 0 and [line.split(':')[0] for line in lines(ran, 'iter ')] == ['iter 3']
    assert same(load()['model'], dict(model.state_dict())) # the learning rate was 0
    before, after = optimizer.state_dict()['state'], load()['optimizer']['state']
    assert before.keys() == after.keys()
    assert {float(state['step']) for state in after.values()} == {4.0}
    gradients = [(after[i]['exp_avg'] - 0.9 * before[i]['exp_avg']) / 0.1 for i in before]
    assert 0.1 < sum(g.norm() ** 2 for g in gradients) ** 0.5 < 1.001 # of the fourth step, clipped


def test_what_a_run_writes_loads_in_nanogpt(tiny, run_here):
    run_here('train.py', *TINY)
    checkpoint = load() # weights_only, as torch.load does by default today
    assert set(checkpoint['model_args']) == {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size',
                                             'dropout'}
    model = PlainGPT(**checkpoint['model_args'])
    model.load_state_dict(checkpoint['model'], strict=True)
    nanogpt_optimizer(model, 0.1, 1e-2, (0.9, 0.95)).load_state_dict(checkpoint['optimizer'])
    assert checkpoint['iter_num'] == 8 and float(checkpoint['best_val_loss']) < 3
    assert checkpoint['config']['dataset'] == 'tiny' and checkpoint['config']['device'] == 'cpu'


@pytest.mark.parametrize('change', ['--dataset=small', '--data_order=permutation', '--block_size=8', '--batch_size=2'])
def test_a_run_goes_on_with_other_data_or_batches(change, tiny, run_here):
    run_here('train.py', *TINY, '--max_iters=4')
    shutil.copytree(tiny, 'data/small')
    write_ids('data/small/train.bin', range(18))
    ran = run_here('train.py', *TINY, '--init_from=resume', change)
    assert ran.status == 0 and len(lines(ran, 'iter ')) == 4


def test_a_model_is_resumed_with_a_shorter_context(tiny, run_here):
    run_here('train.py', *TINY)
    ran = run_here('train.py', *TINY, '--init_from=resume', '--block_size=8', '--max_iters=0')
    assert ran.status == 0 and ran.names['raw_model'].config.block_size == 8


def test_only_a_better_val_loss_is_kept_unless_always_asked_for(tiny, run_here):
    flags = [*TINY, '--max_iters=4', '--learning_rate=100', '--grad_clip=0', '--decay_lr=False'] # it gets worse
    run_here('train.py', *flags, '--always_save_checkpoint=False', '--out_dir=best')
    run_here('train.py', *flags, '--always_save_checkpoint=True', '--out_dir=each')
    assert not Path('best/ckpt.pt').exists() and load('each')['iter_num'] == 4


def test_whenever_a_run_is_killed_its_folder_holds_a_whole_checkpoint(tiny):
    command = [PYTHON, ROOT / 'train.py', *TINY, '--eval_interval=1', '--eval_iters=1', '--max_iters=100000',
               '--gradient_accumulation_steps=1']
    reached = 0
    for kill_at, init_from in zip(('saving', 'iter', 'step', 'iter'), ['scratch'] + ['resume'] * 3):
        with subprocess.Popen([*command, f'--init_from={init_from}'], cwd=tiny.parents[1], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              env={**os.environ, 'OMP_NUM_THREADS': '1'}) as run:
            saves = 0
            for line in run.stdout:
                saves += line.startswith('saving checkpoint')
                if saves > 2 and line.startswith(kill_at): # the second waited for the first: that one is written
                    break
            os.kill(run.pid, signal.SIGKILL)
        assert run.returncode == -signal.SIGKILL
        assert load()['iter_num'] > reached
        reached = load()['iter_num']


def test_a_full_disk_is_a_warning_and_leaves_the_earlier_checkpoint(tiny, run_here):
    run_here('train.py', *TINY, '--max_iters=4')
    before = Path('out/ckpt.pt').read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard)) # no file may grow past this
    try:
        ran = run_here('train.py', *TINY, '--init_from=resume')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ran.status == 0 and len(lines(ran, 'iter ')) == 4
    warning, = lines(ran, 'warning: no checkpoint at step 8 (')
    assert Path('out/ckpt.pt').read_bytes() == before
    assert not list(Path('out').glob('*.part'))


def test_a_disk_that_refuses_the_last_moment_leaves_the_earlier_checkpoint(tiny, run_here, monkeypatch):
    run_here('train.py', *TINY, '--max_iters=4')
    before, replace = Path('out/ckpt.pt').read_bytes(), os.replace

    def refuse(source, target):
        if Path(target).name == 'ckpt.pt':
            raise OSError(30, 'Read-only file system')
        replace(source, target)
    monkeypatch.setattr(os, 'replace', refuse)
    ran = run_here('train.py', *TINY, '--init_from=resume')
    assert ran.status == 0 and lines(ran, 'warning: no checkpoint at step 8 (Read-only file system)')
    assert Path('out/ckpt.pt').read_bytes() == before and not list(Path('out').glob('*.part'))


# -----------------------------------------------------------------------------
# several processes

@pytest.mark.parametrize('accumulation', [1, 2, 3])
def test_two_processes_train_as_one_does(accumulation, tiny, run_here):
    flags = [*TINY, '--data_order=permutation', f'--gradient_accumulation_steps={accumulation}', '--full_val=True',
             '--max_iters=6']
    two = run_script('train.py', *flags, '--out_dir=two', cwd=tiny.parents[1], python=TORCHRUN)
    assert two.status == 0, two.err
    one = run_here('train.py', *flags, '--out_dir=one')
    assert len(lines(two, 'iter ')) == len(lines(one, 'iter ')) == 6 # said once
    full_val = [float(lines(ran, 'val loss over all')[0].split(': ')[1]) for ran in (one, two)]
    assert abs(full_val[0] - full_val[1]) < 1e-3, full_val
    for name, t in load('one')['model'].items():
        assert (t - load('two')['model'][name]).abs().max() <= 1e-4, name


def test_a_mistake_under_torchrun_is_named(tiny):
    ran = run_script('train.py', *TINY, '--backend=nccl', cwd=tiny.parents[1], python=TORCHRUN)
    assert ran.status != 0 and '--backend=nccl needs CUDA devices, not cpu; gloo runs anywhere' in ran.err
    assert 'train.py", line' not in ran.err # no traceback of ours


# -----------------------------------------------------------------------------
# wandb

@pytest.fixture
def no_wandb_account(monkeypatch, tmp_path):
    monkeypatch.setenv('WANDB_MODE', 'online')
    monkeypatch.setenv('HOME', str(tmp_path)) # no netrc
    monkeypatch.delenv('WANDB_API_KEY', raising=False)


def test_wandb_without_a_key_is_a_warning_and_the_run_goes_on(no_wandb_account, tiny, run_here):
    ran = run_here('train.py', *TINY, '--wandb_log=True')
    warning, = lines(ran, 'warning: no wandb log')
    assert ran.status == 0 and len(lines(ran, 'iter ')) == 8 and len(rows()) == 11


def test_wandb_without_a_network_is_a_warning_and_the_run_goes_on(no_wandb_account, tiny, run_here, monkeypatch):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_API_KEY', '0' * 40)
    monkeypatch.setenv('WANDB_BASE_URL', 'http://127.0.0.1:9') # nobody listens there
    patient = wandb.Settings
    monkeypatch.setattr(wandb, 'Settings', lambda **given: patient(**{**given, 'init_timeout': 1}))
    ran = run_here('train.py', *TINY, '--wandb_log=True')
    warning, = lines(ran, 'warning: no wandb log (')
    assert ran.status == 0 and len(lines(ran, 'iter ')) == 8 and len(rows()) == 11


# -----------------------------------------------------------------------------
# what cannot be: one line, exit status 1, nothing lost

@pytest.mark.parametrize('flag, words', [
    ('--block_size=500', "val.bin: 500 tokens are too few for block_size=500; at most 499 fits"),
    ('--block_size=4000', "train.bin: 4,000 tokens are too few for block_size=4000; at most 3999 fits"),
    ('--n_head=3', 'n_embd must be a multiple of n_head, got n_embd=32 and n_head=3'),
    ('--init_from=resume', 'train first, or name another --out_dir'),
    ('--init_from=gpt3', "--init_from must be scratch, resume, gpt2, "),
    ('--dataset=nowhere', "data/nowhere: no train.bin"),
    ('--device=tpu', "--device must be auto, cpu, cuda, cuda:N or mps, not 'tpu'"),
    ('--dtype=int8', "--dtype must be auto, float32, bfloat16 or float16, not 'int8'"),
    ('--batch_size=0', '--batch_size must be at least 1, not 0'),
    ('--gradient_accumulation_steps=0', '--gradient_accumulation_steps must be at least 1, not 0'),
    ('--log_interval=0', '--log_interval must be at least 1, not 0'),
    ('--max_iters=-1', '--max_iters must be at least 0'),
    ('--seed=99999999999999', '--seed must be below 4294967296, not 99999999999999'), # a permutation's seed is larger
    ('--learning_rate=1e999', '--learning_rate must be at least 0 and finite, not inf'),
    ('--beta2=1.0', '--beta2 must be at least 0 and below 1, not 1.0'),
    ('--dropout=1.0', 'dropout must be at least 0 and below 1, got 1.0'),
    ('--n_layer=0', 'n_layer must be at least 1, got 0'),
    ('--data_order=sorted', "--data_order must be random or permutation, not 'sorted'"),
    ('--backend=mpi', "--backend must be auto, nccl, gloo or copies, not 'mpi'"),
    ('--out_dir=data/tiny/meta.pkl', '--out_dir=data/tiny/meta.pkl: File exists'),
    ('--TK_kernel=True', '--TK_kernel=True cannot run here: it runs on a CUDA device, not on cpu (what builds it: '),
])
def test_a_setting_that_cannot_be_is_refused_in_one_line(flag, words, tiny, run_here):
    assert_refused(run_here('train.py', *TINY, flag), words)
    assert not Path('out', 'ckpt.pt').exists()


def test_cuda_where_there_is_none_is_refused(tiny, run_here, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for device in ('cuda', 'cuda:1'):
        assert_refused(run_here('train.py', *TINY, f'--device={device}'), f"--device={device}: this machine has no ")


def test_a_refused_run_of_its_own_process_exits_with_1_and_no_traceback(tiny):
    ran = run_script('train.py', *TINY, '--init_from=resume', '--out_dir=nowhere', cwd=tiny.parents[1])
    assert_refused(ran, 'nowhere', 'train first')


@pytest.mark.parametrize('name', ['train.bin', 'val.bin'])
@pytest.mark.parametrize('damage, words', [
    (lambda path: path.write_bytes(b''), 'the file is empty; prepare the data again'),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), 'the file is cut off; prepare the data again'),
    (lambda path: write_ids(path, [20] * 400), 'token id 20 is not below vocab_size=20'),
    (lambda path: path.unlink(), 'data/custom/prepare.py --out_dir=data/tiny makes one of any text'),
    (lambda path: path.rename(path.with_name('prepare.py')), 'prepare it with python data/tiny/prepare.py'),
], ids=['empty', 'truncated', 'ids', 'missing', 'not_prepared'])
def test_damaged_data_is_refused_in_one_line(name, damage, words, tiny, run_here):
    damage(tiny / name)
    assert_refused(run_here('train.py', *TINY), words, name)


@pytest.mark.parametrize('checked_at_start', [True, False])
def test_one_bad_id_ends_the_run_and_costs_no_checkpoint(checked_at_start, tiny, run_here, monkeypatch):
    if not checked_at_start: # as for a file of many gigabytes
        monkeypatch.setattr('data.tokens.CHECK_AT_START_tokens', 0)
    run_here('train.py', *TINY, '--max_iters=4')
    before = Path('out/ckpt.pt').read_bytes()
    write_ids(tiny / 'train.bin', [1] * 3900 + [999] + [1] * 99)
    ran = run_here('train.py', *TINY, '--init_from=resume', '--max_iters=400', '--eval_interval=400')
    assert ran.status == 1 and 'data/tiny/train.bin: token id 999 is not below vocab_size=20' in ran.err
    assert bool(lines(ran, 'iter ')) != checked_at_start
    assert Path('out/ckpt.pt').read_bytes() == before


@pytest.mark.parametrize('damage', [
    lambda whole: b'', lambda whole: whole[:len(whole) // 2], lambda whole: b'no checkpoint at all',
    lambda whole: whole[:2000] + bytes(2000) + whole[4000:], lambda whole: pickle.dumps(os.getcwd),
], ids=['empty', 'truncated', 'text', 'zeros', 'pickle'])
def test_a_damaged_checkpoint_is_refused_and_left_as_it_is(damage, tiny, run_here):
    run_here('train.py', *TINY, '--max_iters=4')
    for path in Path('out').glob('*.pt'):
        damaged = damage(path.read_bytes())
        path.unlink() # the names may share their bytes
        path.write_bytes(damaged)
    assert_refused(run_here('train.py', *TINY, '--init_from=resume'), 'out')
    assert Path('out/ckpt.pt').read_bytes() == damaged


def test_a_checkpoint_of_something_else_is_refused(tiny, run_here):
    Path('out').mkdir()
    for content in ({'model': {}}, [1, 2], {'model': {}, 'model_args': {}, 'iter_num': 0, 'optimizer': {}}):
        torch.save(content, 'out/ckpt.pt')
        assert_refused(run_here('train.py', *TINY, '--init_from=resume'))


class Hostile:
    def __reduce__(self):
        return os.mkdir, ('pwned',)


def test_what_a_hostile_file_holds_is_not_run(tiny, run_here):
    good = (tiny / 'meta.pkl').read_bytes()
    (tiny / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 20, 'stoi': Hostile()}))
    assert_refused(run_here('train.py', *TINY), 'meta.pkl', 'it wants to run posix.mkdir')
    (tiny / 'meta.pkl').write_bytes(good)
    Path('out').mkdir(exist_ok=True)
    torch.save({'model': Hostile()}, 'out/ckpt.pt')
    assert_refused(run_here('train.py', *TINY, '--init_from=resume'))
    assert not Path('pwned').exists()


def test_a_meta_pkl_that_says_nothing_is_refused(tiny, run_here):
    for content in (pickle.dumps([1]), pickle.dumps({'vocab_size': '20'}), b'\x80', b''):
        (tiny / 'meta.pkl').write_bytes(content)
        assert_refused(run_here('train.py', *TINY), 'meta.pkl', 'prepare the data again')


@pytest.mark.parametrize('reason', ['not built: python h100_fwd_setup.py build', 'this device is sm_80'])
def test_a_kernel_that_cannot_run_is_refused_with_the_command_that_builds_it(reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda index: None)
    monkeypatch.setattr('ThunderKittens.examples.attn_causal.why_unavailable', lambda: reason)
    with pytest.raises(SystemExit) as refused:
        choose({'device': 'cuda', 'dtype': 'bfloat16', 'compile': False, 'TK_kernel': True})
    assert reason in refused.value.code and '\n' not in refused.value.code
    assert refused.value.code.count('h100_fwd_setup.py build') == 1


def test_a_count_of_heads_that_cannot_be_is_left_to_the_model_to_refuse(monkeypatch):
    monkeypatch.setattr('ThunderKittens.examples.attn_causal.why_unavailable', lambda: '')
    settings = {'device': 'cpu', 'dtype': 'bfloat16', 'n_embd': 32, 'n_head': 0, 'TK_kernel': 'auto'}
    assert _why_no_kernel(settings, 'cuda', True) == ''


@pytest.mark.parametrize('flags', [[], ['--gradient_accumulation_steps=3', '--bias=True', '--grad_clip=0.1'],
                                   ['--grad_clip=0', '--decay_lr=False', '--full_val=True']])
def test_the_fast_step_trains_as_model_py_does(flags, tiny, run_here, monkeypatch):
    monkeypatch.setattr('configurator._why_not_fast', lambda *_: '') # it runs on a CPU too, slowly
    found = []
    for fast in ('True', 'False'):
        run_here('train.py', *TINY, f'--fast={fast}', f'--out_dir=out-{fast}', *flags)
        found.append([(row.get('loss'), row.get('val_loss')) for row in rows(f'out-{fast}')])
    assert len(found[0]) > 5
    for mine, theirs in zip(*found):
        assert mine == pytest.approx(theirs, abs=2e-4)
    assert load('out-True').keys() == load('out-False').keys()
    one, other = (load(f'out-{fast}')['optimizer'] for fast in ('True', 'False'))
    assert one['param_groups'] == other['param_groups'] and one['state'].keys() == other['state'].keys()


@pytest.mark.parametrize('accumulation', [1, 3]) # a process without a share; two with unequal ones
def test_two_processes_train_fast_as_one_does_plainly(accumulation, tiny, run_here):
    Path('fast.py').write_text(f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport configurator\n"
                               "configurator._why_not_fast = lambda *_: ''\n"
                               f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    flags = [*TINY, '--data_order=permutation', f'--gradient_accumulation_steps={accumulation}', '--bias=True']
    two = run_script(Path('fast.py').resolve(), *flags, '--fast=True', '--out_dir=two', cwd='.', python=TORCHRUN)
    assert two.status == 0, two.err
    run_here('train.py', *flags, '--out_dir=one')
    for name, t in load('one')['model'].items():
        assert (t - load('two')['model'][name]).abs().max() <= 1e-4, name


def test_a_fast_run_does_without_torch_dynamo_which_would_double_the_time_of_its_start(tiny):
    Path('fast.py').write_text(f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport configurator\n"
                               "configurator._why_not_fast = lambda *_: ''\n"
                               f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
                               "print('loaded' if 'torch._dynamo' in sys.modules else 'not loaded')\n")
    for fast, said in (('True', 'not loaded'), ('False', 'loaded')):
        ran = run_script(Path('fast.py').resolve(), *TINY, f'--fast={fast}', cwd='.')
        assert ran.out.splitlines()[-1] == said and Path('out/ckpt.pt').exists(), ran


def test_a_fast_run_goes_on_plainly_and_a_plain_one_fast(tiny, run_here, monkeypatch):
    monkeypatch.setattr('configurator._why_not_fast', lambda *_: '')
    ends = []
    for first, then in (('True', 'True'), ('True', 'False'), ('False', 'True')):
        out_dir = f'out-{first}-{then}'
        run_here('train.py', *TINY, f'--fast={first}', '--max_iters=3', f'--out_dir={out_dir}')
        run_here('train.py', *TINY, f'--fast={then}', '--max_iters=8', f'--out_dir={out_dir}', '--init_from=resume')
        ends.append(load(out_dir)['model'])
    for name, p in ends[0].items():
        for end in ends[1:]:
            torch.testing.assert_close(end[name], p, rtol=1e-3, atol=1e-4)


# -----------------------------------------------------------------------------
# on an H100

GPU = [flag for flag in TINY if not flag.startswith(('--device', '--n_embd'))] + [
    '--n_embd=128', '--max_iters=20', '--lr_decay_iters=20', '--eval_interval=10']


@pytest.mark.gpu
def test_twenty_steps_on_a_gpu_take_what_auto_chooses_and_learn(tiny):
    ran = run_script('train.py', *GPU, cwd=tiny.parents[1], timeout=300)
    assert ran.status == 0, ran.err
    auto, = lines(ran, 'auto: ')
    assert 'device=cuda, dtype=bfloat16, fast=True, compile=False' in auto
    assert len(lines(ran, 'iter ')) == 20
    evaluations = [row['train_loss'] for row in rows() if 'train_loss' in row]
    assert evaluations[-1] < evaluations[0]


@pytest.mark.gpu
@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize('kernel', [False, True])
def test_a_resumed_run_on_a_gpu_equals_the_unbroken_one_to_the_bit(kernel, fast, tiny, run_here, monkeypatch):
    from ThunderKittens.examples import attn_causal
    if kernel and attn_causal.why_unavailable():
        pytest.skip(attn_causal.why_unavailable())
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True, warn_only=True)
    flags = [*GPU, '--compile=False', f'--TK_kernel={kernel}', f'--fast={fast}', '--dropout=0.1']
    try:
        run_here('train.py', *flags, '--out_dir=unbroken')
        run_here('train.py', *flags, '--out_dir=broken', '--max_iters=10')
        run_here('train.py', *flags, '--out_dir=broken', '--init_from=resume')
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(load('broken')['model'], load('unbroken')['model'])


@pytest.mark.gpu
@pytest.mark.parametrize('fast', [False, True])
def test_a_run_waits_for_its_gpu_in_no_step_that_it_does_not_log(fast, tiny, run_here, monkeypatch):
    flags = [*GPU, f'--fast={fast}', '--compile=False', '--eval_interval=1000']

    def forbid_waiting(steps): # once the first have compiled and captured what they need, until the end of the last
        torch.cuda.set_sync_debug_mode('error' if 5 <= steps < 20 else 'default')
    after_each_step(monkeypatch, forbid_waiting)
    try:
        assert run_here('train.py', *flags, '--log_interval=1000').status == 0
        with pytest.raises(RuntimeError, match='synchronizing'): # step 12 does
            run_here('train.py', *flags, '--log_interval=12')
    finally:
        torch.cuda.set_sync_debug_mode('default')
