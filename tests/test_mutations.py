"""Damaged inputs of every kind: no traceback, no hang, no wrong run."""
import math
import os
import random
import shutil
import signal

import pytest
from conftest import TINY

FLAGS = [*TINY, '--out_dir=out', '--max_iters=2', '--eval_interval=2', '--TK_kernel=False', '--compile=False']


def flip(data, rng):
    """A few bytes with other bits, or the end cut off."""
    data = bytearray(data)
    if rng.random() < 0.3:
        return bytes(data[:rng.randrange(len(data))])
    for _ in range(rng.choice([1, 1, 1, 4])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def scramble(text, rng):
    """A few characters changed, dropped or added; digits stay single, so that no model grows huge."""
    chars = list(text)
    for _ in range(rng.choice([1, 1, 2, 3])):
        i = rng.randrange(len(chars))
        new = rng.choice("abenorstx_=-.'\"# \n()[]\\\0\u00e9")
        if rng.random() < 0.3:
            chars[i] = rng.choice('0123456789') if chars[i].isdigit() else new
        elif rng.random() < 0.5:
            chars.insert(i, new)
        elif not chars[i] == '.': # 0.01 without its point would be a large number
            del chars[i]
    return ''.join(chars)


def damaged_config(rng, tiny):
    text = 'batch_size = 4\nlearning_rate = 0.01\ndropout = 0.1 # some\nbias = True\nwandb_run_name = "a=b"\n'
    with open('config.py', 'w', encoding='utf-8') as f:
        f.write(scramble(text, rng))
    return ['config.py']


def damaged_flags(rng, tiny):
    flags = ['--batch_size=4', '--learning_rate=0.01', '--bias=True', '--dropout=0.1', '--dtype=float32', '--seed=7']
    flags[rng.randrange(len(flags))] = scramble(rng.choice(flags), rng).replace('\0', '')
    return flags


def damaged_bin(rng, tiny):
    path = tiny / rng.choice(['train.bin', 'val.bin'])
    path.write_bytes(flip(path.read_bytes(), rng))
    return []


def damaged_meta(rng, tiny):
    path = tiny / 'meta.pkl'
    path.write_bytes(flip(path.read_bytes(), rng))
    return []


def damaged_checkpoint(rng, tiny):
    for name in rng.sample(sorted(os.listdir('out')), k=rng.choice([1, 3])):
        if name.endswith(('.pt', '.csv')):
            with open(f'out/{name}', 'rb') as f:
                data = f.read()
            os.remove(f'out/{name}') # its other names keep the whole bytes
            with open(f'out/{name}', 'wb') as f:
                f.write(flip(data, rng))
    return ['--init_from=resume', '--max_iters=4', '--eval_interval=4']


KINDS = [damaged_config, damaged_flags, damaged_bin, damaged_meta, damaged_checkpoint]


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)
def test_a_damaged_input_is_refused_in_one_line_or_does_no_harm(kind, tiny, run_here, pytestconfig, request):
    assert run_here('train.py', *FLAGS).status == 0
    shutil.copytree('out', 'whole-out')
    shutil.copytree(tiny, 'whole-data')
    hang = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    request.addfinalizer(lambda: (signal.alarm(0), signal.signal(signal.SIGALRM, hang)))
    for seed in range(pytestconfig.getoption('--mutations') // len(KINDS)):
        for path, whole in (('out', 'whole-out'), (tiny, 'whole-data')):
            shutil.rmtree(path)
            shutil.copytree(whole, path)
        signal.alarm(60)
        ran = run_here('train.py', *FLAGS, *kind(random.Random(seed), tiny)) # a traceback fails the test
        signal.alarm(0)
        last = ran.err.rsplit('\n', 2)[-2] if ran.err.count('\n') else ran.err
        if ran.status == 0:
            assert math.isfinite(ran.names['best_val_loss']), f"seed {seed}: {ran}"
        else:
            assert ran.status == 1 and last, f"seed {seed}: {ran}"
