"""
How a data set is read: train.bin or train_*.bin, val.bin or val_*.bin, and meta.pkl; and its tokenizer.

A .bin file holds token ids and nothing else (nanoGPT's format, uint16 unless meta.pkl says
uint32), or the 256 x int32 header of llm.c's GPT-2 shards before them; a set is one file or
many. Nothing is loaded: a batch reads just its own places. Ids are checked at the start, those of a
large file as they are read.
"""
import io
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import torch

CHECK_AT_START_tokens = 50_000_000 # of a file; a fraction of a second
OPEN_AT_ONCE_files = 64 # of a split; some systems allow a process 256
SHARD_MAGIC, SHARD_HEADER_bytes = 20240520, 1024 # llm.c's .bin header: magic, version, count, ..., 256 int32


class _PlainUnpickler(pickle.Unpickler):
    """Plain values only: what an untrusted pickle would run is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def read_meta(folder):
    """The dict in folder/meta.pkl, {} if there is none; SystemExit with one line if it is not a plain dict."""
    path = Path(folder) / 'meta.pkl'
    if not path.exists():
        return {}
    try:
        meta = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as e: # a damaged pickle can raise anything; every case ends the run with its name
        sys.exit(f"{path}: not a plain meta.pkl ({type(e).__name__}: {e}); prepare the data again")
    size = meta.get('vocab_size') if isinstance(meta, dict) else None
    if type(size) is not int or size < 1:
        sys.exit(f"{path}: vocab_size must be an int of at least 1, got {size!r}; prepare the data again")
    if meta.get('dtype', 'uint16') not in ('uint16', 'uint32'):
        sys.exit(f"{path}: dtype must be uint16 or uint32, got {meta['dtype']!r}; prepare the data again")
    return meta


class Tokens:
    """
    The tokens of one split.

    folder      data/<dataset>
    split       'train' or 'val'
    block_size  T, the length of a sequence in tokens
    vocab_size  ids must be below it
    raises      SystemExit with one line where the files are missing, damaged or too short
    """

    def __init__(self, folder, split, block_size, vocab_size):
        self.block_size, self.vocab_size = block_size, vocab_size
        self.paths = [p for p in [Path(folder) / f'{split}.bin'] if p.exists()] \
            or sorted(Path(folder).glob(f'{split}_*.bin'))
        if not self.paths:
            script = Path(folder, 'prepare.py')
            sys.exit(f"{folder}: no {split}.bin; " + (f"prepare it with python {script}" if script.exists() else
                     f"data/custom/prepare.py --out_dir={folder} makes one of any text"))
        self.dtype = np.dtype(read_meta(folder).get('dtype', 'uint16'))
        self.headers = [self._header_bytes(path) for path in self.paths]
        lengths = [self._length(p, h) for p, h in zip(self.paths, self.headers)]
        self.files = {} # the newest opened, by their place in paths
        for i in range(min(len(self.paths), OPEN_AT_ONCE_files)):
            self._file(i)
        self.n_tokens = sum(lengths)
        # a sequence lies inside one file and needs one more token, the last target
        self.first_start = np.cumsum([0] + [max(0, n - block_size) for n in lengths]) # starts before each file
        self.first_window = np.cumsum([0] + [max(0, (n - 1) // block_size) for n in lengths])
        if self.n_starts < 1:
            sys.exit(f"{self.paths[0]}: {max(lengths):,} tokens are too few for block_size={block_size}; "
                     f"at most {max(lengths) - 1} fits")
        for path, header_bytes, n in zip(self.paths, self.headers, lengths):
            if n <= CHECK_AT_START_tokens:
                self._check(path, np.memmap(path, dtype=self.dtype, mode='r', offset=header_bytes))

    @property
    def n_starts(self):
        """How many places a sequence can start at."""
        return int(self.first_start[-1])

    @property
    def n_windows(self):
        """How many sequences the split holds side by side, without overlap."""
        return int(self.first_window[-1])

    def _header_bytes(self, path):
        with open(path, 'rb') as f:
            start = f.read(12)
        if len(start) < 12 or struct.unpack('<i', start[:4])[0] != SHARD_MAGIC:
            return 0
        _, version, count = struct.unpack('<3i', start)
        if version != 1 or path.stat().st_size != SHARD_HEADER_bytes + 2 * count:
            sys.exit(f"{path}: its header says version {version} and {count:,} tokens, but the file has "
                     f"{path.stat().st_size:,} bytes; fetch it again")
        return SHARD_HEADER_bytes

    def _length(self, path, header_bytes):
        size = path.stat().st_size - header_bytes
        if size == 0:
            sys.exit(f"{path}: the file is empty; prepare the data again")
        if size % self.dtype.itemsize:
            sys.exit(f"{path}: {size:,} bytes are not whole {self.dtype} tokens, the file is cut off; "
                     "prepare the data again")
        return size // self.dtype.itemsize

    def batch(self, starts):
        """Sequences from the given places, numbers below n_starts: x and y (len(starts), T) int64; y one place on."""
        files = np.searchsorted(self.first_start, starts, side='right') - 1
        return self._read(files, [int(s - self.first_start[f]) for s, f in zip(starts, files)])

    def windows(self, numbers):
        """The same for places without overlap, numbers below n_windows."""
        files = np.searchsorted(self.first_window, numbers, side='right') - 1
        return self._read(files, [int(w - self.first_window[f]) * self.block_size for w, f in zip(numbers, files)])

    def _read(self, files, offsets):
        read = np.empty((len(offsets), self.block_size + 1), dtype=self.dtype)
        for row, i, offset in zip(read, files, offsets):
            file = self._file(i)
            file.seek(self.headers[i] + offset * self.dtype.itemsize)
            if file.readinto(row) != row.nbytes:
                sys.exit(f"{self.paths[i]}: shorter than it was at the start; prepare the data again")
        if read.max(initial=0) >= self.vocab_size:
            for row, i in zip(read, files):
                self._check(self.paths[i], row)
        ids = torch.from_numpy(read.astype(np.int64))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous() # (B, T) each

    def _file(self, i):
        """paths[i], open; many files take turns, for a process may have so many open and no more."""
        if i not in self.files:
            try:
                opened = open(self.paths[i], 'rb', buffering=0)
            except OSError as e:
                sys.exit(f"{self.paths[i]}: {e.strerror}")
            if len(self.files) >= OPEN_AT_ONCE_files:
                self.files.pop(next(iter(self.files))).close() # the one that has been open for longest
            self.files[i] = opened
        return self.files[i]

    def __del__(self):
        for file in getattr(self, 'files', {}).values():
            file.close()

    def _check(self, path, ids):
        if ids.max() >= self.vocab_size:
            sys.exit(f"{path}: token id {ids.max()} is not below vocab_size={self.vocab_size}; "
                     "prepare the data again or choose another dataset")


def tokenizer(meta):
    """
    meta     of a checkpoint or a data set; {} means GPT-2's tokens
    returns  (encode, decode, n_tokens): text to ids, ids to text, ids from n_tokens on belong to no token;
             encode raises ValueError naming characters that it does not know
    """
    if 'stoi' in meta:
        stoi, itos = meta['stoi'], meta['itos']

        def encode(text):
            unknown = sorted(set(text) - set(stoi))
            if unknown:
                raise ValueError(f"the model knows {len(stoi)} characters, and {', '.join(map(repr, unknown[:10]))} "
                                 f"{'is' if len(unknown) == 1 else 'are'} not among them")
            return [stoi[c] for c in text]
        return encode, lambda ids: ''.join(itos[i] for i in ids), len(itos)
    from data.text import encoding
    enc = encoding(meta.get('encoding', 'gpt2'))
    return lambda text: enc.encode(text, allowed_special={'<|endoftext|>'}), enc.decode, enc.n_vocab
