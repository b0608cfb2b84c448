"""
Settings, nanoGPT style: plain globals in a script, overridden by config files and --key=value.

    python train.py config/train_shakespeare_char.py --batch_size=32

Arguments apply from left to right and later ones win. A setting keeps the type of its
default; an int may stand for a float. A mistake, in a flag or inside a config file, ends
the program with one line on stderr and exit status 1, before any work. --help lists all.
"""
import ast
import os
import sys
from difflib import get_close_matches
from pathlib import Path

MASTER = int(os.environ.get('RANK', 0)) == 0 # under torchrun one process speaks for all
BUILD_KERNEL = 'python ThunderKittens/examples/attn_causal/h100_fwd_setup.py build'


def configure(namespace, auto=None, argv=None):
    """
    Apply `argv` (default: the command line) to the settings in `namespace`.

    namespace   globals() of a script: every public int, float, bool and str in it is a setting
    auto        {name: type} of settings whose default is 'auto' and whose explicit values have that type
    returns     {name: value} of all settings; `namespace` is updated too
    raises      SystemExit with one line that names the mistake and the near name
    """
    settings = {k: v for k, v in namespace.items()
                if not k.startswith('_') and type(v) in (bool, int, float, str)}
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        _print_help(namespace, settings)
    for arg in argv:
        pairs = _from_flag(arg, settings, auto or {}) if arg.startswith('--') else _from_file(arg, settings)
        for key, value in pairs:
            value = _check(arg, key, value, settings, namespace, auto or {})
            if value != settings[key] and MASTER:
                print(f"override {key} = {value!r} (was {settings[key]!r}, from {arg})")
            settings[key] = value
    namespace.update(settings)
    return settings


def _from_flag(arg, settings, auto):
    key, equals, text = arg[2:].partition('=')
    if not equals:
        sys.exit(f"{arg}: write --{key}=VALUE")
    if isinstance(settings.get(key), str) and key not in auto:
        return [(key, text)] # text is taken as it stands: --wandb_run_name=123 is '123'
    try:
        return [(key, ast.literal_eval(text))]
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [(key, text)] # not a literal: _check says what was expected


def _from_file(path, settings):
    try:
        code = compile(Path(path).read_text(encoding='utf-8'), path, 'exec')
        scope = dict(settings) # a config file may compute with the settings that it overrides
        exec(code, scope)
    except OSError as e:
        sys.exit(f"{path}: {e.strerror}")
    except UnicodeDecodeError as e:
        sys.exit(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})")
    except SyntaxError as e:
        sys.exit(f"{path}:{e.lineno}: {type(e).__name__}: {e.msg}")
    except Exception as e: # the file is a program of the user's: whatever it raises is named and ends the run
        line = e.__traceback__.tb_next.tb_lineno if e.__traceback__.tb_next else 0
        sys.exit(f"{path}:{line}: {type(e).__name__}: {e}")
    return [(k, v) for k, v in scope.items() # a helper's value or function is none of the settings
            if k in settings or isinstance(v, (bool, int, float, str)) and not k.startswith('_')]


def _check(arg, key, value, settings, namespace, auto):
    if key not in settings:
        near = get_close_matches(key, settings, n=1)
        helper = "" if arg.startswith('--') else "; a helper's name begins with _"
        sys.exit(f"{arg}: unknown setting {key!r}"
                 + (f", did you mean {near[0]!r}?" if near else f"; --help lists all{helper}"))
    if key in auto and value == 'auto':
        return value
    want, like = (auto[key], "'auto' or " + auto[key].__name__) if key in auto else (type(namespace[key]), None)
    if want is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            sys.exit(f"{arg}: {key} must be float, not an int of {value.bit_length()} bits")
    if type(value) is not want:
        came = repr(value) if len(repr(value)) < 80 else repr(value)[:76] + "..."
        sys.exit(f"{arg}: {key} must be {like or f'{want.__name__}, like {namespace[key]!r}'}, not {came}")
    return value


def _print_help(namespace, settings):
    """Every setting with its default and the comment that stands behind it in the script."""
    source = Path(namespace['__file__']).read_text(encoding='utf-8')
    print((namespace.get('__doc__') or '').strip() + "\n\nsettings, as --key=value or in a config file:\n")
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) in settings:
            name = node.targets[0].id
            comment = lines[node.end_lineno - 1][node.end_col_offset:].strip().lstrip('# ')
            print(f"  --{name}={settings.pop(name)!r}".ljust(44) + comment)
    sys.exit(0)


def choose(settings, for_training=True):
    """
    Replace the 'auto' of device, dtype, fast, compile and TK_kernel by what this machine can do; say so in one line. A
    CUDA device becomes the current one.

    settings      the dict that configure() returned; changed in place
    for_training  the kernel must also give gradients
    raises        SystemExit with one line where an explicit choice cannot run here
    """
    import torch

    from ThunderKittens.examples import decode
    auto = [name for name in ('device', 'dtype', 'fast', 'compile', 'TK_kernel') if settings.get(name) == 'auto']
    if settings['device'] == 'auto':
        mps = torch.backends.mps.is_available()
        settings['device'] = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    device_type = check_device(settings['device'])
    if device_type == 'cuda':
        torch.cuda.set_device(torch.device(settings['device']).index or 0) # what follows is asked of this one
    if settings['dtype'] == 'auto':
        bf16 = device_type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
        settings['dtype'] = 'bfloat16' if bf16 else 'float16' if device_type == 'cuda' else 'float32'
    if settings['dtype'] not in ('float32', 'bfloat16', 'float16'):
        sys.exit(f"--dtype must be auto, float32, bfloat16 or float16, not {settings['dtype']!r}")
    why_not_fast = _why_not_fast(settings, device_type) if 'fast' in settings else ''
    if settings.get('fast') is True and why_not_fast:
        sys.exit(f"--fast=True cannot run here: {why_not_fast}")
    if settings.get('fast') == 'auto':
        settings['fast'] = not why_not_fast
    if settings.get('compile') == 'auto': # Triton, behind torch.compile, needs compute capability 7.0
        settings['compile'] = (for_training and device_type == 'cuda' and not settings.get('fast')
                               and torch.cuda.get_device_capability() >= (7, 0) and decode.has_c_compiler())
    why_not = _why_no_kernel(settings, device_type, for_training)
    if settings['TK_kernel'] is True and why_not:
        hint = "" if 'h100_fwd_setup.py' in why_not or settings.get('plain') else f" (what builds it: {BUILD_KERNEL})"
        sys.exit(f"--TK_kernel=True cannot run here: {why_not}{hint}")
    if settings['TK_kernel'] == 'auto':
        settings['TK_kernel'] = not why_not
    if auto and MASTER:
        reason = f" (no kernel: {why_not})" if 'TK_kernel' in auto and why_not else ""
        if 'fast' in auto and why_not_fast and device_type == 'cuda':
            reason += f" (not fast: {why_not_fast})"
        print("auto: " + ", ".join(f"{name}={settings[name]}" for name in auto) + reason)
    if settings.get('fast') and MASTER and (why_not := _why_no_gelu_in_matmul(settings)):
        print(f"fast: a pass of its own for GELU, not in the matmuls ({why_not})")
    return settings


def _why_not_fast(settings, device_type):
    """'' if the training step by hand can run with these settings, else the reason in a few words."""
    from ThunderKittens.examples import gpt2_step
    if settings.get('plain'):
        return "plain=True is plain nanoGPT"
    if settings['compile'] is True:
        return "compile=True compiles model.py"
    return gpt2_step.why_not(device_type, settings['dtype'])


def _why_no_kernel(settings, device_type, for_training):
    """'' if the ThunderKittens kernel can run with these settings, else the reason in a few words."""
    from ThunderKittens.examples import attn_causal
    if settings.get('plain'):
        return "plain=True is plain nanoGPT"
    if device_type != 'cuda':
        return f"it runs on a CUDA device, not on {device_type}"
    if settings['dtype'] != 'bfloat16':
        return f"it takes bfloat16, not {settings['dtype']}"
    head_dim = 64 # of every pretrained GPT-2
    if settings.get('n_head', 0) > 0: # else GPTConfig refuses it
        head_dim = settings['n_embd'] // settings['n_head']
    dropout = settings.get('dropout', 0.0) if for_training else 0.0
    return attn_causal.why_unavailable() or attn_causal.why_not_for(head_dim, dropout)


def _why_no_gelu_in_matmul(settings):
    """'' if the fast step's matmuls can do GELU too, else the reason in a few words."""
    from ThunderKittens.examples import gemm_gelu
    return gemm_gelu.why_unavailable() or gemm_gelu.why_not_for(settings['n_embd'], 4 * settings['n_embd'])


def check_device(device):
    """'cuda', 'mps' or 'cpu' for a device string like 'cuda:1'; SystemExit with one line if it is not there."""
    import torch
    try:
        wanted = torch.device(device)
    except RuntimeError:
        sys.exit(f"--device must be auto, cpu, cuda, cuda:N or mps, not {device!r}")
    if wanted.type == 'cuda':
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (wanted.index or 0) >= count:
            sys.exit(f"--device={device}: this machine has {count or 'no'} CUDA device{'s' if count > 1 else ''}; "
                     "--device=cpu runs anywhere")
    elif wanted.type == 'mps' and not torch.backends.mps.is_available():
        sys.exit("--device=mps: this machine has no Apple GPU; --device=cpu runs anywhere")
    elif wanted.type not in ('cpu', 'mps'):
        sys.exit(f"--device must be auto, cpu, cuda, cuda:N or mps, not {device!r}")
    return wanted.type
