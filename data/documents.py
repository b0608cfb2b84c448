"""
One's own files as documents: .txt is one document, .jsonl and .parquet have one a row, under 'text'.

    for text, ends_document in pieces('my.txt'): ...

Files may be larger than the memory. What is wrong with a file ends the run with one line that says where.
"""
import hashlib
import json
import sys
from pathlib import Path

from tqdm import tqdm

PIECE_chars = 1 << 20


def sha256_of_files(paths):
    """The sha256 of all their bytes, one after the other."""
    total = hashlib.sha256()
    try:
        with tqdm(total=sum(Path(p).stat().st_size for p in paths), desc='sha256', unit='B', unit_scale=True) as bar:
            for path in paths:
                with open(path, 'rb') as f:
                    while block := f.read(1 << 22):
                        total.update(block)
                        bar.update(len(block))
    except OSError as e:
        sys.exit(f"{e.filename}: {e.strerror}")
    return total.hexdigest()


def pieces(path):
    """Yield (text, does a document end here?): .txt is one document, .jsonl and .parquet have one a row."""
    readers = {'.txt': txt_pieces, '.jsonl': jsonl_rows, '.parquet': parquet_rows}
    suffix = Path(path).suffix
    if suffix not in readers:
        sys.exit(f"{path}: must be {', '.join(readers)}, got {suffix or 'no ending'}")
    try:
        yield from readers[suffix](path)
    except UnicodeDecodeError as e:
        sys.exit(f"{path}: the text must be UTF-8, got byte 0x{e.object[e.start]:02x}")
    except OSError as e:
        sys.exit(f"{path}: {e.strerror or e}")


def txt_pieces(path):
    """Cut only where no token of GPT-2 or its successors can lie across: the tokens are those of the whole text."""
    rest = ''
    with open(path, encoding='utf-8') as f:
        while block := f.read(PIECE_chars):
            rest += block
            cut = last_clean_cut(rest)
            if cut:
                yield rest[:cut], False
                rest = rest[cut:]
    yield rest, True


def last_clean_cut(text):
    """The last place between a lone newline and a letter or digit; 0 if there is none."""
    i = len(text) - 1
    while (i := text.rfind('\n', 1, i)) > 0:
        if not text[i - 1].isspace() and text[i + 1].isalnum():
            return i + 1
    return 0


def jsonl_rows(path):
    with open(path, encoding='utf-8') as f:
        for n, line in enumerate(f, 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except ValueError as e:
                sys.exit(f"{path}:{n}: not JSON, {e}")
            if not isinstance(row, dict) or not isinstance(row.get('text'), str):
                sys.exit(f"{path}:{n}: an object with a string under 'text' is needed, got {line.strip()[:60]}")
            yield row['text'], True


def parquet_rows(path):
    import pyarrow # here, since only this format needs it
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as e:
        sys.exit(f"{path}: {str(e).splitlines()[0]}")
    if 'text' not in file.schema_arrow.names:
        sys.exit(f"{path}: a column 'text' is needed, got {', '.join(file.schema_arrow.names)}")
    n = 0
    for batch in file.iter_batches(batch_size=1000, columns=['text']):
        for text in batch.column(0).to_pylist():
            n += 1
            if not isinstance(text, str):
                sys.exit(f"{path}: row {n}: 'text' must be a string, got {text!r}")
            yield text, True
