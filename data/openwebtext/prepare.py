"""
OpenWebText in GPT-2's tokens: train.bin (about 17 GB) and val.bin beside this file.

    python data/openwebtext/prepare.py                                   # 8 million documents from the hub
    python data/openwebtext/prepare.py --data_files=a.parquet,b.parquet  # local .parquet, .jsonl or .txt files

Every document ends in token 50256. A run that was killed goes on where it stopped.
"""
import sys
from math import ceil
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository, from any folder
from configurator import configure
from data.bins import is_prepared, make_folder, one_at_a_time
from data.corpus import check_disk, write_set
from data.documents import sha256_of_files
from data.text import gpt2_encoding

# -----------------------------------------------------------------------------
data_files = '' # local files, separated by commas, instead of the hub
out_dir = str(Path(__file__).resolve().parent)
num_proc = 0 # 0: one process a core
# -----------------------------------------------------------------------------

HUB_NAME, HUB_ROWS = 'Skylion007/openwebtext', 8_013_769
LOADERS = {'.parquet': 'parquet', '.jsonl': 'json', '.txt': 'text'}
DOCS_PER_TASK = 1000


class EncodeRows:
    """GPT-2's tokens of some rows of a dataset, each row followed by the end-of-text token."""

    def __init__(self, rows):
        self.rows, self.gpt2 = rows, gpt2_encoding()

    def __call__(self, indices):
        ids = []
        for text in self.rows[indices]['text']:
            ids += self.gpt2.encode_ordinary(text)
            ids.append(self.gpt2.eot_token)
        return np.array(ids, dtype=np.uint32)


def load_hub():
    from datasets import load_dataset
    print(f"loading {HUB_NAME}: about 54 GB in the cache of the hub ($HF_HOME), then 17 GB in {out_dir}")
    try:
        try:
            rows = load_dataset(HUB_NAME, split='train')
        except RuntimeError as e: # newer releases of datasets run no loading scripts
            if 'scripts are no longer supported' not in str(e):
                raise
            print(f"{e}; taking the hub's own export to parquet, revision refs/convert/parquet")
            rows = load_dataset(HUB_NAME, split='train', revision='refs/convert/parquet')
    except OSError as e:
        sys.exit(f"{HUB_NAME}: {str(e).splitlines()[0]}; local files work without the hub: --data_files=FILE,...")
    if len(rows) != HUB_ROWS:
        print(f"note: {len(rows):,} documents instead of {HUB_ROWS:,}: losses are not quite comparable")
    return rows


def load_local(files):
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    kinds = {Path(f).suffix for f in files}
    if len(kinds) != 1 or not kinds <= set(LOADERS):
        sys.exit(f"--data_files: files of one kind, {', '.join(LOADERS)}, got {', '.join(sorted(kinds))}")
    whole_files = {'sample_by': 'document'} if kinds == {'.txt'} else {} # a text file is a document
    try:
        rows = load_dataset(LOADERS[kinds.pop()], data_files=files, split='train', **whole_files)
    except DatasetGenerationError as e:
        reason = str(e.__cause__ or e).splitlines()[0]
        sys.exit(f"--data_files={data_files}: {reason}")
    if 'text' not in rows.column_names:
        sys.exit(f"--data_files={data_files}: a column 'text' is needed, got {', '.join(rows.column_names)}")
    return rows.select_columns('text')


def split(n_rows):
    """nanoGPT's split: 0.05 % of the rows to val, drawn by the generator that datasets' train_test_split uses."""
    n_val = ceil(n_rows * 0.0005)
    order = np.random.default_rng(2357).permutation(n_rows)
    return {'val': order[:n_val], 'train': order[n_val:]}


def tasks(rows):
    for start in range(0, len(rows), DOCS_PER_TASK):
        chosen = rows[start:start + DOCS_PER_TASK]
        yield len(chosen), chosen


def main():
    make_folder(out_dir)
    one_at_a_time(out_dir)
    files = [f for f in data_files.split(',') if f]
    source = {'files_sha256': sha256_of_files(files)} if files else {'hub': HUB_NAME}
    if is_prepared(out_dir, source):
        return
    rows = load_local(files) if files else load_hub()
    if len(rows) < 2:
        sys.exit(f"2 documents or more are needed, one of them for val.bin, got {len(rows)};"
                 " data/custom/prepare.py splits a single text")
    check_disk(out_dir, 2 * (rows.data.nbytes // 4)) # about 4 bytes of text a token, 2 bytes a token of uint16
    splits = {name: (tasks(part), len(part)) for name, part in split(len(rows)).items()}
    write_set(out_dir, source, splits, EncodeRows(rows), np.uint16, num_proc=num_proc)


if __name__ == '__main__':
    configure(globals())
    main()
