"""
Nobody reads or writes another process's gradients too early. Threads stand for processes and vector clocks for streams:
whatever the step touches of a shared tensor must come after what others did there, by the waits that the code makes,
and not by luck.
"""
import contextlib
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, GPTConfig
from ThunderKittens.examples.gpt2_step import AdamW, TrainStep
from ThunderKittens.examples.gpt2_step.exchange import ByCopies


class Stream:
    """What has happened before its next work: for each stream, how many of its works."""

    def __init__(self, name):
        self.name, self.seen = name, {name: 1}

    def wait_stream(self, other):
        self.meet([other])
        other.seen[other.name] += 1

    def meet(self, others):
        for other in others:
            for name, n in other.seen.items():
                self.seen[name] = max(self.seen.get(name, 0), n)


class Machine(TorchDispatchMode):
    """GPUs, a thread each, whose shared tensors are watched."""

    def __init__(self, n):
        super().__init__()
        self.n, self.local, self.lock = n, threading.local(), threading.Lock()
        self.meeting, self.waiting, self.shared, self.races = threading.Barrier(n, timeout=60), [None] * n, [], set()

    def share(self, tensor, name):
        with self.lock:
            self.shared.append((tensor, name, []))
        return tensor

    def barrier(self, rank):
        stream = self.local.streams[-1]
        self.waiting[rank] = Stream(stream.name)
        self.waiting[rank].seen = dict(stream.seen)
        self.meeting.wait()
        stream.meet(self.waiting)
        stream.seen[stream.name] += 1
        self.meeting.wait()

    @contextlib.contextmanager
    def on(self, stream):
        self.local.streams.append(stream)
        yield
        self.local.streams.pop()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, op._schema
        given = [*zip(schema.arguments, args), *((a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs)]
        if not any(r.alias_info and not r.alias_info.is_write for r in schema.returns): # a view is no access
            for argument, value in given:
                for tensor in tree_leaves(value):
                    if isinstance(tensor, torch.Tensor) and tensor.numel():
                        self.touch(tensor, bool(argument.alias_info and argument.alias_info.is_write), str(op))
        return op(*args, **kwargs)

    def touch(self, tensor, writes, op):
        begin, stream = tensor.data_ptr(), self.local.streams[-1]
        end = begin + tensor.element_size() * (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())))
        with self.lock:
            for shared, name, before in self.shared:
                if shared.data_ptr() <= begin < shared.data_ptr() + shared.nbytes:
                    for begin_2, end_2, writes_2, by, when, op_2 in before:
                        if begin < end_2 and begin_2 < end and (writes or writes_2) and stream.seen.get(by, 0) < when \
                                and by != stream.name:
                            self.races.add(f"{name}: {op_2} on {by}, {op} on {stream.name}")
                    before.append((begin, end, writes, stream.name, stream.seen[stream.name], op))


def new_step(model, **kw):
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu', AdamW)
    return TrainStep(model, optimizer, grad_clip=0.5, residual=torch.float64, half=torch.float64, **kw)


def train(machine, rank, model, batches, exchange_of):
    """A process's part of some steps, whose micro-batches are dealt out: parameters, and whether steps were bad."""
    machine.local.streams = [Stream(f'main {rank}')]
    exchange = exchange_of(rank)
    step, bad = new_step(model, exchange=exchange), []
    step.world_size = machine.n
    with machine:
        for batch in batches:
            mine = batch[rank::machine.n]
            for i, (x, y) in enumerate(mine or batch[:1]):
                step.forward_backward(x, y, 1 / len(batch) if mine else 0.0, first=i == 0, last=i + 1 >= len(mine))
            bad.append(step.update().item())
    return model.state_dict(), bad


@pytest.fixture
def world(double, monkeypatch):
    """run(n, model, batches, broken) -> what train() returned for each of n processes, the races found."""
    def run(n, model, batches, broken=lambda exchange: None):
        machine, places = Machine(n), [[] for _ in range(n)]
        monkeypatch.setattr(torch.cuda, 'current_stream', lambda *device: machine.local.streams[-1])
        monkeypatch.setattr(torch.cuda, 'stream', machine.on)

        def exchange_of(rank):
            def share(size, dtype, device):
                places[rank].append(machine.share(torch.zeros(size, dtype=dtype), f'{len(places[rank])} of {rank}'))
                number = len(places[rank]) - 1
                machine.meeting.wait()
                return places[rank][number], [of[number] for of in places], lambda: machine.barrier(rank)
            exchange = ByCopies(rank, share, Stream(f'side {rank}'))
            gather = exchange.gather
            exchange.gather = lambda every, mine: gather(machine.share(every, f'every of {rank}'), mine)
            broken(exchange)
            return exchange
        with ThreadPoolExecutor(n) as threads:
            ends = threads.map(lambda rank: train(machine, rank, copy.deepcopy(model), batches, exchange_of), range(n))
            return list(ends), machine.races
    return run


def case(n_layer, vocab_size, bias, micro_steps, shapes):
    torch.manual_seed(1)
    config = GPTConfig(block_size=16, n_layer=n_layer, n_head=2, n_embd=16, vocab_size=vocab_size, bias=bias)
    batches = [[(torch.randint(min(vocab_size, 20), shape), torch.randint(vocab_size, shape))
                for _ in range(micro_steps)] for shape in shapes]
    return GPT(config).double(), batches


@pytest.mark.parametrize('n, of', [
    (2, case(3, 320, True, 3, [(1, 7)] * 2)), # the rows of tokens travel: 2 x 7 tokens, 320 rows; shares of 2 and 1
    (3, case(1, 320, False, 4, [(1, 7)] * 2)),
    (3, case(5, 320, False, 2, [(1, 7)] * 2)), # one process has no share
    (2, case(3, 65, True, 2, [(5, 13)] * 2)), # the whole embedding travels: 2 x 65 tokens, 128 rows
    (2, case(2, 320, False, 2, [(1, 7), (12, 16), (1, 7), (2, 5), (12, 16)])), # both, shapes that change
])
def test_processes_touch_shared_gradients_in_order_and_make_the_steps_of_one(n, of, world):
    model, batches = of
    ends, races = world(n, model, batches)
    assert not races
    step = new_step(model := copy.deepcopy(model))
    for batch in batches:
        for i, (x, y) in enumerate(batch):
            step.forward_backward(x, y, 1 / len(batch), first=i == 0)
        step.update()
    for name, p in model.state_dict().items():
        assert all(torch.equal(end[name], ends[0][0][name]) for end, _ in ends), name
        assert (ends[0][0][name] - p).norm() <= 1e-11 * p.norm().clamp(min=1e-9), name


@pytest.mark.parametrize('fault', ['begin', 'wait', 'meetings'])
def test_a_wait_that_is_missing_is_noticed(fault, world):
    def broken(exchange):
        if fault == 'begin':
            exchange.begin = lambda: None
        elif fault == 'wait': # without all processes' last meeting
            exchange.wait = lambda: ByCopies.begin(exchange)
        else:
            share = exchange.share
            exchange.share = lambda *size: (*share(*size)[:2], lambda: None)
    _, races = world(2, *case(1, 65, False, 2, [(5, 13)] * 2), broken)
    assert races
