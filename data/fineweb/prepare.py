"""
FineWeb, already in GPT-2's tokens: train_000001.bin ... and val_000000.bin beside this file.

    python data/fineweb/prepare.py --shards=10              # 1 billion tokens, 2 GB; 103 shards are all 10 billion
    python data/fineweb/prepare.py --from_dir=/my/shards    # fineweb_train_*.bin and fineweb_val_*.bin that are there
    python train.py --dataset=fineweb

A shard is 256 int32 (magic 20240520, version 1, number of tokens, zeros), then the tokens as uint16.
train.py reads the shards where they are. A call after a broken one fetches what is missing.
"""
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository, from any folder
from configurator import configure
from data.bins import make_folder, one_at_a_time, remove, rename
from data.corpus import check_disk

# -----------------------------------------------------------------------------
shards = 10 # of 100 million training tokens each, 1 to 103
from_dir = '' # a local folder with shards instead of the hub
out_dir = str(Path(__file__).resolve().parent)
# -----------------------------------------------------------------------------

HUB_NAME, HUB_SHARDS, SHARD_bytes = 'kjj0/fineweb10B-gpt2', 103, 200_001_024
MAGIC, VERSION, HEADER_bytes = 20240520, 1, 256 * 4


def n_tokens(path):
    """The number of tokens in a shard; OSError with a reason if it is not a whole one."""
    header = np.fromfile(path, dtype='<i4', count=3)
    if len(header) < 3 or header[0] != MAGIC or header[1] != VERSION:
        raise OSError(0, f"must start with {MAGIC}, {VERSION} as int32, got {header[:2].tolist()}")
    size_bytes, want_bytes = path.stat().st_size, HEADER_bytes + 2 * int(header[2])
    if size_bytes != want_bytes:
        raise OSError(0, f"must have {want_bytes:,} bytes for its {header[2]:,} tokens, got {size_bytes:,}")
    return int(header[2])


def is_whole(path):
    try:
        return n_tokens(path) > 0
    except OSError: # not there, or broken
        return False


def fetch_from_hub(name, new):
    from huggingface_hub import hf_hub_download
    try:
        got = hf_hub_download(HUB_NAME, name, repo_type='dataset', local_dir=out_dir)
    except OSError as e:
        sys.exit(f"{HUB_NAME}/{name}: {str(e).splitlines()[0]} Shards on this disk work without: --from_dir=FOLDER")
    rename(got, new)


def fetch_from_dir(name, new):
    """The same bytes under our name; a second copy only where the disk is another one."""
    source = Path(from_dir) / name
    remove(new)
    try:
        try:
            os.link(source, new)
        except OSError:
            shutil.copyfile(source, new)
    except OSError as e:
        sys.exit(f"{source}: {e.strerror}")


def names():
    """What to fetch: 'fineweb_train_000001.bin' and so on."""
    if from_dir:
        found = sorted(p.name for p in Path(from_dir).glob('fineweb_*.bin'))
        if not any('_val_' in n for n in found) or not any('_train_' in n for n in found):
            sys.exit(f"--from_dir={from_dir}: fineweb_train_*.bin and fineweb_val_*.bin must be there,"
                     f" got {len(found)} of them")
        return found
    if not 1 <= shards <= HUB_SHARDS:
        sys.exit(f"--shards must be 1 to {HUB_SHARDS}, got {shards}")
    return ['fineweb_val_000000.bin'] + [f'fineweb_train_{i:06d}.bin' for i in range(1, shards + 1)]


def main():
    make_folder(out_dir)
    one_at_a_time(out_dir)
    wanted = {name: Path(out_dir) / name.removeprefix('fineweb_') for name in names()}
    missing = {name: path for name, path in wanted.items() if not is_whole(path)}
    if not missing:
        print("all shards are there, nothing to do")
    elif not from_dir:
        check_disk(out_dir, len(missing) * SHARD_bytes)
    for name, path in tqdm(missing.items(), unit=' shards') if missing else ():
        new = path.with_name(path.name + '.new')
        (fetch_from_dir if from_dir else fetch_from_hub)(name, new)
        try:
            n_tokens(new)
        except OSError as e:
            remove(new)
            sys.exit(f"{name}: {e.strerror}")
        rename(new, path) # the name appears when the shard is whole
    for split in ('train', 'val'):
        paths = [p for p in wanted.values() if p.name.startswith(split)]
        print(f"{split} has {sum(map(n_tokens, paths)):,} tokens in {len(paths)} shards")


if __name__ == '__main__':
    configure(globals())
    main()
