"""Settings from config files and flags: what passes, and how a mistake is refused."""
import ast

import pytest

from configurator import choose, configure
from conftest import ROOT, assert_refused, run_script

NANOGPT = { # the seven files of nanoGPT's config/, comments left out
    'eval_gpt2.py': "batch_size = 8\neval_iters = 500\neval_only = True\nwandb_log = False\ninit_from = 'gpt2'\n",
    'eval_gpt2_medium.py': "batch_size = 8\neval_iters = 500\neval_only = True\nwandb_log = False\n"
                           "init_from = 'gpt2-medium'\n",
    'eval_gpt2_large.py': "batch_size = 8\neval_iters = 500\neval_only = True\nwandb_log = False\n"
                          "init_from = 'gpt2-large'\n",
    'eval_gpt2_xl.py': "batch_size = 8\neval_iters = 500\neval_only = True\nwandb_log = False\ninit_from = 'gpt2-xl'\n",
    'finetune_shakespeare.py': """
import time
out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False # feel free to turn on
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
init_from = 'gpt2-xl' # this is the largest GPT-2 model
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
""",
    'train_gpt2.py': """
wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
""",
    'train_shakespeare_char.py': """
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
device = 'cpu'  # the two lines that nanoGPT suggests for a macbook
compile = False
""",
}
AUTO = {'compile': bool, 'TK_kernel': bool}


def settings_of(script):
    """The settings at the head of a script, as its globals hold them before configure()."""
    head = (ROOT / script).read_text().split('config = configure(')[0]
    assignments = [node for node in ast.parse(head).body
                   if isinstance(node, ast.Assign) and not node.targets[0].id.startswith('_')]
    names = {}
    exec(compile(ast.Module(assignments, []), script, 'exec'), names)
    return names


def some():
    return {'batch_size': 12, 'learning_rate': 6e-4, 'wandb_run_name': 'gpt2', 'bias': False, 'dataset': 'owt',
            'compile': 'auto', 'TK_kernel': 'auto'}


def refusal(*argv):
    with pytest.raises(SystemExit) as refused:
        configure(some(), AUTO, argv)
    assert isinstance(refused.value.code, str) # the interpreter prints a text to stderr and exits with status 1
    assert '\n' not in refused.value.code
    return refused.value.code


@pytest.fixture
def file(tmp_path):
    def write(text, name='mine.py'):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)
    return write


@pytest.mark.parametrize('name', NANOGPT)
def test_nanogpts_own_config_files_pass_unchanged(name, file):
    config = configure(settings_of('train.py'), AUTO, [file(NANOGPT[name], name)])
    wanted = {}
    exec(NANOGPT[name], wanted)
    for key, value in wanted.items():
        if key in config and key != 'wandb_run_name': # it may hold the time
            assert config[key] == value and type(config[key]) is type(value)


@pytest.mark.parametrize('path', sorted(ROOT.glob('config/*.py')), ids=lambda path: path.name)
def test_every_file_in_config_passes(path):
    configure(settings_of('train.py'), AUTO, [str(path)])


def test_the_settings_of_train_are_nanogpts_with_nanogpts_defaults():
    ours = settings_of('train.py')
    for key, value in dict(
            out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False,
            always_save_checkpoint=True, init_from='scratch', wandb_log=False, wandb_project='owt',
            wandb_run_name='gpt2', dataset='openwebtext', gradient_accumulation_steps=40, batch_size=12,
            block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False, learning_rate=6e-4,
            max_iters=600000, weight_decay=1e-1, beta1=0.9, beta2=0.95, grad_clip=1.0, decay_lr=True,
            warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5).items():
        assert ours[key] == value and type(ours[key]) is type(value), key
    for key in ('device', 'dtype', 'compile', 'TK_kernel', 'backend'):
        assert ours[key] == 'auto', key


def test_later_arguments_win_over_earlier_ones(file):
    path = file("batch_size = 3\nbias = True\n")
    assert configure(some(), AUTO, ['--batch_size=1', path])['batch_size'] == 3
    config = configure(some(), AUTO, [path, '--batch_size=1', '--batch_size=2'])
    assert (config['batch_size'], config['bias']) == (2, True)


def test_the_settings_end_up_in_the_script_and_are_said(capsys):
    names = some()
    configure(names, AUTO, ['--batch_size=3'])
    assert names['batch_size'] == 3
    assert "override batch_size = 3 (was 12, from --batch_size=3)" in capsys.readouterr().out


def test_a_config_file_may_compute_with_the_settings_before_it(file):
    assert configure(some(), AUTO, [file("import math\nbatch_size = 2 * batch_size")])['batch_size'] == 24


def test_an_int_stands_for_a_float(file):
    for arg in ('--learning_rate=1', file("learning_rate = 1")):
        value = configure(some(), AUTO, [arg])['learning_rate']
        assert value == 1.0 and type(value) is float


def test_text_is_taken_as_it_stands():
    for text in ('a=b', '123', 'None', '', "it's", 'a b'):
        assert configure(some(), AUTO, [f'--wandb_run_name={text}'])['wandb_run_name'] == text


@pytest.mark.parametrize('name', ['compile', 'TK_kernel'])
def test_auto_or_a_bool_is_taken_in_flags_and_files(name, file):
    for value in (True, False, 'auto'):
        for arg in (f'--{name}={value}', file(f"{name} = {value!r}")):
            got = configure(some(), AUTO, [f'--{name}=True', arg])[name]
            assert got == value and type(got) is type(value)
    for arg in (f'--{name}=1', f'--{name}=true', f'--{name}=', file(f"{name} = 'yes'"), file(f"{name} = 1")):
        assert f"{name} must be 'auto' or bool, not " in refusal(arg)


def test_a_typo_is_refused_with_the_near_name(file):
    assert refusal('--btach_size=3') == "--btach_size=3: unknown setting 'btach_size', did you mean 'batch_size'?"
    path = file("btach_size = 3")
    assert refusal(path) == f"{path}: unknown setting 'btach_size', did you mean 'batch_size'?"
    assert "unknown setting 'qqq'" in refusal('--qqq=3')


def test_a_wrong_type_is_refused_with_the_right_one(file):
    for arg in ('--batch_size=big', '--batch_size=1.5', '--batch_size=None', '--batch_size=True', '--batch_size=',
                file("batch_size = '12'"), file("batch_size = 12.0")):
        message = refusal(arg)
        assert message.startswith(arg) and "batch_size must be int, like 12, not " in message
    assert "bias must be bool, like False, not 'false'" in refusal('--bias=false')
    assert "learning_rate must be float" in refusal('--learning_rate=1e-3x')
    assert "dataset must be str, like 'owt', not 3" in refusal(file("dataset = 3"))
    assert "learning_rate must be float" in refusal('--learning_rate=1' + '0' * 400)


def test_a_flag_without_a_value_is_refused():
    assert refusal('--bias') == "--bias: write --bias=VALUE"


@pytest.mark.parametrize('text, words', [
    ("batch_size = (", ":1: SyntaxError"),
    ("\nbatch_size = 1 / 0", ":2: ZeroDivisionError: division by zero"),
    ("x = 1\nbatch_size = nowhere", ":2: NameError: name 'nowhere' is not defined"),
    (b"batch_size = 3 # \xe9t\xe9", ": not UTF-8 text"),
    (b"batch_size = 3\0", ""),
    ("for n in (1, 2):\n    n_layer = n", ": unknown setting 'n'; --help lists all; a helper's name begins with _"),
])
def test_a_broken_config_file_is_named_with_its_line(text, words, file):
    path = file(text)
    assert refusal(path).startswith(path + words)


def test_a_config_file_may_import_and_define_as_nanogpts_may(file):
    text = "from datetime import datetime\nimport math\ndef half(n):\n    return n // 2\n_n = 64\nbatch_size = half(_n)"
    assert configure(some(), AUTO, [file(text)])['batch_size'] == 32


def test_a_missing_config_file_is_named(tmp_path):
    assert refusal('config/nowhere.py') == "config/nowhere.py: No such file or directory"
    assert refusal(str(tmp_path)) == f"{tmp_path}: Is a directory"


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'bench.py', 'inference.py'])
def test_help_lists_every_setting_with_its_default_and_comment(script, run_here):
    ran = run_here(script, '--help')
    assert (ran.status, ran.err) == (0, '')
    lines = {line.split('=')[0].strip(): line for line in ran.out.splitlines() if line.startswith('  --')}
    for name, default in settings_of(script).items():
        if not name.startswith('__'):
            assert f'--{name}={default!r}' in lines[f'--{name}']
    assert "torch.compile: True or False" in ran.out or script == 'inference.py'


def test_a_mistake_ends_a_real_run_before_any_work(tmp_path):
    (tmp_path / 'typo.py').write_text("out_dir = 'made'\nlerning_rate = 1e-3\n")
    ran = run_script('train.py', 'typo.py', cwd=tmp_path)
    assert_refused(ran, "typo.py: unknown setting 'lerning_rate', did you mean 'learning_rate'?")
    assert [path.name for path in tmp_path.iterdir()] == ['typo.py']


@pytest.fixture
def two_gpus(monkeypatch):
    """Compute capabilities of GPUs that are not there: the first two, of which a test may change one."""
    import torch

    from ThunderKittens.examples import attn_causal, decode, gemm_gelu
    capabilities, current = [(9, 0), (9, 0)], [0]
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    monkeypatch.setattr('torch.cuda.set_device', lambda index: current.__setitem__(0, index))
    monkeypatch.setattr('torch.cuda.get_device_capability', lambda: capabilities[current[0]])
    monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda **_: torch.cuda.get_device_capability() >= (8, 0))
    monkeypatch.setattr('importlib.util.find_spec', lambda name: True)
    monkeypatch.setenv('CC', 'cc')
    monkeypatch.setattr(decode, 'why_unavailable', decode.why_unavailable.__wrapped__) # without its memory
    for package in (attn_causal, gemm_gelu):
        monkeypatch.setattr(package, '_load', lambda: (object(), ''))
    return capabilities


ALL_AUTO = {'device': 'cuda', 'dtype': 'auto', 'fast': 'auto', 'compile': 'auto', 'TK_kernel': 'auto', 'n_head': 12,
        'n_embd': 768}


@pytest.mark.parametrize('compiler', ['/usr/bin/cc', None])
def test_a_gpu_without_a_c_compiler_compiles_nothing_by_itself(compiler, two_gpus, monkeypatch):
    monkeypatch.delenv('CC')
    monkeypatch.setattr('shutil.which', lambda name: compiler)
    assert choose(ALL_AUTO | {'fast': False, 'TK_kernel': False})['compile'] == bool(compiler)


@pytest.mark.parametrize('first, second, device, chosen', [
    ((9, 0), (8, 0), 'cuda:1', dict(TK_kernel=False, fast=True, dtype='bfloat16')),
    ((8, 0), (9, 0), 'cuda:1', dict(TK_kernel=True, fast=True)), ((9, 0), (8, 0), 'cuda', dict(TK_kernel=True)),
    ((9, 0), (7, 5), 'cuda:1', dict(TK_kernel=False, fast=False, dtype='float16'))])
def test_what_a_gpu_can_do_is_asked_of_the_one_that_runs(first, second, device, chosen, two_gpus):
    two_gpus[:] = first, second
    got = choose(ALL_AUTO | {'device': device})
    assert {name: got[name] for name in chosen} == chosen


def test_plain_nanogpt_is_compiled_and_has_nothing_of_ours(two_gpus):
    got = choose(ALL_AUTO | {'plain': True})
    assert (got['compile'], got['fast'], got['TK_kernel']) == (True, False, False)


@pytest.mark.parametrize('loads, n_embd, said', [('', 768, ''), ('the kernels are not built', 768, 'not built'),
                                                 ('', 100, 'multiples of 8, not 100')])
def test_a_step_whose_matmuls_leave_out_gelu_says_why(loads, n_embd, said, two_gpus, monkeypatch, capsys):
    from ThunderKittens.examples import gemm_gelu
    monkeypatch.setattr(gemm_gelu, '_load', lambda: (object(), loads))
    choose(ALL_AUTO | {'n_embd': n_embd, 'n_head': 4, 'TK_kernel': False})
    lines = [line for line in capsys.readouterr().out.splitlines() if 'GELU' in line]
    assert len(lines) == bool(said) and said in ''.join(lines)
