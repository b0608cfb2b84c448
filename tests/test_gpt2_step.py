"""The training step by hand is model.py's under autograd: on a CPU exactly, on an H100 within bfloat16."""
import copy
import math
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from data.processes import leave_group
from model import GPT, GPTConfig
from ThunderKittens.examples import decode
from ThunderKittens.examples.gpt2_step import AdamW, TrainStep, kernels, why_not
from ThunderKittens.examples.gpt2_step.exchange import ByCopies, ByGroup, choose_exchange, why_no_copies

on_gpu = pytest.mark.gpu
SHAPES = [dict(bias=False, gelu='none', vocab_size=65), dict(bias=True, gelu='tanh', vocab_size=65),
          dict(bias=True, gelu='none', vocab_size=128)]


def adamw(model, kind=torch.optim.AdamW):
    return model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu', kind)


def pair(by_rank=0, **kw):
    """A model, the same once more, and its step by hand: in float64 on the CPU."""
    torch.manual_seed(1 + by_rank)
    plain = GPT(GPTConfig(**{**dict(block_size=16, n_layer=3, n_head=2, n_embd=32), **kw}))
    with torch.no_grad():
        for p in plain.parameters():
            if p.dim() < 2: # ones and zeros would hide much
                p += 0.1 * torch.randn_like(p)
    model = copy.deepcopy(plain)
    step = TrainStep(model, adamw(model, AdamW), grad_clip=0.5, residual=torch.float64, half=torch.float64)
    return plain, model, step


def batch(V, B=3, T=13):
    x, y = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    y[0, :4] = -1
    return x, y


def off(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize('kept_bytes', [math.inf, 0], ids=['kept', 'again'])
@pytest.mark.parametrize('kw', SHAPES, ids=['plain', 'biases_tanh', 'biases'])
def test_loss_gradients_and_weights_are_autograds_and_adamws(kw, kept_bytes, double):
    plain, model, step = pair(**kw)
    step.kept_bytes = kept_bytes
    optimizer = adamw(plain)
    for _ in range(3):
        for micro_step in range(2):
            x, y = batch(kw['vocab_size'])
            loss = plain(x, y)[1]
            (loss / 2).backward()
            mine = step.forward_backward(x, y, share=0.5, first=micro_step == 0, last=micro_step == 1)
            assert mine.item() == pytest.approx(loss.item(), rel=1e-12)
        for (name, p), q in zip(plain.named_parameters(), model.parameters()):
            assert off(q.grad, p.grad) < 1e-10, name
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert step.update().item() == 0
        for (name, p), q in zip(plain.named_parameters(), model.named_parameters()):
            assert off(q[1], p) < 1e-10, name
        assert step.evaluate(x, y).item() == pytest.approx(plain(x, y)[1].item(), rel=1e-10)


def test_a_gradient_within_the_norm_is_not_clipped_and_0_clips_nothing(double):
    for grad_clip in (0.0, 1e9):
        plain, model, step = pair(vocab_size=64)
        step.grad_clip = grad_clip
        x, y = batch(64)
        optimizer = adamw(plain)
        plain(x, y)[1].backward()
        optimizer.step()
        step.forward_backward(x, y)
        step.update()
        assert all(off(q, p) < 1e-9 for p, q in zip(plain.parameters(), model.parameters()))


def test_a_norm_whose_weight_became_0_still_gets_its_gradient(double):
    """Without a bias the backward reads what was normalised off the norm's output."""
    plain, model, step = pair(vocab_size=65, bias=False)
    for of in (plain, model):
        for norm in (of.transformer.h[1].ln_1, of.transformer.h[2].ln_2, of.transformer.ln_f):
            norm.weight.data[::5] = 0
    x, y = batch(65)
    plain(x, y)[1].backward()
    step.forward_backward(x, y)
    for (name, p), q in zip(plain.named_parameters(), model.parameters()):
        assert off(q.grad, p.grad) < 1e-10 and (p.grad != 0).any(), name


def test_the_gradient_with_dropout_is_the_slope_of_the_loss_under_the_same_masks(double):
    _, model, step = pair(vocab_size=65, dropout=0.3, bias=True)
    x, y = batch(65)

    def loss():
        torch.manual_seed(7)
        step.refresh()
        return step.forward_backward(x, y).item()
    first, gradient = loss(), None
    gradient = step.grads.clone()
    torch.manual_seed(8)
    assert step.forward_backward(x, y).item() != first, "other random numbers, other masks"
    for name, p in model.named_parameters():
        way, at = torch.randn_like(p), p.detach().clone()
        slope = []
        for size in (1e-6, -1e-6):
            p.data.copy_(at + size * way)
            slope.append(loss())
        p.data.copy_(at)
        start = step.first[name]
        expected = (gradient[start:start + p.numel()].view_as(p) * way).sum().item()
        assert (slope[0] - slope[1]) / 2e-6 == pytest.approx(expected, rel=1e-4, abs=1e-8), name
    assert step.evaluate(x, y) == step.evaluate(x, y), "no dropout there"


def test_the_optimizers_state_goes_to_plain_adamw_and_back(double):
    plain, model, step = pair(vocab_size=65)
    x, y = batch(65)
    for _ in range(2):
        step.forward_backward(x, y)
        step.update()
    saved = copy.deepcopy(step.optimizer.state_dict())
    plain.load_state_dict(model.state_dict())
    optimizer = adamw(plain)
    assert saved['param_groups'] == optimizer.state_dict()['param_groups']
    optimizer.load_state_dict(saved)
    again = copy.deepcopy(plain)
    other = adamw(again)
    other.load_state_dict(saved)
    resumed = TrainStep(again, other, grad_clip=0.5, residual=torch.float64, half=torch.float64)
    plain(x, y)[1].backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    optimizer.step()
    for this in (step, resumed):
        this.forward_backward(x, y)
        this.update()
    for p, q, r in zip(plain.parameters(), model.parameters(), again.parameters()):
        assert off(q, p) < 1e-9 and torch.equal(q, r)
    assert {state['step'].item() for state in optimizer.state.values()} == {3}
    assert len({state['step'].data_ptr() for state in step.optimizer.state.values()}) == len(list(model.parameters()))


def test_a_step_that_is_not_finite_changes_nothing(double):
    _, model, step = pair(vocab_size=65)
    x, y = batch(65)
    step.forward_backward(x, y)
    step.update()
    before = copy.deepcopy((model.state_dict(), step.optimizer.state_dict()['state']))
    for spoil in (float('nan'), float('inf')):
        step.forward_backward(x, y)
        step.grads[-1] = spoil
        assert step.update().item() == 1
        after = model.state_dict(), step.optimizer.state_dict()['state']
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    step.forward_backward(x, y)
    assert step.update().item() == 0 and not torch.equal(model.lm_head.weight, before[0]['lm_head.weight'])


def test_a_loss_that_is_not_finite_spoils_the_gradient_on_purpose(double, monkeypatch):
    """So that all processes, which share gradients and not losses, skip the same step."""
    _, _, step = pair(vocab_size=65)
    x, y = batch(65)
    real = kernels.cross_entropy_

    def endless(logits, targets, losses, *rest):
        real(logits, targets, losses, *rest)
        losses[3] = math.inf
    monkeypatch.setattr(kernels, 'cross_entropy_', endless)
    step.forward_backward(x, y)
    assert step.update().item() == 1


def train_and_speak(model, batches, speak, **kw):
    """The gradients and the weights of each step, and what speak(model) returned before, between and within them."""
    said, found = [speak(model)], []
    step = TrainStep(model, adamw(model, AdamW), **kw)
    for x, y in batches:
        step.forward_backward(x, y)
        said.append(speak(model))
        found.append(step.grads.clone())
        step.update()
        found.append(step.params.clone())
        said.append(speak(model))
    return found, said


def assert_said_by_the_weights_of_the_moment(said):
    """train_and_speak's texts: only update() changes what is said, and every one does."""
    assert [torch.equal(a, b) for a, b in zip(said, said[1:])] == [i % 2 == 0 for i in range(len(said) - 1)]


def test_sampling_in_between_is_from_the_weights_of_the_moment_and_changes_no_step(double, monkeypatch):
    monkeypatch.setattr(decode, 'can_replay', lambda device: True) # as on a GPU, but for the graphs: writers are kept
    monkeypatch.setattr(decode, 'replayed', lambda step: step)
    batches, prompts = [batch(65) for _ in range(3)], torch.randint(65, (2, 5))

    def fresh():
        torch.manual_seed(1)
        return GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32, dropout=0.2)).eval()

    def speak(model):
        text = model.generate(prompts, 15, seed=4) # past block_size
        assert model.writers
        assert torch.equal(text, copy.deepcopy(model).generate_plain(prompts, 15, seed=4))
        return text
    precise = dict(residual=torch.float64, half=torch.float64)
    quiet, _ = train_and_speak(fresh(), batches, lambda model: None, **precise)
    found, said = train_and_speak(fresh(), batches, speak, **precise)
    assert all(map(torch.equal, found, quiet))
    assert_said_by_the_weights_of_the_moment(said)


def one_of_two(rank, folder, rows, layers):
    """A process of two: its own weights at first, its own half of the batch."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f'{folder}/store', 2)
    torch.distributed.init_process_group('gloo', store=store, rank=rank, world_size=2)
    _, model, step = pair(vocab_size=65, n_layer=layers, by_rank=rank)
    for x, y in two_steps(rows):
        for i in range(2):
            step.forward_backward(x[rank, i], y[rank, i], share=0.25, first=i == 0, last=i == 1)
        step.update()
    torch.save(model.state_dict(), f'{folder}/{rank}.pt')
    leave_group(0)


def two_steps(rows):
    """x, y of two steps, (2 processes, 2 micro-steps, rows, 13) each; tokens come more than once."""
    for seed in range(2):
        torch.manual_seed(seed)
        yield torch.randint(20, (2, 2, rows, 13)), torch.randint(65, (2, 2, rows, 13))


# 2 x 5 x 13 tokens are more than the head has rows
@pytest.mark.parametrize('rows, gathered, layers', [(3, True, 3), (3, True, 1), (5, False, 3)])
def test_two_processes_make_the_steps_of_one(rows, gathered, layers, double, tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path), rows, layers), nprocs=2)
    _, model, step = pair(vocab_size=65, n_layer=layers, by_rank=0)
    assert (2 * rows * 13 <= step.head_rows) == gathered
    for x, y in two_steps(rows):
        for n, (rank, i) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            step.forward_backward(x[rank, i], y[rank, i], share=0.25, first=n == 0)
        step.update()
    ends = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    for name, p in model.state_dict().items():
        assert torch.equal(ends[0][name], ends[1][name]) and off(ends[0][name], p) < 1e-12, name


def test_tokens_are_numbered_so_that_equal_ones_share_a_row():
    ids, different = torch.tensor([[7, 3, 7], [9, 3, 0]]), torch.empty(6, dtype=torch.int32)
    numbers = kernels.number_tokens(ids, different, 10)
    assert torch.equal(different[numbers], ids.int()) and sorted(different.tolist()) == [-1, -1, 0, 3, 7, 9]


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('n', [1, 2, 3])
def test_copies_between_processes_give_all_of_them_the_same_sum_and_the_others_rows(n, device):
    """Threads for processes: each reads the others' tensors where they lie, and late ones are waited for."""
    meeting, places = threading.Barrier(n, timeout=60), [{} for _ in range(n)]

    def all_are_here():
        if device == 'cuda':
            torch.cuda.current_stream().synchronize()
        meeting.wait()
        time.sleep(random.random() / 200)

    def process(rank):
        def share(size, dtype, device):
            number = len(places[rank])
            places[rank][number] = torch.zeros(size, dtype=dtype, device=device)
            meeting.wait()
            return places[rank][number], [of[number] for of in places], all_are_here
        exchange = ByCopies(rank, share, torch.cuda.Stream() if device == 'cuda' else None)
        flat, rows = exchange.empty(1000, torch.float32, device), exchange.empty(70, torch.float32, device)
        found, delays = [], random.Random(rank)
        for turn in range(20):
            time.sleep(delays.random() / 200)
            exchange.begin()
            flat.copy_(of_rank(turn, rank, 1000))
            rows.copy_(of_rank(turn, rank, 70))
            exchange.sum(flat[300:])
            every = torch.empty(n, 70, device=device)
            exchange.gather(every, rows)
            exchange.wait()
            every = every.cpu()
            exchange.sum(flat[1:201])
            exchange.wait()
            found.append((flat.clone().cpu(), every))
        return found

    def of_rank(turn, rank, size):
        return torch.randn(size, generator=torch.Generator().manual_seed(100 * turn + rank))
    with ThreadPoolExecutor(n) as threads:
        found = list(threads.map(process, range(n)))
    for turn in range(20):
        flats, every = zip(*(of_one[turn] for of_one in found))
        mine = [of_rank(turn, rank, 1000) for rank in range(n)]
        for part in (slice(300, 1000), slice(1, 201)):
            assert all(torch.equal(flat[part], flats[0][part]) for flat in flats)
            assert off(flats[0][part], sum(x[part] for x in mine)) < 1e-6
        for part in (slice(0, 1), slice(201, 300)):
            assert all(torch.equal(flat[part], x[part]) for flat, x in zip(flats, mine))
        assert all(torch.equal(e, torch.stack([of_rank(turn, rank, 70) for rank in range(n)])) for e in every)


def test_processes_of_a_cpu_or_of_several_machines_sum_by_the_group_and_say_why(monkeypatch):
    exchange, reason = choose_exchange(torch.device('cpu'), copies=True)
    assert type(exchange) is ByGroup and reason == "they are between CUDA devices"
    exchange, reason = choose_exchange(torch.device('cpu'), copies=False)
    assert type(exchange) is ByGroup and reason == ''
    monkeypatch.setattr('torch.distributed.get_world_size', lambda: 16)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    assert why_no_copies(torch.device('cuda:0')) == "the processes are not all on one machine"
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '16')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    assert why_no_copies(torch.device('cuda:0')) == "a process does not see the others' GPUs"


def test_a_mask_keeps_the_right_share_and_two_seeds_know_nothing_of_each_other():
    seeds = (1, 1, 2, 2**32 + 1, 2**61)
    masks = torch.stack([kernels.keep_mask(torch.tensor([seed]), (500, 700), 0.2) for seed in seeds])
    assert torch.equal(masks[0], masks[1]) and set(masks.unique().tolist()) == {0.0, 1.25}
    spread = (masks[1:].double() - 1).flatten(1) / 0.5 # of a mask's values: sqrt(0.2 / 0.8)
    for a in range(4):
        assert abs(spread[a].mean()) < 5 / 350_000 ** 0.5
        for b in range(a):
            assert abs((spread[a] * spread[b]).mean()) < 5 / 350_000 ** 0.5
        for lag in (1, 2, 32, 700):
            assert abs((spread[a, lag:] * spread[a, :-lag]).mean()) < 5 / 350_000 ** 0.5


def test_where_it_cannot_run_it_says_why():
    assert why_not('cpu', 'bfloat16') == "it runs on a CUDA device, not on cpu"
    assert why_not('cuda', 'float16') == "it computes in bfloat16, not in float16"


@pytest.mark.parametrize('lacks, reason', [
    ({}, ''), ({'compiler': None}, "Triton needs a C compiler"), ({'triton': None}, "Triton is not installed"),
    ({'capability': (7, 5)}, "the kernels need compute capability 8.0")])
def test_what_its_kernels_need_is_looked_for_before_the_first_step(lacks, reason, monkeypatch):
    there = {'triton': True, 'capability': (9, 0), 'compiler': '/usr/bin/cc', **lacks}
    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: there['triton'])
    monkeypatch.setattr('shutil.which', lambda name: there['compiler'])
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: there['capability'])
    monkeypatch.setattr(decode, 'why_unavailable', decode.why_unavailable.__wrapped__) # without its memory
    assert why_not('cuda', 'bfloat16') == reason


# -----------------------------------------------------------------------------
# on an H100

@pytest.fixture
def cuda():
    torch.manual_seed(3)
    return torch.device('cuda')


def near(got, want, allowed):
    """The kernel's result beside the plain definition's in float64, on the CPU."""
    assert off(got.cpu(), want) < allowed


BF16 = 2.4e-3 # of a bfloat16 result: rounding alone is 1.7e-3


@on_gpu
@pytest.mark.parametrize('M, C', [(1037, 768), (5, 384), (130, 1600), (7, 40)])
@pytest.mark.parametrize('p', [0.0, 0.3])
@pytest.mark.parametrize('bias', [False, True])
def test_the_norm_kernels_are_their_definitions(M, C, p, bias, cuda):
    x, dx, branch = (torch.randn(M, C, device=cuda) for _ in range(3))
    branch = branch.bfloat16()
    weight, b = torch.randn(C, device=cuda), torch.randn(C, device=cuda) if bias else None
    weight[::7] = 0
    seed, dh = torch.tensor([12345], device=cuda), torch.randn(M, C, device=cuda).bfloat16()
    mask = kernels.keep_mask(seed, (M, C), p) if p else torch.ones(M, C, device=cuda)

    def wide(t):
        return None if t is None else t.double().cpu()
    for some in (branch, None):
        dropped = None if some is None else wide(some) * wide(mask)
        want = kernels.add_norm(wide(x), dropped, wide(weight), wide(b), None, 0.0, torch.float64)
        got = kernels.add_norm(x, some, weight, b, seed, p, torch.bfloat16)
        for g, w, allowed in zip(got, want, (1e-6, BF16, 1e-5)):
            near(g, w, allowed)
    after, h, stats = kernels.add_norm(x, branch, weight, b, seed, p, torch.bfloat16)
    saved = after if bias else h
    for given in (dx, None):
        parts = [torch.full((kernels.PROGRAMS, C), math.nan, device=cuda) for _ in range(2)]
        exact = [torch.empty(kernels.PROGRAMS, C, dtype=torch.float64) for _ in range(2)]
        mine = None if given is None else given.clone()
        got = kernels.norm_backward(dh, saved, stats, weight, mine, seed, p, parts[0], parts[1] if bias else None,
                                    torch.float32)
        want = kernels.norm_backward(wide(dh), wide(saved), wide(stats), wide(weight), wide(given), None, 0.0,
                                     exact[0], exact[1] if bias else None, torch.float64)
        near(got[0], want[0], 1e-5)
        near(got[1], want[0] * wide(mask), BF16)
        near(parts[0].sum(0), exact[0].sum(0), 1e-5)
        if bias:
            near(parts[1].sum(0), exact[1].sum(0), 1e-5)


@on_gpu
@pytest.mark.parametrize('B, T', [(1, 1), (3, 37), (12, 1024)])
def test_tokens_are_numbered_and_their_rows_added_as_by_the_definition(B, T, cuda):
    ids = torch.randint(50257, (B, T)) ** 2 // 50257 # small ones come often
    got = torch.empty(B * T, dtype=torch.int32, device=cuda)
    numbers, want = kernels.number_tokens(ids.to(cuda), got, 50304).cpu(), got.cpu()
    assert torch.equal(want[numbers], ids.int()) and (want >= 0).sum() == len(ids.unique())
    wte, rows = torch.randn(50304, 40), torch.randn(B * T, 40)
    on_card = wte.to(cuda)
    kernels.add_rows(on_card, got, rows.to(cuda))
    kernels.add_rows(wte, want, rows)
    assert torch.equal(on_card.cpu(), wte)


@on_gpu
@pytest.mark.parametrize('p', [0.0, 0.3])
@pytest.mark.parametrize('B, T, C', [(5, 37, 40), (1, 64, 1600), (8, 1, 768)])
def test_the_embedding_kernels_are_their_definitions(B, T, C, p, cuda):
    ids, seed = torch.randint(50, (B, T), device=cuda), torch.tensor([12345], device=cuda)
    wte, wpe, dx = (torch.randn(n, C, device=cuda) for n in (50, 64, B * T))

    def wide(t):
        return t.double().cpu()
    near(kernels.embed(ids, wte, wpe, seed, p, torch.float32),
         kernels.embed(ids.cpu(), wide(wte), wide(wpe), seed.cpu(), p, torch.float64), 1e-6)
    for add in (False, True):
        got = [torch.full_like(w, 3.0) for w in (wte, wpe)]
        want = [wide(w) for w in got]
        kernels.embed_backward(dx, ids, seed, p, *got, add)
        kernels.embed_backward(wide(dx), ids.cpu(), seed.cpu(), p, *want, add)
        for g, w in zip(got, want):
            near(g, w, 1e-6)


@on_gpu
@pytest.mark.parametrize('tanh', [False, True])
def test_the_gelu_kernels_are_their_definitions(tanh, cuda):
    x, dy = (4 * torch.randn(1001, 77, device=cuda)).bfloat16(), torch.randn(1001, 77, device=cuda).bfloat16()
    near(kernels.gelu(x, tanh), kernels.gelu(x.double().cpu(), tanh), BF16)
    again = torch.full_like(x, math.nan)
    want = kernels.gelu_backward(x.double().cpu(), dy.double().cpu(), tanh)
    near(kernels.gelu_backward(x, dy.clone(), tanh, again), want, BF16)
    assert torch.equal(again, kernels.gelu(x, tanh))


@on_gpu
@pytest.mark.parametrize('tanh', [False, True])
@pytest.mark.parametrize('M, C', [(1001, 768), (130, 104)])
def test_gelu_in_and_beside_its_matmul_is_its_definition(M, C, tanh, cuda, monkeypatch):
    x, w, b = (torch.randn(shape, device=cuda).bfloat16() / 5 for shape in ((M, C), (4 * C, C), (4 * C,)))
    dy, back = torch.randn(M, C, device=cuda).bfloat16(), torch.randn(C, 4 * C, device=cuda).bfloat16() / 5
    wide = [t.double().cpu() for t in (x, w, b, dy, back)]
    want = kernels.linear_gelu(*wide[:3], tanh)
    for kernel in (True, False):
        monkeypatch.setattr(kernels, '_has_gelu_in_matmul', lambda x, w, kernel=kernel: kernel and x.is_cuda)
        got = kernels.linear_gelu(x, w, b, tanh)
        for g, e in zip(got, want):
            near(g, e, 2 * BF16)
        dwant = kernels.linear_gelu_backward(*wide[3:], got[0].double().cpu(), tanh, True)
        for again in (True, False):
            dgot = kernels.linear_gelu_backward(dy, back, got[0], tanh, again)
            near(dgot[0], dwant[0], 2 * BF16)
            assert torch.equal(dgot[1], got[1]) if again else dgot[1] is None


@on_gpu
@pytest.mark.parametrize('V, width', [(65, 128), (50257, 50304), (128, 128), (4097, 4160)])
def test_the_cross_entropy_kernel_is_its_definition(V, width, cuda):
    logits, targets = (3 * torch.randn(301, width, device=cuda)).bfloat16(), torch.randint(V, (301,), device=cuda)
    targets[::7] = -1
    logits[:, V:] = 50 # no token's
    counted = torch.tensor(4, device=cuda)
    got, want = logits.clone(), logits.double().cpu()
    losses, exact = torch.full((301,), math.nan, device=cuda), torch.empty(301, dtype=torch.float64)
    kernels.cross_entropy_(got, targets, losses, 0.5, counted, V, False)
    assert torch.equal(got, logits), "without the gradient nothing is written"
    near(losses, torch.nn.functional.cross_entropy(want[:, :V], targets.cpu(), ignore_index=-1, reduction='none'), 1e-5)
    kernels.cross_entropy_(got, targets, losses, 0.5, counted, V, True)
    kernels.cross_entropy_(want, targets.cpu(), exact, 0.5, counted.cpu(), V, True)
    near(losses, exact, 1e-5)
    near(got, want, BF16)
    assert (got[::7] == 0).all() and (got[:, V:] == 0).all()
    logits[5, 3] = math.nan
    kernels.cross_entropy_(logits, targets, losses, 0.5, counted, V, True)
    assert losses[5].isnan() and losses.isnan().sum() == 1


@on_gpu
def test_the_optimiser_kernels_are_their_definitions(cuda):
    n = 100_003
    flat = [torch.randn(n, device=cuda) for _ in range(3)] + [torch.rand(n, device=cuda)]
    for go in (1.0, 0.0):
        hyper = torch.tensor([1e-2, 0.1, 0.5, 0.1, 0.05, go], device=cuda)
        got, half = [t.clone() for t in flat], torch.zeros(n, device=cuda, dtype=torch.bfloat16)
        want, exact = [t.double().cpu() for t in flat], torch.zeros(n, dtype=torch.float64)
        kernels.adamw_(got[0], half, *got[1:], hyper, 0.9, 0.95, 1e-8, 1000)
        kernels.adamw_(want[0], exact, *want[1:], hyper.double().cpu(), 0.9, 0.95, 1e-8, 1000)
        for g, w in zip(got, want):
            near(g, w, 1e-6)
        assert torch.equal(half, got[0].bfloat16() * go)
    assert kernels.squares(flat[0]).sum().item() == pytest.approx(flat[0].double().square().sum().item(), rel=1e-5)


@on_gpu
@pytest.mark.parametrize('t', [0, 1, 100_000])
@pytest.mark.parametrize('grad_clip', [0.0, 1.0, 1e9])
def test_the_plan_of_a_step_is_its_definition(grad_clip, t, cuda):
    lr, parts = torch.tensor(6e-4, dtype=torch.float64, device=cuda), torch.rand(1056, device=cuda)
    beta1 = 0.9 if t else 0.0
    for spoil, bad in ((1.0, 0), (math.inf, 1), (math.nan, 1)):
        parts[77] = spoil
        got = [torch.full(n, value, device=cuda) for n, value in (((6,), math.nan), ((), math.nan), ((75,), float(t)))]
        want = [x.double().cpu() for x in got]
        kernels.plan_(*got, parts, lr, 0.1, grad_clip, beta1, 0.999)
        kernels.plan_(*want, parts.double().cpu(), lr.cpu(), 0.1, grad_clip, beta1, 0.999)
        assert got[1].item() == want[1].item() == bad and set(got[2].tolist()) == {t + 1 - bad}
        known = [0, 1, 5] if bad else [0, 1, 2, 3, 4, 5] # nobody asks for the others then
        torch.testing.assert_close(got[0][known].double().cpu(), want[0][known], rtol=1e-6, atol=0)


@on_gpu
@pytest.mark.parametrize('seed', [0, 1, 2**31, 2**61 + 98_765_432_101])
def test_the_kernels_drop_what_the_definition_drops(seed, cuda):
    for p in (0.2, 0.5, 1e-9):
        got = kernels.keep_mask(torch.tensor([seed], device=cuda), (123, 457), p)
        assert torch.equal(got.cpu(), kernels.keep_mask(torch.tensor([seed]), (123, 457), p))


def small(cuda, **kw):
    torch.manual_seed(3)
    kw = {**dict(block_size=512, vocab_size=50304, n_layer=3, n_head=6, n_embd=384, bias=False), **kw}
    return GPT(GPTConfig(**kw)).to(cuda)


def step_of(model, **kw):
    return TrainStep(model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cuda'), **kw)


@on_gpu
@pytest.mark.parametrize('kernel', [True, False], ids=['TK', 'SDPA'])
@pytest.mark.parametrize('T, kw', [(511, {}), (257, dict(bias=True, gelu='tanh', vocab_size=65))], ids=['511', '257'])
@pytest.mark.parametrize('kept_bytes', [math.inf, 0], ids=['kept', 'again'])
def test_every_gradient_is_as_near_to_float64_as_plain_nanogpts(T, kw, kernel, kept_bytes, cuda):
    V = kw.get('vocab_size', 50257)
    x, y = torch.randint(V, (4, T), device=cuda), torch.randint(V, (4, T), device=cuda)
    y[0, :9] = -1
    exact, plain, mine = small(cuda, **kw).double(), small(cuda, **kw), small(cuda, TK_kernel=kernel, **kw)
    exact(x, y)[1].backward()
    with torch.autocast('cuda', dtype=torch.bfloat16):
        plain(x, y)[1].backward()
    step = step_of(mine)
    step.kept_bytes = kept_bytes
    losses = [step.forward_backward(x, y).item() for _ in range(3)] # as it is, captured, replayed
    assert max(losses) - min(losses) < 1e-5
    assert losses[0] == pytest.approx(exact(x, y)[1].item(), abs=1e-3)
    for (name, p), q, r in zip(exact.named_parameters(), plain.parameters(), mine.parameters()):
        assert off(r.grad, p.grad) < 1.5 * off(q.grad, p.grad) + 1e-5, name


@on_gpu
def test_changing_shapes_accumulation_and_evaluation_in_between_are_right(cuda):
    plain, mine = small(cuda, TK_kernel=True), small(cuda, TK_kernel=True)
    step, optimizer = step_of(mine), plain.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cuda')
    for i in range(6):
        for micro_step in range(3):
            T = 128 if i % 3 else 77
            x, y = torch.randint(999, (8, T), device=cuda), torch.randint(999, (8, T), device=cuda)
            with torch.autocast('cuda', dtype=torch.bfloat16):
                loss = plain(x, y)[1]
            (loss / 3).backward()
            got = step.forward_backward(x, y, share=1 / 3, first=micro_step == 0)
            assert got.item() == pytest.approx(loss.item(), abs=0.02)
            with torch.autocast('cuda', dtype=torch.bfloat16), torch.no_grad():
                assert step.evaluate(x[:5], y[:5]).item() == pytest.approx(plain(x[:5], y[:5])[1].item(), abs=0.02)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step.update()
    for (name, p), q in zip(plain.named_parameters(), mine.parameters()):
        assert off(q, p) < 0.02, name


class Twins(ByGroup):
    """The exchange of a process with one that is just like it."""

    def sum(self, part):
        part *= 2

    def gather(self, every, mine):
        every.copy_(mine.expand_as(every))


@on_gpu
@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('rows, gathered', [(2, True), (9, False)])
def test_two_processes_with_the_same_batch_have_twice_its_gradient(rows, gathered, deterministic, cuda):
    alone, twin = (step_of(small(cuda, TK_kernel=True, vocab_size=600), exchange=e) for e in (None, Twins()))
    twin.world_size = 2
    assert (2 * rows * 128 <= twin.head_rows) == gathered
    torch.use_deterministic_algorithms(deterministic)
    try:
        for i in range(8): # as they are, captured, replayed; the second of each two is the last of its step
            x, y = torch.randint(599, (rows, 128), device=cuda), torch.randint(599, (rows, 128), device=cuda)
            alone.forward_backward(x, y, share=1.0, first=i % 2 == 0)
            twin.forward_backward(x, y, share=0.5, first=i % 2 == 0, last=i % 2 == 1)
            if i % 2 == 1:
                for name, g in alone.g.items():
                    assert off(twin.g[name], g) < 1e-5, name
    finally:
        torch.use_deterministic_algorithms(False)


@on_gpu
def test_deterministic_algorithms_give_the_same_bits_and_a_graph_draws_new_masks(cuda):
    x, y = torch.randint(999, (8, 128), device=cuda), torch.randint(999, (8, 128), device=cuda)
    torch.use_deterministic_algorithms(True)
    try:
        step = step_of(small(cuda, TK_kernel=True))
        found = []
        for _ in range(4):
            step.forward_backward(x, y)
            found.append(step.grads.clone())
        assert all(torch.equal(found[0], other) for other in found[1:])
    finally:
        torch.use_deterministic_algorithms(False)
    dropping = step_of(small(cuda, TK_kernel=True, dropout=0.2))
    losses = [dropping.forward_backward(x, y).item() for _ in range(5)]
    assert len(set(losses)) == 5
    torch.cuda.manual_seed(5)
    first = [dropping.forward_backward(x, y).item() for _ in range(2)]
    torch.cuda.manual_seed(5)
    assert [dropping.forward_backward(x, y).item() for _ in range(2)] == first


@on_gpu
@pytest.mark.parametrize('half', [False, True], ids=['float32', 'autocast'])
def test_sampling_in_between_is_from_the_weights_of_the_moment_and_changes_no_step_of_graphs(half, cuda):
    """In float32 the kept graphs read the step's own weights; under autocast they read casts, and are not kept."""
    kw = dict(block_size=64, vocab_size=301, dropout=0.1, TK_kernel=half) # the kernel has no float32
    batches = torch.randint(301, (4, 2, 8, 64), device=cuda) # as they are, captured, replayed twice
    prompts = torch.randint(301, (3, 50), device=cuda)

    def speak(model):
        torch.use_deterministic_algorithms(False) # they are for the steps
        with torch.autocast('cuda', dtype=torch.bfloat16, enabled=half):
            text = model.generate(prompts, 30, seed=4) # past block_size
            assert bool(model.writers) != half
            assert torch.equal(text, copy.deepcopy(model).generate(prompts, 30, seed=4))
        torch.use_deterministic_algorithms(True, warn_only=True)
        return text
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        quiet, _ = train_and_speak(small(cuda, **kw).eval(), batches, lambda model: None)
        found, said = train_and_speak(small(cuda, **kw).eval(), batches, speak)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, found, quiet))
    assert_said_by_the_weights_of_the_moment(said)


@on_gpu
def test_a_step_waits_for_nobody_and_what_is_not_finite_is_skipped_in_a_graph(cuda):
    model = small(cuda, TK_kernel=True)
    step = step_of(model)
    x, y = torch.randint(999, (8, 128), device=cuda), torch.randint(999, (8, 128), device=cuda)
    for _ in range(3):
        step.forward_backward(x, y)
        step.update()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        step.forward_backward(x, y)
        step.update()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    before = copy.deepcopy(model.state_dict())
    weight = step.copies[step.first['transformer.h.0.mlp.c_fc.weight']]
    saved = weight.clone()
    weight.fill_(math.nan)
    step.forward_backward(x, y)
    assert step.update().item() == 1
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    weight.copy_(saved)
    step.forward_backward(x, y)
    assert step.update().item() == 0 and not torch.equal(model.lm_head.weight, before['lm_head.weight'])


@on_gpu
def test_a_bfloat16_residual_stream_is_another_one_and_close(cuda):
    x, y = torch.randint(999, (8, 512), device=cuda), torch.randint(999, (8, 512), device=cuda)
    found = [step_of(small(cuda, TK_kernel=True), residual=residual).forward_backward(x, y).item()
             for residual in (torch.float32, torch.bfloat16)]
    assert found[0] != found[1] == pytest.approx(found[0], abs=0.02)


@on_gpu
@pytest.mark.parametrize('dropout', [0.0, 0.2])
def test_all_kernels_of_a_step_are_compiled_before_it_which_leaves_no_trace(dropout, cuda, monkeypatch):
    triton = pytest.importorskip('triton')
    n_embd = 256 if dropout else 128 # widths that no other test has
    step, other = (step_of(small(cuda, n_embd=n_embd, n_head=2, dropout=dropout)) for _ in range(2))
    before, random = step.params.clone(), torch.cuda.get_rng_state()
    step.compile(4, 64)
    assert torch.equal(step.params, before) and not step.exp_avg.any() and not step.steps.any()
    assert torch.equal(torch.cuda.get_rng_state(), random)
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, 'jit_post_compile_hook', lambda **kernel: compiled.append(kernel['repr']))
    x, y = torch.randint(999, (4, 64), device=cuda), torch.randint(999, (4, 64), device=cuda)
    found = []
    for this in (step, other):
        torch.cuda.manual_seed(5)
        found.append([f(x, y).item() for f in (this.evaluate, this.forward_backward)] + [this.update().item()])
    assert not compiled and found[0] == found[1]
