"""
Any text of one's own: train.bin, val.bin and meta.pkl in a folder that train.py reads as --dataset.

    python data/custom/prepare.py my.txt --encoding=char --out_dir=data/mytext
    python data/custom/prepare.py a.jsonl b.parquet --encoding=gpt2 --out_dir=data/mytext
    python train.py --dataset=mytext

.txt is one document; .jsonl and .parquet have one a row, under 'text'. Tokens are characters
(char), GPT-2's (gpt2) or those of any encoding that tiktoken knows (cl100k_base, ...). A document
ends in the encoding's end-of-text token; with char, a row ends in a newline. The first 90 % of
the characters are train.bin. A run that was killed goes on where it stopped.
"""
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository, from any folder
from configurator import configure
from data.bins import is_prepared, make_folder, one_at_a_time
from data.corpus import check_disk, write_set
from data.documents import pieces, sha256_of_files
from data.text import encoding as tiktoken_encoding

# -----------------------------------------------------------------------------
encoding = 'gpt2' # char, gpt2 or another name that tiktoken knows
out_dir = 'data/custom'
val_fraction = 0.1 # of the characters, taken from the end
num_proc = 0 # 0: one process a core
# -----------------------------------------------------------------------------

TASK_chars = 1 << 20


class EncodeChars:
    def __init__(self, stoi):
        self.stoi = stoi

    def __call__(self, parts):
        return np.array([self.stoi[ch] for text, _ in parts for ch in text], dtype=np.uint32)


class EncodeBPE:
    def __init__(self, bpe):
        self.bpe = bpe

    def __call__(self, parts):
        ids = []
        for text, ends_document in parts:
            ids += self.bpe.encode_ordinary(text)
            ids += [self.bpe.eot_token] if ends_document else []
        return np.array(ids, dtype=np.uint32)


def read(files):
    """All pieces of all files, as (text, does a document end here?)."""
    for path in files:
        for text, ends_document in pieces(path):
            is_row = ends_document and not path.endswith('.txt')
            yield text + '\n' if is_row and encoding == 'char' else text, ends_document


def count(files):
    """What must be known before the first token: (number of characters, number of documents, distinct characters)."""
    n_chars, n_documents, chars = 0, 0, set()
    for text, ends_document in tqdm(read(files), desc='counting', unit=' pieces'):
        n_chars += len(text)
        n_documents += ends_document
        chars.update(text if encoding == 'char' else '')
    return n_chars, n_documents, sorted(chars)


def between(parts, start, end):
    """The characters start to end of all pieces."""
    at = 0
    for text, ends_document in parts:
        first, last = max(start - at, 0), min(end - at, len(text))
        if first < last:
            yield text[first:last], ends_document and last == len(text)
        at += len(text)


def tasks(parts):
    """Pieces, small ones put together, as (number of characters, pieces)."""
    together, n_chars = [], 0
    for text, ends_document in parts:
        together.append((text, ends_document))
        n_chars += len(text)
        if n_chars >= TASK_chars:
            yield n_chars, together
            together, n_chars = [], 0
    if together:
        yield n_chars, together


def main(files):
    if not files or not 0 < val_fraction < 1:
        sys.exit(f"one FILE or more and 0 < val_fraction < 1 are needed, got {len(files)} and {val_fraction}")
    bpe = None if encoding == 'char' else tiktoken_encoding(encoding)
    sha256 = sha256_of_files(files)
    make_folder(out_dir)
    one_at_a_time(out_dir)
    made_from = {'sha256': sha256, 'encoding': encoding, 'val_fraction': val_fraction}
    if is_prepared(out_dir, made_from):
        return
    n_chars, n_documents, chars = count(files)
    cut = int(n_chars * (1 - val_fraction))
    if not 0 < cut < n_chars:
        sys.exit(f"{', '.join(files)}: {n_chars} characters are too few to split in two")
    print(f"{n_chars:,} characters in {n_documents:,} documents, sha256 {sha256}")

    meta = {'vocab_size': bpe.n_vocab if bpe else len(chars), 'encoding': encoding, 'sha256': sha256,
            'characters': n_chars, 'documents': n_documents}
    if not bpe:
        meta |= {'stoi': dict(zip(chars, range(len(chars)), strict=True)), 'itos': dict(enumerate(chars))}
    dtype = np.dtype(np.uint16 if meta['vocab_size'] <= 1 << 16 else np.uint32)
    print(f"{meta['vocab_size']:,} tokens in the vocabulary, kept as {dtype}")
    check_disk(out_dir, n_chars * dtype.itemsize // (4 if bpe else 1)) # BPE: about 4 characters a token
    splits = {'val': (tasks(between(read(files), cut, n_chars)), n_chars - cut),
              'train': (tasks(between(read(files), 0, cut)), cut)}
    encode = EncodeBPE(bpe) if bpe else EncodeChars(meta['stoi'])
    write_set(out_dir, made_from, splits, encode, dtype, meta, 'chars', num_proc)


if __name__ == '__main__':
    args = sys.argv[1:]
    configure(globals(), argv=[arg for arg in args if arg.startswith('-')])
    main([arg for arg in args if not arg.startswith('-')])
