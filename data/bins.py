"""
How a data set is written: whole or not at all, and never twice.

    train.bin, val.bin   token ids, nothing else, uint16 (uint32 where the vocabulary needs it)
    meta.pkl             a plain dict, where a reader must know more than that
    prepared.json        written last: what the files were made from, and their sizes in bytes

While a set is being made over an older one there is no train.bin, so that training on
half of each is impossible; without a fitting prepared.json the set is made again.
"""
import fcntl
import json
import os
import pickle
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np


def make_folder(folder):
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        sys.exit(f"{folder}: {e.strerror}")


def write_whole(path, data):
    """Write bytes so that `path` holds all of them or stays as it was, whenever the process ends."""
    path = Path(path)
    part = path.with_name(path.name + '.part')
    try:
        with open(part, 'wb') as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        with suppress(OSError):
            part.unlink()
        sys.exit(f"{path}: {e.strerror}")


def remove(path):
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as e:
        sys.exit(f"{path}: {e.strerror}")


def rename(source, target):
    try:
        os.replace(source, target)
    except OSError as e:
        sys.exit(f"{target}: {e.strerror}")


def one_at_a_time(folder):
    """Wait until no other run prepares `folder`. The lock goes with this process, however it ends."""
    with suppress(OSError): # some network file systems have no locks; then the user keeps the runs apart
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)


def is_prepared(folder, made_from):
    """Is the set in `folder` whole, and made from exactly this? Says so if it is."""
    folder = Path(folder)
    try:
        record = json.loads((folder / 'prepared.json').read_text())
        whole = record['made_from'] == made_from and all(
            (folder / name).stat().st_size == size for name, size in record['bytes'].items())
    except (OSError, ValueError, KeyError): # never made, or not by us
        return False
    if whole:
        print(f"{os.path.relpath(folder)} is ready, nothing to do")
    return whole


def save(folder, made_from, train, val, meta=None):
    """Replace the set in `folder` by arrays of token ids and, if given, meta.pkl; print the counts."""
    for name, ids in (('val', val), ('train', train)):
        write_whole(Path(folder, f'{name}.bin.new'), ids.tobytes())
    publish(folder, made_from, train.dtype, meta)


def publish(folder, made_from, dtype, meta=None):
    """Let train.bin.new, val.bin.new and `meta` replace the set in `folder`, in an order that shows a break."""
    folder = Path(folder)
    for name in ('prepared.json', 'train.bin', 'meta.pkl'):
        remove(folder / name)
    sizes = {f'{name}.bin': (folder / f'{name}.bin.new').stat().st_size for name in ('train', 'val')}
    if meta:
        write_whole(folder / 'meta.pkl', pickle.dumps(meta, protocol=4))
        sizes['meta.pkl'] = (folder / 'meta.pkl').stat().st_size
    for name in ('val.bin', 'train.bin'):
        rename(folder / f'{name}.new', folder / name)
    write_whole(folder / 'prepared.json', json.dumps({'made_from': made_from, 'bytes': sizes}, indent=1).encode())
    for name in ('train.bin', 'val.bin'):
        print(f"{name} has {sizes[name] // dtype.itemsize:,} tokens")


def as_ids(ids, dtype=np.uint16):
    """A list of token ids as an array; ids that do not fit are refused instead of wrapped."""
    ids = np.asarray(ids, dtype=np.int64)
    most = np.iinfo(dtype).max
    if len(ids) and ids.max() > most:
        sys.exit(f"token ids up to {most} fit {np.dtype(dtype)}, got {ids.max()}; data/custom/prepare.py takes more")
    return ids.astype(dtype)
