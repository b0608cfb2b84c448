"""
Shakespeare for GPT-2, in GPT-2's own tokens: train.bin and val.bin beside this file.

    python data/shakespeare/prepare.py            # input.txt; fetched if it is not there, offline too
    python data/shakespeare/prepare.py my.txt     # any text in UTF-8
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository, from any folder
from data.bins import as_ids, is_prepared, one_at_a_time, save
from data.text import choose_text, gpt2_encoding, relative

here = Path(__file__).resolve().parent
one_at_a_time(here)
path, text, sha256 = choose_text(here)
if is_prepared(here, {'sha256': sha256}):
    sys.exit()
print(f"{relative(path)} has {len(text):,} characters, sha256 {sha256}")

encode = gpt2_encoding().encode_ordinary # ordinary: <|endoftext|> in the text is text
n = int(len(text) * 0.9) # split as text, so that val.bin starts at a whole token
save(here, {'sha256': sha256}, as_ids(encode(text[:n])), as_ids(encode(text[n:])))
