"""The benchmark refuses to time what is wrong, and says what it timed; inference compares the ways to speak."""
import contextlib
import importlib
import json
import math
import sys

import pytest
import torch

import configurator
from conftest import assert_refused, run_script
from model import sdpa_attention_qkv
from ThunderKittens.examples.attn_causal import bench as attn_bench
from ThunderKittens.examples.gpt2_step import bench as step_bench

SMALL = ['--dataset=tiny', '--device=cpu', '--batch_size=2', '--block_size=16', '--n_layer=2', '--n_head=2',
         '--n_embd=32', '--vocab_size=64', '--steps=3', '--warmup=1']


def last_line(ran):
    assert ran.status == 0, ran
    return json.loads(ran.out.splitlines()[-1])


@pytest.fixture
def kernel(monkeypatch):
    """A function that stands in for the kernel on a CPU, and a choice that takes it."""
    def put(attention):
        monkeypatch.setattr('model.causal_attention_qkv', attention)
        monkeypatch.setattr(configurator, '_why_no_kernel', lambda *_: '')
    return put


def test_a_small_run_on_a_cpu_ends_with_one_json_line(tiny):
    ran = run_script('bench.py', *SMALL, cwd=tiny.parents[1], python=['-W', 'error'])
    found = last_line(ran)
    assert ran.err == ''
    for key, value in dict(batch_size=2, block_size=16, n_layer=2, TK_kernel=False, plain=False, dtype='float32',
                           real_data=True, dataset='tiny', mfu=None, mfu_causal=None, peak_gib=None).items():
        assert found[key] == value
    assert found['ms_min'] <= found['ms_median'] <= found['ms_max']
    assert found['tokens_per_s'] == pytest.approx(2 * 16 / found['ms_median'] * 1e3, rel=0.01)
    assert found['torch'] == torch.__version__ and found['card'] and found['commit']
    assert "no MFU: the peak of this device is not known" in ran.out


def test_the_parts_of_a_step_are_kernels_by_kind_and_when_none_ran(tiny, run_here):
    breakdown = run_here('bench.py', *SMALL).names['breakdown']
    kernels = [('nvjet_tst', 100, 160), ('attn::causal_dq', 40, 90), # 10 us before the first
               ('_adamw', 260, 290), ('nvjet_tss', 20, 40), # 60 us before AdamW
               ('a copy', 50, 56), ('_norm', 150, 200)] # beside others
    assert breakdown(kernels, 2) == {'matmuls': 0.04, 'attention': 0.025, 'LayerNorm, residual': 0.025,
                                     'AdamW, clipping': 0.015, 'other': 0.003, 'idle': 0.035}


def test_the_defaults_are_those_of_the_original(run_here):
    ran = run_here('bench.py', '--help')
    for setting in ("--dataset='shakespeare_char'", '--batch_size=4 ', '--block_size=4096 ', "--TK_kernel='auto'"):
        assert setting in ran.out


def test_mfu_is_given_for_a_known_card_with_all_and_with_half_of_the_attention(tiny, run_here, monkeypatch):
    monkeypatch.setattr('model.PEAK_FLOPS', {'cpu': 1e10})
    monkeypatch.setattr('platform.machine', lambda: 'cpu')
    ran = run_here('bench.py', *SMALL)
    found, model = last_line(ran), ran.names['model']
    n, attention = model.get_num_params(), 12 * 2 * 32 * 16
    per_s = found['tokens_per_s'] / 1e10
    assert found['mfu'] == pytest.approx((6 * n + attention) * per_s, rel=0.01, abs=1e-4)
    assert found['mfu_causal'] == pytest.approx((6 * n + attention / 2) * per_s, rel=0.01, abs=1e-4)
    assert "% with the causal half of the attention FLOPs" in ran.out


def test_random_data_needs_no_files_and_plain_nanogpt_no_kernel(tiny, run_here, kernel):
    found = last_line(run_here('bench.py', *SMALL, '--real_data=False', '--dataset=nowhere', '--plain=True'))
    assert found['plain'] and not found['real_data'] and not found['TK_kernel']
    for ours in ('--TK_kernel=True', '--fast=True'): # nothing to build helps
        assert_refused(run_here('bench.py', *SMALL, '--plain=True', ours),
                       f'{ours} cannot run here: plain=True is plain nanoGPT\n')


def test_an_attention_that_is_right_is_timed(tiny, run_here, kernel):
    kernel(lambda qkv, n_head, dropout: sdpa_attention_qkv(qkv.double(), n_head, dropout).to(qkv.dtype))
    ran = run_here('bench.py', *SMALL)
    assert ran.out.splitlines().count('kernel ok') == 1
    assert last_line(ran)['TK_kernel'] and last_line(ran)['check'] == 'kernel ok'


def scaled(by):
    return lambda qkv, n_head, dropout: by * sdpa_attention_qkv(qkv, n_head, dropout)


def unmasked(qkv, n_head, dropout):
    q, k, v = (t.unflatten(-1, (n_head, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def without_gradient(qkv, n_head, dropout):
    return sdpa_attention_qkv(qkv.detach(), n_head, dropout)


def without_gradient_of_keys(qkv, n_head, dropout):
    q, k, v = qkv.chunk(3, dim=-1)
    return sdpa_attention_qkv(torch.cat([q, k.detach(), v], dim=-1), n_head, dropout)


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float('nan')


@pytest.mark.parametrize('wrong, words', [
    (scaled(1.03), 'gradient of '), (scaled(0.97), 'gradient of '), (scaled(float('nan')), 'output: off by nan'),
    (unmasked, 'off by'), (without_gradient, 'gradient of '),
    (without_gradient_of_keys, 'gradient of transformer.h.0.attn.c_attn.weight, keys: off by 1.0000'),
    (lambda qkv, n_head, dropout: NanGradient.apply(sdpa_attention_qkv(qkv, n_head, dropout)), 'off by nan'),
], ids=['too_large', 'too_small', 'nan', 'unmasked', 'no_gradient', 'no_key_gradient', 'nan_gradient'])
def test_an_attention_that_is_wrong_is_named_and_not_timed(wrong, words, tiny, run_here, kernel):
    kernel(wrong)
    ran = run_here('bench.py', *SMALL, '--TK_kernel=True')
    assert_refused(ran, 'kernel differs: ', words)
    assert 'ms a step' not in ran.out and 'kernel ok' not in ran.out


def test_a_gradient_that_is_not_there_is_a_difference(tiny, run_here, kernel):
    kernel(sdpa_attention_qkv)
    names = run_here('bench.py', *SMALL).names
    x, y = names['batches'][0]
    found = names['outcome'](names['make_model'](False), x, y)
    assert {name.split(',')[0] for name in found} == {'output', 'loss', *[
        f'gradient of {name}' for name, p in names['model'].named_parameters()]}
    names['outcome'].__globals__['outcome'] = lambda model, x, y, by_hand=False, context=None: (
        {k: v for k, v in found.items() if k != 'loss' or not model.config.TK_kernel})
    assert names['first_difference'](x, y) == 'loss: the kernel gives none'


@pytest.mark.parametrize('flag, words', [
    ('--block_size=4000', 'train.bin: 4,000 tokens are too few for block_size=4000'),
    ('--batch_size=0', '--batch_size must be at least 1, not 0'), ('--dataset=nowhere', 'no train.bin'),
    ('--vocab_size=10', 'is not below vocab_size=10'), ('--steps=0', '--steps must be at least 1, not 0'),
    ('--warmup=-1', '--warmup must be at least 0, not -1'),
    ('--n_head=3', 'n_embd must be a multiple of n_head, got n_embd=32 and n_head=3'),
    ('--n_layer=0', 'n_layer must be at least 1, not 0'),
    ('--TK_kernel=True', 'cannot run here: it runs on a CUDA device, not on cpu'),
])
def test_what_cannot_be_timed_is_refused_in_one_line(flag, words, tiny, run_here):
    assert_refused(run_here('bench.py', *SMALL, flag), words)


# -----------------------------------------------------------------------------
# the table of shapes

def row(way, B, T=1024, size='124M', tokens_per_s=400_000, peak_gib=10.0):
    return dict(size=size, way=way, batch_size=B, block_size=T, ms_median=30.0, tokens_per_s=tokens_per_s, mfu=0.4,
                peak_gib=peak_gib, card='a card', torch='2', cuda='13', commit='abc1234',
                parts_ms={'matmuls': 9, 'idle': 1})


def test_the_table_compares_a_row_with_plain_nanogpt_at_its_shape_else_at_its_length(tmp_path):
    rows = [row('plain', 16), row('fast', 16, tokens_per_s=500_000), row('plain', 4, 4096, tokens_per_s=300_000),
            row('fast', 4, 4096, tokens_per_s=450_000), row('plain', 8, size='xl', tokens_per_s=10_000),
            row('fast', 20, size='xl', tokens_per_s=12_000)]
    lines = step_bench.table(rows).splitlines()
    assert 'a card, torch 2, CUDA 13, commit abc1234' in lines[0]
    assert [line.split('|')[-2].strip() for line in lines[4:]] == ['1.00', '1.25', '1.00', '1.50', '1.00', '1.20']
    assert '| - |' in step_bench.table([{**rows[0], 'mfu': None}]) # a card whose peak is not known
    assert 'no measure' not in step_bench.table(rows)
    slow = row('plain', 16, tokens_per_s=429_000) | {'card': 'NVIDIA H100 80GB HBM3'}
    assert 'no measure' in step_bench.table([slow])
    assert 'no measure' not in step_bench.table([slow | {'tokens_per_s': 430_000}])
    step_bench.picture(rows, tmp_path / 'step.png')
    assert (tmp_path / 'step.png').stat().st_size > 5000


@pytest.mark.parametrize('fixed', [0, 30])
@pytest.mark.parametrize('first', [4, 20, 28, 32, 40])
def test_the_largest_batch_is_found_from_above_and_from_below(first, fixed, monkeypatch):
    tried = []

    def run(size, way, B, T):
        tried.append(B)
        peak_gib = fixed + (76 - fixed) * B / 29
        return row(way, B, peak_gib=peak_gib) if peak_gib < 76 else {}
    monkeypatch.setattr(step_bench, 'run', run)
    assert step_bench.largest('xl', 'fast', first)['batch_size'] == 28
    assert len(tried) == len(set(tried))


def test_a_table_that_was_interrupted_goes_on_and_is_written_after_every_shape(tmp_path, monkeypatch, capsys):
    timed, left = [], 2

    def run(size, way, B, T):
        nonlocal left
        timed.append((size, way, B, T))
        if left == 0 and way == 'plain':
            sys.exit("the power went")
        left -= way == 'plain'
        return row(way, B, T, size)
    monkeypatch.setattr(step_bench, 'run', run)
    monkeypatch.setattr(step_bench, 'compile_ahead', lambda shapes: None)
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    call = ['bench', '--sizes=124M', f'--out={tmp_path}', '--commit=abc1234']
    monkeypatch.setattr('sys.argv', call)
    with pytest.raises(SystemExit, match="the power went"):
        step_bench.main()
    left, before = 9, len(timed)
    step_bench.main()
    assert [t[2:] for t in timed[before:]] == [(64, 1024)] * 3 + [(4, 4096)] * 2
    assert "2 shapes of commit abc1234 are in" in (said := capsys.readouterr().out)
    assert said.count('| 124M |') == 10
    before = len(timed)
    step_bench.main() # nothing is missing
    monkeypatch.setattr('sys.argv', [*call[:-1], '--commit=fff9999']) # other code
    assert len(timed) == before and not step_bench.measured(tmp_path / 'gpt2_step.json', 'fff9999')
    step_bench.main()
    assert len(timed) == before + 10


def test_what_fails_ends_the_table_with_its_words_and_a_size_must_be_known(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['bench', '--sizes=124M,huge'])
    with pytest.raises(SystemExit, match="--sizes takes 124M, medium, large, xl, not 'huge'"):
        step_bench.main()
    with pytest.raises(SystemExit, match='--steps must be at least 1, not 0'):
        step_bench.run('124M', 'plain', 1, 16, '--device=cpu', '--steps=0')


# -----------------------------------------------------------------------------
# the kernels' benchmarks

@pytest.mark.parametrize('name', ['attn_causal.bench', 'attn_causal.bench_backward', 'gemm_gelu.bench',
                                  'gpt2_step.bench'])
def test_what_an_h100_alone_can_time_is_refused_elsewhere_in_one_line(name, monkeypatch):
    bench = importlib.import_module(f'ThunderKittens.examples.{name}')
    monkeypatch.setattr('sys.argv', ['bench'])
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    with pytest.raises(SystemExit, match=r'\Ano CUDA device: .+\Z'):
        bench.main()


def test_the_forwards_benchmark_runs_as_a_script_too(tmp_path):
    ran = run_script('ThunderKittens/examples/attn_causal/bench.py', '--help', cwd=tmp_path)
    assert ran.status == 0 and '--fa3' in ran.out


@pytest.mark.parametrize('wrong, right', [(lambda x: 1.01 * x, False), (lambda x: x * math.nan, False),
                                          (lambda x: x, True)])
def test_an_attention_that_is_wrong_is_not_timed_beside_others(wrong, right, monkeypatch):
    monkeypatch.setattr(attn_bench, 'random_qkv', lambda *shape: [torch.randn(shape).bfloat16() for _ in range(3)])
    peers = {'good': attn_bench.sdpa(attn_bench.SDPBackend.MATH),
             'peer': lambda q, k, v: lambda: wrong(attn_bench.sdpa(attn_bench.SDPBackend.MATH)(q, k, v)())}
    with contextlib.nullcontext() if right else pytest.raises(SystemExit, match='peer is wrong at D=64'):
        attn_bench.check(peers)


def test_the_forwards_benchmark_checks_first_and_leaves_json_tables_and_a_picture(tmp_path, monkeypatch):
    done, us = [], dict.fromkeys(('flash', 'cudnn', attn_bench.OURS), (20.0, 10.0))
    packed_us = dict.fromkeys(('flushed_us', '50_calls_us', 'kernel_us', 'host_us'), 8.0)
    for name, found in (('check', None), ('measure', dict.fromkeys(attn_bench.SHAPES, us)),
                        ('measure_lengths', {17: {'flash': 9.0}}), ('measured_on', 'a card'),
                        ('measure_packed', dict.fromkeys(('cudnn', attn_bench.OURS), packed_us))):
        monkeypatch.setattr(attn_bench, name, lambda *args, name=name, found=found: (done.append(name), found)[1])
    monkeypatch.setattr(attn_bench, 'why_unavailable', lambda: '')
    monkeypatch.setattr(attn_bench, 'HERE', tmp_path)
    (tmp_path / 'README.md').write_text('<!-- bench begin -->\nold\n<!-- bench end -->\n')
    monkeypatch.setattr('sys.argv', ['bench', '--readme', f'--out={tmp_path}'])
    attn_bench.main()
    assert done[:2] == ['check', 'measure']
    found = json.loads((tmp_path / 'attn_causal.json').read_text())
    assert found['shapes']['B64_H12_N1024_D64']['cudnn'] == [20.0, 10.0] and found['where'] == 'a card'
    readme = (tmp_path / 'README.md').read_text()
    assert '| 64 | 12 | 64, 1024 |' in readme and 'The host spends 8 us a call' in readme and 'old' not in readme
    assert (tmp_path / 'attn_causal.png').stat().st_size > 5000


def test_calls_take_turns_and_the_median_of_the_passes_is_compared_with_the_best_other(monkeypatch):
    order, passes = [], {'cudnn': [9, 20, 21, 90], 'fa3': [40] * 4, attn_bench.OURS: [10] * 4} # us

    def flushed_us(name):
        order.append(name)
        return passes[name][order.count(name) - 1]
    monkeypatch.setattr(attn_bench, 'flushed_us', flushed_us)
    monkeypatch.setattr(attn_bench, 'back_to_back_us', lambda name, repeats: 20.0)
    shape = (1, 1, 1024, 64) # 134.2 MFLOP forward
    results = attn_bench.measure(lambda *shape: {name: name for name in passes}, [shape])
    assert order == [*passes, *reversed(passes)] * 2
    assert attn_bench.table(results, '', 2.5)[-4] == '| 64 | 1 | 1, 1024 | 16 / 17 | 8 / 17 | 34 / 17 | 2.05 / 1.00 |'


# -----------------------------------------------------------------------------
# inference.py

@pytest.fixture(scope='module')
def gpt2_folder(gpt2_tokens, tmp_path_factory):
    """A small random GPT-2 with the real vocabulary, as transformers saves it."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp('gpt2')
    GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)
    return folder


def test_inference_speaks_with_torchs_attention_where_there_is_no_kernel(gpt2_folder, run_here):
    ran = run_here('inference.py', f'--init_from={gpt2_folder}', '--device=cpu', '--max_new_tokens=5', '--start=Hello')
    found = last_line(ran)
    assert list(found['tokens_per_s']) == ['plain loop', 'torch'] and found['new_tokens'] == 5
    assert found['same_tokens'] == {'plain loop': 5, 'torch': 5} and 'the same text each way\n' in ran.out
    assert '\nHello' in ran.out and 'no kernel: it runs on a CUDA device, not on cpu' in ran.out


def test_inference_says_whether_all_ways_write_the_same_text(gpt2_folder, run_here, kernel):
    flags = [f'--init_from={gpt2_folder}', '--device=cpu', '--max_new_tokens=6']
    kernel(sdpa_attention_qkv)
    ran = run_here('inference.py', *flags)
    assert set(last_line(ran)['tokens_per_s']) == {'plain loop', 'torch', 'ThunderKittens'}
    assert last_line(ran)['same_tokens']['ThunderKittens'] == 6 and 'the same text each way\n' in ran.out
    kernel(scaled(-1000.0))
    ran = run_here('inference.py', *flags)
    assert last_line(ran)['same_tokens']['ThunderKittens'] < 6 and 'of 6 tokens, then ' in ran.out


@pytest.mark.parametrize('flag, words', [
    ('--init_from=no/such/model', "gpt2-xl or a folder in transformers' format, not 'no/such/model'"),
    ('--TK_kernel=True', 'cannot run here: it runs on a CUDA device, not on cpu'),
    ('--max_new_tokens=0', '--max_new_tokens must be at least 1, not 0'), ('--start=', '--start must hold tokens'),
    ('--batches=1,4', "--batches must be like '1 4 16', not '1,4'"),
    ('--sizes=24x16', "--sizes must be like '24x16x1024 12x12x768', not '24x16'"),
    ('--sizes=1x1x8 1x3x8', '--sizes=1x1x8 1x3x8: n_embd must be a multiple of n_head, got n_embd=8 and n_head=3'),
    ('--prompts=1 1000', "--prompts=1 1000 and half of --max_new_tokens=100 do not fit"),
    ('--out_dir=a_file', 'a_file: File exists'),
])
def test_inference_refuses_what_it_cannot_do_in_one_line(flag, words, gpt2_folder, run_here, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a_file').touch()
    bench = ['--bench=True'] if flag.startswith(('--sizes', '--prompts', '--out')) else []
    assert_refused(run_here('inference.py', f'--init_from={gpt2_folder}', '--device=cpu', *bench, flag), words)


def test_inference_times_all_ways_over_batch_sizes_and_writes_a_table_and_a_picture(tmp_path, run_here):
    ran = run_here('inference.py', '--bench=True', '--device=cpu', '--max_new_tokens=6', '--sizes=1x1x8 1x2x16',
                   '--batches=1 2', '--prompts=1 3', '--repeats=1', f'--out_dir={tmp_path}')
    found = json.loads((tmp_path / 'generation.json').read_text())
    assert [(row['size'], row['batch'], row['prompt'], 'transformers' in row) for row in found['speeds']] == [
        *(('1x1x8', B, T, True) for B in (1, 2) for T in (1, 3)), ('1x2x16', 1, 1, False), ('1x2x16', 1, 3, False)]
    assert all(row['this'] > 0 for row in found['speeds']) and found['first_token_ms'] > 0
    assert 0.1 < found['cold_start_s'] < 60 # a process that only imports torch takes longer
    assert '| 1x1x8 | 2 | 3 |' in ran.out and (tmp_path / 'generation.png').read_bytes()[1:4] == b'PNG'


# -----------------------------------------------------------------------------
# on an H100

@pytest.mark.gpu
@pytest.mark.parametrize('flags', [[], ['--plain=True']], ids=['kernel', 'plain'])
def test_a_small_run_on_a_gpu_gives_mfu_and_memory(flags, tiny):
    ran = run_script('bench.py', *SMALL[:1], *SMALL[2:], '--n_embd=128', '--steps=5', *flags, cwd=tiny.parents[1],
                     timeout=300)
    found = last_line(ran)
    assert 0 <= found['mfu_causal'] <= found['mfu'] < 1 and found['peak_gib'] > 0
    assert ('kernel ok' in ran.out) == found['TK_kernel'] and found['plain'] == found['compile'] == bool(flags)
    assert found['attention_kernels'] and all(('causal_' in name) != bool(flags) for name in found['attention_kernels'])
    parts = found['parts_ms']
    assert min(parts.values()) >= 0 and {'matmuls', 'attention', 'AdamW, clipping', 'idle'} <= parts.keys()
