"""
Shakespeare for a model that reads characters: train.bin, val.bin and meta.pkl beside this file.

    python data/shakespeare_char/prepare.py            # input.txt; fetched if it is not there, offline too
    python data/shakespeare_char/prepare.py my.txt     # any text in UTF-8
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository, from any folder
from data.bins import as_ids, is_prepared, one_at_a_time, save
from data.text import choose_text, relative

here = Path(__file__).resolve().parent
one_at_a_time(here)
path, text, sha256 = choose_text(here)
if is_prepared(here, {'sha256': sha256}):
    sys.exit()

chars = sorted(set(text))
stoi = {ch: i for i, ch in enumerate(chars)}
itos = {i: ch for i, ch in enumerate(chars)}
print(f"{relative(path)} has {len(text):,} characters, {len(chars)} of them distinct, sha256 {sha256}")

ids = as_ids([stoi[ch] for ch in text])
n = int(len(ids) * 0.9)
save(here, {'sha256': sha256}, ids[:n], ids[n:], {'vocab_size': len(chars), 'itos': itos, 'stoi': stoi})
