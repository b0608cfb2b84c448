"""
Texts of any size to train.bin and val.bin: on all cores, in order, and going on where a killed run stopped.

    write_set(folder, made_from, {'val': (tasks, total), 'train': (tasks, total)}, encode, dtype, unit='documents')

A task is (size, work); encode(work) gives its token ids, in a process of its own. They are
appended to NAME.bin.new; NAME.bin.progress says how far that file is known to be good.
"""
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.bins import as_ids, publish, remove, write_whole

SAVE_EVERY_bytes = 32 << 20 # what a kill can cost


def write_set(folder, made_from, splits, encode, dtype, meta=None, unit='documents', num_proc=0):
    """Make train.bin and val.bin (and meta.pkl) in `folder`; made_from must name all that the bytes depend on."""
    folder, dtype = Path(folder), np.dtype(dtype)
    for name, (tasks, total) in splits.items():
        with tqdm(total=total, unit=' ' + unit, unit_scale=True, desc=f'{name}.bin') as bar:
            write_split(folder / f'{name}.bin', made_from, tasks, encode, dtype, bar, num_proc or n_cores())
    if meta:
        counts = {f'{name}_tokens': (folder / f'{name}.bin.new').stat().st_size // dtype.itemsize for name in splits}
        meta = meta | {'dtype': dtype.name} | counts
    publish(folder, made_from, dtype, meta)
    for name in splits:
        remove(folder / f'{name}.bin.progress')


def write_split(path, made_from, tasks, encode, dtype, bar, num_proc):
    new, progress = path.with_name(path.name + '.new'), path.with_name(path.name + '.progress')
    work_id = {'made_from': made_from, 'total': bar.total} # a run of other work starts over
    n_done, size_bytes = known_good(new, progress, work_id)
    try:
        with open(new, 'r+b' if n_done else 'wb') as f:
            f.truncate(size_bytes) # what came after the last note may be half a task
            f.seek(size_bytes)
            tasks = iter(tasks)
            bar.update(sum(size for size, _ in islice(tasks, n_done)))
            for size, ids in in_order(encode, tasks, num_proc):
                f.write(as_ids(ids, dtype).tobytes())
                bar.update(size)
                n_done += 1
                if f.tell() - size_bytes >= SAVE_EVERY_bytes:
                    size_bytes = note(f, progress, work_id, n_done)
            note(f, progress, work_id, n_done)
    except OSError as e:
        sys.exit(f"{new}: {e.strerror or e}; the same command goes on from here")


def note(f, progress, work_id, n_done):
    """Make sure that the file is on the disk up to here, then write that down."""
    f.flush()
    os.fsync(f.fileno())
    size_bytes = f.tell()
    write_whole(progress, json.dumps({'work': work_id, 'tasks': n_done, 'bytes': size_bytes}).encode())
    return size_bytes


def known_good(new, progress, work_id):
    """(tasks, bytes) that an earlier run of the same work has left in `new`."""
    try:
        record = json.loads(progress.read_text())
        if record['work'] == work_id and new.stat().st_size >= record['bytes']:
            return record['tasks'], record['bytes']
    except (OSError, ValueError, KeyError): # no earlier run, or not one of ours
        pass
    return 0, 0


# -----------------------------------------------------------------------------
# all cores

def n_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def in_order(encode, tasks, num_proc):
    """Yield (size, encode(work)) for each task in order, from num_proc processes; only a few tasks wait in memory."""
    first = list(islice(tasks, 2))
    tasks = chain(first, tasks)
    if num_proc == 1 or len(first) < 2: # not worth the start of a process
        yield from ((size, encode(work)) for size, work in tasks)
        return
    spawn = multiprocessing.get_context('spawn') # fork does not go well with the threads of other libraries
    with ProcessPoolExecutor(num_proc, spawn, start_worker, (encode,)) as pool:
        waiting = deque()
        for size, work in tasks:
            waiting.append((size, pool.submit(run_worker, work)))
            if len(waiting) >= 4 * num_proc:
                size, result = waiting.popleft()
                yield size, result.result()
        while waiting:
            size, result = waiting.popleft()
            yield size, result.result()


def start_worker(encode):
    global _encode # once a process: it may be large
    _encode = encode
    threading.Thread(target=end_with_parent, daemon=True).start()


def run_worker(work):
    return _encode(work)


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1) # the parent was killed: nobody waits for what this process makes


# -----------------------------------------------------------------------------
# disk

def check_disk(folder, need_bytes):
    """Say what the set will need, and stop now rather than in the middle if it is not there."""
    have_bytes = sum(p.stat().st_size for p in Path(folder).glob('*.bin.new')) # of an earlier run
    free_bytes = shutil.disk_usage(folder).free
    need = f"about {need_bytes / 1e6:,.0f} MB needed in {os.path.relpath(folder)}, {free_bytes / 1e6:,.0f} MB free"
    print(need)
    if need_bytes - have_bytes > free_bytes:
        sys.exit(f"not enough room: {need}")
