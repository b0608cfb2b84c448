"""What all tests share: no network, few threads, the `gpu` mark, a tiny data set, two ways to run a script."""
import os
import pickle
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1') # a test that reaches for the hub fails at once instead of retrying
os.environ.setdefault('WANDB_MODE', 'disabled')

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable


def pytest_addoption(parser):
    parser.addoption('--kills', type=int, default=4, help="how often test_runs.py kills a run with -9")
    parser.addoption('--mutations', type=int, default=100, help="how many damaged inputs test_mutations.py tries")


def pytest_collection_modifyitems(items):
    from ThunderKittens.examples.attn_causal import why_no_h100
    for item in items:
        if item.get_closest_marker('gpu') and why_no_h100():
            item.add_marker(pytest.mark.skip(reason=why_no_h100()))


def nvcc_or_skip():
    """Path of nvcc."""
    from ThunderKittens.examples.attn_causal import h100_fwd_setup
    try:
        return h100_fwd_setup.find_nvcc()
    except SystemExit as missing:
        pytest.skip(str(missing))


# -----------------------------------------------------------------------------
# scripts

class Ran(NamedTuple):
    status: int
    out: str
    err: str
    names: dict = {} # the script's globals, where it ran in this process


def run_script(script, *flags, cwd=ROOT, timeout=120, env=None, python=()):
    """Run a script as a user does, in a process of its own."""
    done = subprocess.run([PYTHON, *python, ROOT / script, *flags], cwd=cwd, capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, 'OMP_NUM_THREADS': '1', **(env or {})})
    return Ran(done.returncode, done.stdout, done.stderr)


def run_as_main(script):
    """Its globals. Its folder is let go, as at the end of a process."""
    import data.run
    try:
        return runpy.run_path(str(ROOT / script), run_name='__main__')
    finally:
        data.run.lock(None, print)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run a script in this process, where torch is loaded already: a traceback fails the test by itself."""
    import torch
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    torch.set_num_threads(1)

    def run(script, *flags):
        monkeypatch.setattr(sys, 'argv', [str(ROOT / script), *map(str, flags)])
        capsys.readouterr()
        status, last_line, names = 0, '', {}
        try:
            names = run_as_main(script)
        except SystemExit as e: # the interpreter would print a text and exit with 1
            status, last_line = (1, f'{e.code}\n') if isinstance(e.code, str) else (e.code or 0, '')
        pipe = signal.set_wakeup_fd(-1)
        if pipe >= 0: # the run's thread that listened ends with it
            os.close(pipe)
        out, err = capsys.readouterr()
        return Ran(status, out, err + last_line, names)
    yield run
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def assert_refused(ran, *words):
    """One line on stderr that holds all the words, and exit status 1."""
    assert ran.status == 1, ran
    assert ran.err.count('\n') == 1 and '\r' not in ran.err, ran.err # no bar either
    for word in words:
        assert word in ran.err


# -----------------------------------------------------------------------------
# a tiny data set

CHARS = "\n abcdefghijklmnop.:"
TINY = ['--dataset=tiny', '--device=cpu', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=16',
        '--batch_size=4', '--gradient_accumulation_steps=2', '--eval_iters=2', '--eval_interval=4', '--max_iters=8',
        '--warmup_iters=2', '--lr_decay_iters=8', '--learning_rate=1e-2']


def write_ids(path, ids, dtype=np.uint16):
    Path(path).write_bytes(np.asarray(ids, dtype=dtype).tobytes())


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """data/tiny, a set of 20 characters, in an empty folder that is the current one during the test."""
    folder = tmp_path / 'data' / 'tiny'
    folder.mkdir(parents=True)
    words = np.random.default_rng(0).integers(len(CHARS), size=(40, 5)) # 40 words in random order: worth learning
    for split, n in (('train', 800), ('val', 100)):
        write_ids(folder / f'{split}.bin', words[np.random.default_rng(n).integers(40, size=n)].reshape(-1))
    meta = {'vocab_size': len(CHARS), 'itos': dict(enumerate(CHARS)), 'stoi': {c: i for i, c in enumerate(CHARS)}}
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def double():
    import torch
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope='session')
def gpt2_tokens():
    """Skips where GPT-2's tokenizer is neither on this machine's disk nor to be had."""
    from data.text import gpt2_encoding
    try:
        gpt2_encoding()
    except SystemExit as e:
        pytest.skip(str(e))
