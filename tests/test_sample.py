"""A checkpoint speaks: what it continues, what it never says, and what it needs for that."""
import copy
import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import CHARS, ROOT, assert_refused, run_script
from data.tokens import tokenizer
from model import GPT, GPTConfig, LayerCache, pick, row_seeds
from plain_gpt import PlainGPT
from ThunderKittens.examples import decode

SHAPE = dict(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=32, bias=False)
META = {'vocab_size': 20, 'itos': dict(enumerate(CHARS)), 'stoi': {c: i for i, c in enumerate(CHARS)}}
CPU = ['--device=cpu', '--num_samples=1', '--max_new_tokens=30']


@pytest.fixture
def speaker(tiny):
    """out/ckpt.pt of a plain model with weights that make it decided; `save` writes it with other entries."""
    torch.manual_seed(3)
    model = PlainGPT(**SHAPE)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    Path('out').mkdir()

    def save(**entries):
        torch.save({'model': model.state_dict(), 'model_args': {**SHAPE, 'dropout': 0.0}, 'iter_num': 5,
                    'optimizer': {}, 'best_val_loss': torch.tensor(2.0), 'config': {'dataset': 'tiny'}, **entries},
                   'out/ckpt.pt')
        return model
    save(tokenizer=META)
    save.model = model
    return save


def texts(ran):
    assert ran.status == 0, ran
    return [text[:-1] for text in ran.out.partition('auto: ')[2].partition('\n')[2].split('---------------\n')[:-1]]


def greedy(model, text, n):
    """The plain model's likeliest continuation."""
    ids = [META['stoi'][c] for c in text]
    for _ in range(n):
        ids.append(model(torch.tensor([ids[-16:]]))[0, -1].argmax().item())
    return ''.join(CHARS[i] for i in ids)


def test_temperature_zero_writes_the_likeliest_text(speaker, run_here):
    text, = texts(run_here('sample.py', *CPU, '--start=abc', '--temperature=0'))
    assert text == greedy(speaker.model, 'abc', 30)


def test_so_many_samples_of_so_many_tokens_go_on_from_the_start(speaker, run_here):
    found = texts(run_here('sample.py', '--device=cpu', '--start=abc', '--num_samples=3', '--max_new_tokens=12'))
    assert [len(text) for text in found] == [15] * 3 and all(text.startswith('abc') for text in found)
    assert len(set(found)) == 3


def test_one_seed_gives_one_text(speaker, run_here):
    a, b, c = (texts(run_here('sample.py', *CPU, f'--seed={seed}')) for seed in (1, 1, 2))
    assert a == b != c


def test_top_k_of_one_is_the_likeliest_and_zero_draws_among_all(speaker, run_here):
    text, = texts(run_here('sample.py', *CPU, '--start=abc', '--top_k=1'))
    assert text == greedy(speaker.model, 'abc', 30)
    text, = texts(run_here('sample.py', *CPU, '--top_k=0', '--temperature=100', '--max_new_tokens=300'))
    assert set(text) == set(CHARS)


def test_the_start_may_come_from_a_file(speaker, run_here):
    Path('prompt.txt').write_text('cab\nno')
    text, = texts(run_here('sample.py', *CPU, '--start=FILE:prompt.txt'))
    assert text.startswith('cab\nno')
    for path, words in (('nowhere.txt', 'No such file'), ('out/ckpt.pt', 'not UTF-8 text')):
        assert_refused(run_here('sample.py', *CPU, f'--start=FILE:{path}'), f'--start=FILE:{path}: {words}')


def test_a_file_of_lines_is_cut_at_line_ends_only_and_an_empty_one_is_named(speaker, run_here):
    Path('prompts.txt').write_text('abc\n\nno\n')
    assert_refused(run_here('sample.py', *CPU, '--start=LINES:prompts.txt'), 'an empty text in line 2')
    Path('prompts.txt').write_text('ab\u2028c\nno\n', encoding='utf-8')
    assert_refused(run_here('sample.py', *CPU, '--start=LINES:prompts.txt'), r"'\u2028' is not among them")


def test_each_prompt_has_its_samples_in_order_and_all_end_before_the_stop(speaker, run_here):
    Path('prompts.txt').write_text('abc\nno\n')
    flags = [*CPU, '--start=LINES:prompts.txt', '--num_samples=2', '--max_new_tokens=200']
    whole = texts(run_here('sample.py', *flags))
    assert [text[:2] for text in whole] == ['ab', 'ab', 'no', 'no'] and len(set(whole)) == 4
    new = [text[3 if text[0] == 'a' else 2:] for text in whole]
    stop = max(set(new[1]) & set(new[0]) & set(new[2]) & set(new[3]), key=lambda c: -max(text.index(c) for text in new))
    steps, stream = [], GPT.stream

    def counted(*args, **kw):
        for ids in stream(*args, **kw):
            steps.append(1)
            yield ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, 'stream', counted)
        ran = run_here('sample.py', *flags, f'--stop={stop}')
    assert texts(ran) == [text[:len(text) - len(fresh)] + fresh.partition(stop)[0] for text, fresh in zip(whole, new)]
    assert len(steps) < 100 # none went on to the end
    assert f"\n{sum(text.index(stop) + 1 for text in new)} tokens in" in '\n' + ran.err # up to the stops


def test_the_stop_may_be_a_new_line_and_top_p_leaves_the_likeliest(speaker, run_here):
    speaker(tokenizer={**META, 'itos': {**META['itos'], 3: '\n'}})
    text, = texts(run_here('sample.py', *CPU, '--start=a', '--temperature=2', '--max_new_tokens=300', '--stop=\\n'))
    assert len(text) < 200 and '\n' not in text
    speaker(tokenizer=META)
    text, = texts(run_here('sample.py', *CPU, '--start=abc', '--top_p=1e-9', '--top_k=0'))
    assert text == greedy(speaker.model, 'abc', 30)


def test_the_first_sample_is_shown_as_it_comes(speaker, tiny):
    command = [sys.executable, str(ROOT / 'sample.py'), *CPU[:2], '--max_new_tokens=100000', '--start=abc']
    with subprocess.Popen(command, cwd=tiny.parents[1], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        shown = b''
        while len(shown) < 200: # long before the end
            shown += (more := os.read(running.stdout.fileno(), 1000))
            assert more
        running.kill()


def test_where_there_is_no_ckpt_pt_what_is_there_is_named(speaker, run_here):
    Path('out/earlier').mkdir()
    Path('out/ckpt.pt').rename('out/earlier/ckpt.pt')
    assert_refused(run_here('sample.py', *CPU), 'out/ckpt.pt: no checkpoint there; but in out/earlier')
    Path('out/last-00000003.pt').touch()
    assert_refused(run_here('sample.py', *CPU), 'no checkpoint there; but a run that was stopped', '--init_from=resume')


def test_characters_are_not_guessed(speaker, run_here, tiny):
    speaker(config={'dataset': 'elsewhere'})
    assert_refused(run_here('sample.py', *CPU, '--start=!'), "data/elsewhere/meta.pkl is not there, ", "20 tokens")


def test_unknown_characters_in_the_prompt_are_named(speaker, run_here):
    assert_refused(run_here('sample.py', *CPU, '--start=abcXY'), "--start: ", "'X', 'Y' are not among them")
    assert_refused(run_here('sample.py', *CPU, '--start=é'), "'é' is not among them")
    assert_refused(run_here('sample.py', *CPU, '--start='), "--start must hold at least one character")


def test_the_tokenizer_travels_in_the_checkpoint(speaker, run_here, tiny):
    itos = {i: c.upper() for i, c in META['itos'].items()}
    speaker(tokenizer={**META, 'itos': itos, 'stoi': {c: i for i, c in itos.items()}})
    text, = texts(run_here('sample.py', *CPU, '--start=ABC'))
    assert text.startswith('ABC') and text == text.upper() # and not as data/tiny/meta.pkl has it


def test_a_checkpoint_of_nanogpt_is_read_with_the_meta_pkl_of_its_data_set(speaker, run_here, tiny):
    model = speaker()
    checkpoint = torch.load('out/ckpt.pt', weights_only=True)
    checkpoint['model'] = {f'_orig_mod.{name}': t for name, t in checkpoint['model'].items()}
    torch.save(checkpoint, 'out/ckpt.pt')
    text, = texts(run_here('sample.py', *CPU, '--start=abc', '--temperature=0'))
    assert text == greedy(model, 'abc', 30)


def test_a_hostile_meta_pkl_is_not_run(speaker, run_here, tiny):
    class Hostile:
        def __reduce__(self):
            return __import__('os').mkdir, ('pwned',)
    speaker()
    (tiny / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 20, 'stoi': Hostile()}))
    assert_refused(run_here('sample.py', *CPU), 'meta.pkl', 'it wants to run posix.mkdir')
    assert not Path('pwned').exists()


def test_ids_that_no_token_has_are_never_said(tiny, run_here):
    model = GPT(GPTConfig(**{**SHAPE, 'vocab_size': 64}))
    model.lm_head.weight.data[20:] *= 50 # the padding is what the model likes most
    Path('out').mkdir()
    torch.save({'model': model.state_dict(), 'model_args': model.config.model_args(), 'tokenizer': META}, 'out/ckpt.pt')
    for temperature in (0, 1.0):
        text, = texts(run_here('sample.py', *CPU, f'--temperature={temperature}', '--max_new_tokens=100'))
        assert len(text) == 101


def test_a_model_of_characters_speaks_without_tiktoken(speaker, run_here, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tiktoken', None) # importing it raises
    assert texts(run_here('sample.py', *CPU))


def test_a_trained_model_speaks_in_a_process_of_its_own_without_a_warning(speaker, tiny):
    ran = run_script('sample.py', *CPU, '--start=abc', cwd=tiny.parents[1], python=['-W', 'error'])
    assert ran.err.count('\n') == 1 and 'tokens/s' in ran.err and texts(ran)[0].startswith('abc')


@pytest.mark.parametrize('flag, words', [
    ('--out_dir=nowhere', 'nowhere/ckpt.pt: no checkpoint there; train first'),
    ('--init_from=no/such/model', "gpt2-xl or a folder in transformers' format, not 'no/such/model'"),
    ('--init_from=scratch', "--init_from must be resume, gpt2, "),
    ('--temperature=1e-40', '--temperature must be 0, for the likeliest token, or at least 1e-6, not 1e-40'),
    ('--temperature=-1', '--temperature must be at least 0, not -1.0'),
    ('--num_samples=0', '--num_samples must be at least 1, not 0'),
    ('--max_new_tokens=0', '--max_new_tokens must be at least 1, not 0'),
    ('--top_k=-1', '--top_k must be at least 0, not -1'),
    ('--seed=9223372036854775808', '--seed must be below 9223372036854775808, not 9223372036854775808'),
    ('--device=cuda:99', '--device=cuda:99: this machine has '),
    ('--TK_kernel=True', '--TK_kernel=True cannot run here: '),
])
def test_what_cannot_be_is_refused_in_one_line(flag, words, speaker, run_here):
    assert_refused(run_here('sample.py', *CPU, flag), words)


def test_damaged_checkpoints_are_refused_in_one_line(speaker, run_here):
    whole = Path('out/ckpt.pt').read_bytes()
    for content in (b'', whole[:len(whole) // 2], b'nothing of the kind', whole[:2000] + bytes(2000) + whole[4000:]):
        Path('out/ckpt.pt').write_bytes(content)
        assert_refused(run_here('sample.py', *CPU), 'out')
    for content in ([], {'model': {}}, {'model': {}, 'model_args': {'n_layers': 3}}):
        torch.save(content, 'out/ckpt.pt')
        assert_refused(run_here('sample.py', *CPU))


def test_gpt2s_tokens_are_used_where_there_are_no_characters(gpt2_tokens, tiny, run_here):
    encode, decode, n_tokens = tokenizer({})
    assert n_tokens == 50257 and decode(encode('To be, or not')) == 'To be, or not'
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50304, n_layer=1, n_head=1, n_embd=8))
    Path('out').mkdir()
    torch.save({'model': model.state_dict(), 'model_args': model.config.model_args(), 'tokenizer': {}}, 'out/ckpt.pt')
    text, = texts(run_here('sample.py', *CPU, '--start=To be, or not', '--max_new_tokens=5'))
    assert text.startswith('To be, or not')


def test_several_prompts_of_unequal_length_are_continued_in_one_batch(speaker, run_here):
    Path('prompts.txt').write_text('abc\nno\ngabed.: ga\n')
    found = texts(run_here('sample.py', '--device=cpu', '--max_new_tokens=30', '--start=LINES:prompts.txt',
                           '--num_samples=1', '--temperature=0'))
    assert found == [greedy(speaker.model, text, 30) for text in ('abc', 'no', 'gabed.: ga')]


@pytest.mark.parametrize('begins', [0, 7, 14, 15]) # the text is looked at after 1, 8 and 16 tokens
def test_a_sample_ends_before_the_stop_and_shows_no_part_of_it(begins, speaker, run_here):
    whole, = texts(run_here('sample.py', *CPU, '--start=abc', '--seed=3'))
    stop = whole[3 + begins:3 + begins + 3]
    text, = texts(run_here('sample.py', *CPU, '--start=abc', '--seed=3', f'--stop={stop}'))
    assert text == whole[:3] + whole[3:].partition(stop)[0]


def test_a_sample_is_the_same_whatever_the_number_of_samples(speaker, run_here):
    one = texts(run_here('sample.py', *CPU, '--start=abc'))
    three = texts(run_here('sample.py', *CPU, '--start=abc', '--num_samples=3'))
    assert three[:1] == one and len(set(three)) == 3


def test_the_speed_is_said(speaker, run_here):
    assert 'tokens/s' in run_here('sample.py', *CPU).err.splitlines()[-1]


def test_a_top_p_beyond_one_is_refused(speaker, run_here):
    assert_refused(run_here('sample.py', *CPU, '--top_p=1.5'), '--top_p must be at least 0 and at most 1, not 1.5')


# -----------------------------------------------------------------------------
# what a GPU replays, called as it is

@pytest.fixture
def uncaptured(monkeypatch):
    """A CPU does what a GPU does, but for the graphs: tensors stay and serve the next call."""
    monkeypatch.setattr(decode, 'can_replay', lambda device: True)
    monkeypatch.setattr(decode, 'replayed', lambda step: step)


def random_gpt(block_size=40, vocab_size=301, n_layer=2, n_head=3, n_embd=96, device='cuda', **other):
    """A model whose every tensor matters, and whose texts are not all alike."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                          **other)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.to(device)


def some_ids(B, T, below=301, device='cuda'):
    return torch.randint(below, (B, T), generator=torch.Generator().manual_seed(B + T)).to(device)


def calls_of_like_shape_share_their_tensors_and_nothing_else(device):
    model, choice = random_gpt(device=device), dict(temperature=0.8, top_k=20)
    ids = lambda T: some_ids(2, T, device=device) # noqa: E731
    for T in (3, 7, 20, 3, 9, 50): # on a GPU the first runs as it is, the second captures the prompt, others replay it
        assert torch.equal(model.generate(ids(T), 20, seed=T, **choice),
                           model.generate_plain(ids(T), 20, seed=T, **choice)), T
    prompts = [list(ids(T)) for T in (5, 11)]
    alone = [list(model.stream(prompt, 30, seed=1, **choice)) for prompt in prompts] # the second leaves the first's be
    alone = [torch.stack(ids) for ids in alone]
    both = zip(*(model.stream(prompt, 30, seed=1, **choice) for prompt in prompts))
    assert all(torch.equal(torch.stack(ids), want) for ids, want in zip(zip(*both), alone))
    writer, = model.writers.values()
    next(model.stream(prompts[0], 30, seed=1, **choice)) # stopped after a token
    assert list(model.writers.values()) == [writer]
    assert torch.equal(torch.stack(list(model.stream(prompts[0], 30, seed=1, **choice))), alone[0])
    for p in model.parameters():
        p.data.mul_(1.1) # other weights in the same places
    assert torch.equal(model.generate(ids(9), 30, seed=1, **choice), model.generate_plain(ids(9), 30, seed=1, **choice))


def test_calls_of_like_shape_share_their_tensors_and_nothing_else(uncaptured):
    calls_of_like_shape_share_their_tensors_and_nothing_else('cpu')


def test_rows_of_any_lengths_grow_in_tensors_that_stay(uncaptured):
    model = random_gpt(device='cpu')
    for lengths in ((3, 39, 1), (64, 2), (40, 41), (63,), (1,), (100, 7)):
        prompts = [some_ids(1, T, device='cpu')[0] for T in lengths]
        rows = torch.stack(list(model.stream(prompts, 12, seed=4)), dim=1)
        for prompt, seed, row in zip(prompts, row_seeds(4, len(prompts), 'cpu'), rows):
            text = prompt[None]
            for _ in range(12):
                token = pick(model(text[:, -40:])[0][:, -1], seed[None], text.size(1))
                text = torch.cat((text, token[:, None]), dim=1)
            assert torch.equal(text[0, len(prompt):], row), lengths


def test_a_copy_of_a_model_that_has_spoken_leaves_what_is_kept_for_the_next_call(uncaptured):
    model, ids = random_gpt(device='cpu'), some_ids(2, 5, device='cpu')
    text = model.generate(ids, 9, seed=1)
    assert model.writers and not copy.deepcopy(model).writers # CUDA graphs could not be copied at all
    assert torch.equal(copy.deepcopy(model).generate(ids, 9, seed=1), text)


def test_a_model_in_training_speaks_through_its_layers_which_drop_and_not_through_the_kernels(uncaptured, monkeypatch):
    monkeypatch.setattr(decode, 'why_unavailable', lambda *_: '')
    monkeypatch.setattr(decode, 'Step', lambda *_: pytest.fail("the kernels know no dropout"))
    model = random_gpt(device='cpu', dropout=0.5).train()
    text = model.generate(some_ids(2, 5, device='cpu'), 9, temperature=0)
    assert text.shape == (2, 14)
    with pytest.raises(pytest.fail.Exception): # without dropout they are taken
        model.eval().generate(some_ids(2, 5, device='cpu'), 9, temperature=0)


# -----------------------------------------------------------------------------
# on an H100: the step in a few kernels, replayed from a CUDA graph

@pytest.fixture
def exact_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    yield
    torch.set_float32_matmul_precision(before)


CHOICES = [dict(temperature=0), dict(), dict(temperature=0.8, top_k=20), dict(top_p=0.8, n_tokens=290)]


@pytest.mark.gpu
@pytest.mark.parametrize('B', [1, 2, 3, 9])
@pytest.mark.parametrize('choice', CHOICES, ids=str)
def test_a_replayed_step_gives_the_text_of_the_plain_loop_across_the_block_boundary(choice, B, exact_float32):
    model = random_gpt(bias=B != 2, gelu='tanh' if B == 3 else 'none')
    for T in (1, 2, 17, 38, 39, 40, 41, 60):
        x = some_ids(B, T)
        assert torch.equal(model.generate(x, 45, seed=3, **choice), model.generate_plain(x, 45, seed=3, **choice)), T


@pytest.mark.gpu
@pytest.mark.parametrize('n_head, n_embd', [(12, 768), (25, 1600), (6, 384), (5, 120), (2, 256)])
def test_every_width_and_every_length_gives_the_text_of_the_plain_loop(n_head, n_embd, exact_float32):
    model = random_gpt(block_size=300, n_head=n_head, n_embd=n_embd)
    for B in (1, 7):
        x = some_ids(B, 1)
        assert torch.equal(model.generate(x, 310, temperature=0), model.generate_plain(x, 310, temperature=0))


@pytest.mark.gpu
def test_a_sample_is_the_same_at_any_batch_size(exact_float32):
    model = random_gpt()
    prompts = [some_ids(1, T)[0] for T in (3, 9, 1, 16, 30, 2, 7, 39)]
    together = torch.stack(list(model.stream(prompts, 50, seed=4)), dim=1)
    for n in (1, 3, 5):
        assert torch.equal(torch.stack(list(model.stream(prompts[:n], 50, seed=4)), dim=1), together[:n])


@pytest.mark.gpu
@pytest.mark.parametrize('B', [1, 3, 16])
def test_in_bfloat16_the_step_is_as_near_to_float32_as_the_whole_forward_is(B, exact_float32):
    model = random_gpt(block_size=512, n_layer=12, n_head=12, n_embd=768, vocab_size=5000)
    x, T = some_ids(B, 500, 5000), 480
    step_off = plain_off = 0.0
    with torch.no_grad():
        exact = model.lm_head(model.features(x, torch.arange(500, device='cuda')))
        with torch.autocast('cuda', dtype=torch.bfloat16):
            plain = model.lm_head(model.features(x, torch.arange(500, device='cuda')))
            model.cast_linears(torch.bfloat16)
            place = torch.full((B,), T, device='cuda')
            caches = [LayerCache(512, place) for _ in range(12)]
            model.features(x[:, :T], torch.arange(T, device='cuda'), caches)
            for cache in caches:
                cache.kv[..., T:, :] = float('nan') # what has not been written is never read
            step = decode.Step(model, [cache.kv for cache in caches])
            for t in range(T, 500):
                step_off += (step(x, torch.tensor([t], device='cuda'), place) - exact[:, t]).square().sum()
                plain_off += (plain[:, t] - exact[:, t]).square().sum()
                place += 1
    assert step_off <= 1.5 ** 2 * plain_off


@pytest.mark.gpu
def test_calls_of_like_shape_share_their_graphs_and_nothing_else(exact_float32):
    calls_of_like_shape_share_their_tensors_and_nothing_else('cuda')


@pytest.mark.gpu
def test_a_graph_that_is_garbage_does_not_break_a_capture():
    old, x = [torch.cuda.CUDAGraph()], torch.zeros(3, device='cuda')
    with torch.cuda.graph(old[0]):
        x + 1
    old.append(old)
    gc.collect()
    del old # as garbage, which only a collection finds
    graph, often = torch.cuda.CUDAGraph(), gc.get_threshold()
    try:
        with decode.capture(graph):
            gc.set_threshold(1)
            x.add_(len([[] for _ in range(1000)]))
    finally:
        gc.set_threshold(*often)
    graph.replay()
    assert x.tolist() == [1000] * 3


SOME_LOGITS = {
    'normal': lambda x: x, 'near equal ones': lambda x: x.round(), 'of bfloat16': lambda x: x.bfloat16().float(),
    'mostly impossible': lambda x: x.masked_fill(torch.arange(x.size(1), device=x.device) > 60, -float('inf')),
    'one far off': lambda x: x.index_fill(1, torch.tensor([7], device=x.device), 1e30),
    'three of the largest in a lane': lambda x: x + 20 * (torch.arange(x.size(1), device=x.device) % 8192 < 60)}


@pytest.mark.gpu
@pytest.mark.parametrize('kind', SOME_LOGITS)
@pytest.mark.parametrize('top_k', [1, 2, 100, 4000])
def test_tokens_are_the_same_by_kernels_as_by_torch(kind, top_k, monkeypatch):
    logits, seeds = SOME_LOGITS[kind](torch.randn(37, 20011, device='cuda')), row_seeds(5, 37, 'cuda')
    with_kernel = [pick(logits, seeds, place, top_k=top_k) for place in range(20)]
    monkeypatch.setattr(decode, 'why_unavailable', lambda device_type='cuda': 'not now')
    for place, tokens in enumerate(with_kernel):
        assert torch.equal(tokens, pick(logits, seeds, place, top_k=top_k))


@pytest.mark.gpu
def test_tokens_come_without_waiting_for_the_device():
    model = random_gpt(block_size=64)
    stream = model.stream([some_ids(1, 5)[0]], 100, temperature=0.8, top_k=20, seed=1)
    with torch.autocast('cuda', dtype=torch.bfloat16):
        for _ in range(70): # both graphs have been captured
            next(stream)
        torch.cuda.set_sync_debug_mode('error')
        try:
            rest = list(stream)
        finally:
            torch.cuda.set_sync_debug_mode('default')
    assert len(rest) == 30
