"""
Every shell command of README.md runs, in a copy of the repository and in the README's order: small settings and a CPU
are appended as flags, since a later flag wins. What cannot run here (a network, an H100's compiler, this test run
inside itself) is checked as far as it goes, with the reason. A command that no line of COMMANDS knows fails.
"""
import os
import re
import shlex
import shutil
import subprocess

import pytest

from conftest import CHARS, PYTHON, ROOT, Ran
from data.curves import write_section

README = (ROOT / 'README.md').read_text()
NOT_COPIED = ('.git', '.venv', '.carry', '*.bin', '*.pkl', 'input.txt', 'prepared.json', 'out*', 'wandb', 'build',
              '.cache', '__pycache__', '.pytest_cache', '.ruff_cache')
TRAIN = ['--device=cpu', '--compile=False', '--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=8',
         '--batch_size=2', '--gradient_accumulation_steps=2', '--max_iters=2', '--eval_iters=1', '--eval_interval=2',
         '--always_save_checkpoint=True']
BENCH = ['--device=cpu', '--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=8', '--batch_size=2', '--steps=2',
         '--warmup=1', '--vocab_size=64']
SPEAK = ['--device=cpu', '--max_new_tokens=3']


def commands():
    """The lines of the README's shell blocks; a block that changes its folder is one command."""
    for block in re.findall(r'^```sh\n(.*?)^```', README, re.DOTALL | re.MULTILINE):
        block = block.replace('\\\n', ' ').strip()
        yield from [block] if block.startswith('cd ') else filter(None, block.splitlines())


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    """The repository as it is cloned, texts to prepare, and a random GPT-2 in transformers' format."""
    from transformers import GPT2Config, GPT2LMHeadModel
    folder = tmp_path_factory.mktemp('readme') / 'repository'
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
    for path in ('data/shakespeare_char/input.txt', 'data/shakespeare/input.txt'):
        (folder / path).write_text(CHARS * 40)
    (folder / 'my.txt').write_text(CHARS * 50)
    (folder / 'documents.jsonl').write_text('{"text": "To be, or not to be, that is the question."}\n' * 30)
    (folder / 'questions.jsonl').write_text('{"ctx": "To be", "endings": ["or", "and", "is", "to"], "label": 0}\n')
    GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder / 'gpt2-small')
    (folder / 'config' / 'smaller.py').write_text(
        "exec(open('config/train_shakespeare_char_cpu.py').read())\n"
        + '\n'.join(flag[2:] for flag in TRAIN if 'device' not in flag))
    return folder


@pytest.fixture
def shell(copy, monkeypatch):
    """Run a line of bash in the copy."""
    from data.text import CACHE
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', os.environ.get('TIKTOKEN_CACHE_DIR') or str(CACHE))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    for name in ('MAKEFLAGS', 'MFLAGS', 'MAKELEVEL', 'PYTHON', 'VENV'): # of a `make test` around this
        monkeypatch.delenv(name, raising=False)

    def run(line):
        done = subprocess.run(['bash', '-c', line], cwd=copy, capture_output=True, text=True, timeout=120)
        return Ran(done.returncode, done.stdout, done.stderr)
    return run


@pytest.fixture
def script(copy, run_here, monkeypatch):
    """Run a `python X.py ...` command with more flags behind its own, in this process."""
    def run(command, *flags):
        monkeypatch.chdir(copy)
        _, path, *given = shlex.split(command)
        return run_here(path, *given, *flags)
    return run


def make_train(command, shell, script):
    small = f'{command} PYTHON={shlex.quote(PYTHON)} VENV= CONFIG=config/smaller.py'
    first, again = shell(small), shell(small)
    assert 'val loss over all of val.bin: ' in first.out and 'holds a trained model' in again.out
    assert 'iter 0: ' not in again.out and first.out.count('---------------') == 1
    shell('mv out-shakespeare-char/trained out-shakespeare-char/begun') # as an interrupted one leaves it
    went_on = shell(small)
    assert 'resuming from step 2' in went_on.out and shell('ls out-shakespeare-char/trained').status == 0
    shell('rm -r out-shakespeare-char data/shakespeare_char/*.bin data/shakespeare_char/prepared.json')
    return again


def make_test(command, shell, script):
    return shell(command.replace('make', 'make -n')) # the tests are what runs here


def requirements(command, shell, script):
    """Packages need a network: each is a requirement that pip can read."""
    from packaging.requirements import Requirement
    words = shlex.split(command)[2:]
    if '-r' in words:
        words = [line.split('#')[0] for line in (ROOT / words[1]).read_text().splitlines()]
    elif '--index-url' in words:
        words = words[:words.index('--index-url')]
    assert all(Requirement(word) for word in words if word.strip())
    return Ran(0, '', '')


def venv(command, shell, script):
    return shell(command.replace('python3', f'{PYTHON}').replace('venv .venv', 'venv --without-pip .venv'))


def setup_of_the_kernels(command, shell, script):
    # the build itself takes an nvcc and is `make kernels` in .ci/run; this is the folder, env.src and the script
    return shell('set -e\n' + command.replace('python ', f'{PYTHON} ').replace(' build', ' build --help'))


def in_a_process(*flags):
    return lambda command, shell, script: shell(command.replace('python ', f'{PYTHON} ', 1) + ' ' + shlex.join(flags))


def torchrun(command, shell, script):
    for old, new in (('torchrun', f'{PYTHON} -m torch.distributed.run'), ('--nproc_per_node=8', '--nproc_per_node=2'),
                     ('--nnodes=2', '--nnodes=1'), ('HOST:29400', 'localhost:0')):
        command = command.replace(old, new)
    return shell(f'{command} {shlex.join(TRAIN)}')


def with_flags(*flags):
    return lambda command, shell, script: script(command, *flags)


LOCAL = '--init_from=gpt2-small' # OpenAI's weights need a network
COMMANDS = [ # what matches the whole command, how it is run, what one then sees
    (r'make train', make_train, '---------------'),
    (r'make test.*', make_test, '-m pytest'),
    (r'pip install .*', requirements, ''),
    (r'python3 -m venv .*', venv, ''),
    (r'cd ThunderKittens/.*h100_fwd_setup\.py build', setup_of_the_kernels, '--build-temp'),
    (r'python data/shakespeare(_char)?/prepare\.py.*', in_a_process(), 'train.bin has '),
    (r'python data/openwebtext/prepare\.py', in_a_process('--data_files=documents.jsonl', '--num_proc=1'), 'train.bin'),
    (r'python data/curves\.py .*', in_a_process(), 'picture: loss.png'),
    (r'python data/export\.py .*', in_a_process(), ''),
    (r'python data/hellaswag/evaluate\.py .*', in_a_process('--init_from=gpt2-small', '--data_file=questions.jsonl',
                                                            '--device=cpu'), '"acc_norm": '),
    (r'python (train|sample|bench|inference)\.py --help', with_flags(), '  --device='),
    (r'python bench\.py.*', with_flags(*BENCH), '"ms_median": '),
    (r'python -m ThunderKittens\.examples\.(attn_causal|gpt2_step)\.bench', in_a_process('--help'), ''), # an H100's
    (r'python train\.py config/train_\S+', with_flags(*TRAIN), 'step 2: train loss '),
    (r'python train\.py .*--init_from=resume', with_flags(*TRAIN, '--max_iters=4'), 'step 4: train loss '),
    (r'python train\.py config/finetune_\S+', with_flags(*TRAIN, LOCAL), 'step 2: train loss '),
    (r'python train\.py config/eval_\S+', with_flags(*TRAIN, LOCAL), 'step 0: train loss '),
    (r'(\w+=1 )?torchrun .*train\.py .*', torchrun, 'step 2: train loss '),
    (r'python sample\.py --init_from=gpt2\S* .*', with_flags(*SPEAK, LOCAL), '---------------'),
    (r'python sample\.py .*', with_flags(*SPEAK), '---------------'),
    (r'python inference\.py --bench=True .*', with_flags('--device=cpu', '--max_new_tokens=8', '--sizes=1x1x8',
                                                         '--batches=1', '--prompts=4', '--repeats=1', '--readme=False'),
     '| 1x1x8 | 1 | 4 |'),
    (r'python inference\.py.*', with_flags(*SPEAK, LOCAL), '"tokens_per_s": '),
]
GPT2_TOKENS = r'.*(gpt2|shakespeare/|finetune|out-shakespeare$|inference|openwebtext|export|hellaswag).*'


@pytest.mark.parametrize('command', list(commands()))
def test_a_command_of_the_readme_runs(command, shell, script, request):
    if re.fullmatch(GPT2_TOKENS, command):
        request.getfixturevalue('gpt2_tokens')
    for pattern, how, seen in COMMANDS:
        if re.fullmatch(pattern, command, re.DOTALL):
            ran = how(command, shell, script)
            assert ran.status == 0, ran
            assert seen in ran.out and 'Traceback' not in ran.err
            return
    pytest.fail(f"COMMANDS does not know how to run {command!r} in small")


def test_the_packages_for_older_drivers_are_those_of_the_requirements():
    wanted = {re.match(r'[\w-]+', line)[0] for line in (ROOT / 'requirements.txt').read_text().splitlines()}
    listed = {re.match(r'[\w-]+', word)[0] for line in commands() if line.startswith('pip install') and '-r' not in line
              for word in shlex.split(line)[2:] if not word.startswith(('-', 'http', 'cuda-toolkit'))}
    assert listed == wanted


def test_what_running_needs_is_pinned_and_what_only_tests_need_stands_apart():
    needed = (ROOT / 'requirements.txt').read_text()
    assert re.search(r'^torch==2\.13\.0\b', needed, re.MULTILINE) and 'pytest' not in needed
    assert 'pytest' in (ROOT / 'requirements-dev.txt').read_text()


def test_the_scripts_at_the_top_are_nanogpts():
    assert {path.name for path in ROOT.glob('*.py')} == {
        'model.py', 'train.py', 'sample.py', 'bench.py', 'inference.py', 'configurator.py'}


def test_the_tree_of_the_readme_is_there():
    tree = re.search(r'## The tree\n\n```\n(.*?)```', README, re.DOTALL)[1]
    for path in re.findall(r'^(\S+)', tree, re.MULTILINE):
        assert list(ROOT.glob(path.replace('<name>', '*').rstrip('/'))), path


@pytest.mark.parametrize('name', ['step', 'generation', 'curves chars', 'curves gpt2', 'curves step'])
def test_every_table_that_a_command_writes_has_its_place_in_the_readme(name, tmp_path):
    page = tmp_path / 'README.md'
    page.write_text(README)
    write_section(page, name, 'a table')
    before, table, after = page.read_text().partition(f'<!-- {name} begin -->\na table\n<!-- {name} end -->\n')
    assert table and README.startswith(before) and README.endswith(after) # nothing else has changed


def test_files_that_the_readme_links_to_are_there():
    for path in re.findall(r'\]\((?!http)([^)#]+)', README):
        assert (ROOT / path).exists(), path
