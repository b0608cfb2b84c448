"""
How processes sum their gradients while the backward still runs.

What NCCL hides behind the backward costs nearly what it would cost afterwards (NOTES.md), probably since its kernels
take multiprocessors, and a matmul that misses some needs a second wave. GPUs of one machine can do with copies from
each other's memory, for which they have engines of their own; torch's symmetric memory shows each process the others'
tensors.
"""
import atexit
import contextlib
import importlib.util
import os

import torch
import torch.distributed as dist

TIMEOUT_ms = 600_000 # of a process waiting for another, as NCCL's


class ByGroup:
    """By torch.distributed: NCCL between GPUs, gloo between CPUs."""
    how = "by all-reduce"

    def __init__(self):
        self.running = []

    def empty(self, n, dtype, device):
        """(n), zeros: what is to be summed or gathered must be a part of such a tensor."""
        return torch.zeros(n, dtype=dtype, device=device)

    def begin(self):
        """Wait until such tensors may be written again."""

    def sum(self, part):
        """Start to sum `part` over the processes, in place; all of them get the same bits."""
        self.running.append(dist.all_reduce(part, async_op=True))

    def gather(self, every, mine):
        """Start every[rank] = the process's `mine`: every (world_size, n), mine (n)."""
        self.running.append(dist.all_gather_into_tensor(every.view(-1), mine, async_op=True))

    def wait(self):
        """Later work sees what was started."""
        while self.running:
            self.running.pop(0).wait()


class ByCopies:
    """
    By copies between the memories of one machine's GPUs, a process each.

    share   (n, dtype, device) -> this process's tensor of n zeros, those of all processes as it sees them, and a
            function that waits for all processes; called by all together
    stream  where it happens; None on a CPU
    """
    how = "by copies between the GPUs"

    def __init__(self, rank, share, stream=None):
        self.rank, self.share, self.stream, self.shared = rank, share, stream, []

    def empty(self, n, dtype, device):
        self.shared.append(self.share(n, dtype, device))
        return self.shared[-1][0]

    def begin(self):
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)

    def sum(self, part):
        """A process sums its share of `part`, and then takes what the others have summed."""
        everyone, all_are_here = self._everyones(part)
        n = len(everyone)
        size = -(-len(part) // (64 * n)) * 64
        shares = [slice(r * size, (r + 1) * size) for r in range(n)]
        others = [(self.rank + i) % n for i in range(1, n)]
        with self._beside():
            all_are_here()
            for r in others:
                part[shares[self.rank]] += everyone[r][shares[self.rank]].clone() # a copy first: engines do that
            all_are_here()
            for r in others:
                part[shares[r]].copy_(everyone[r][shares[r]])

    def gather(self, every, mine):
        everyone, all_are_here = self._everyones(mine)
        with self._beside():
            all_are_here()
            for i in range(len(everyone)):
                r = (self.rank + i) % len(everyone)
                every[r].copy_(everyone[r])

    def wait(self):
        self.begin()
        with self._beside(): # nobody reads the tensors any more, of which begin() will make sure
            self.shared[0][2]()

    def _beside(self):
        if self.stream is None:
            return contextlib.nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)

    def _everyones(self, part):
        for tensor, everyone, all_are_here in self.shared:
            at = (part.data_ptr() - tensor.data_ptr()) // part.element_size()
            if 0 <= at < len(tensor):
                return [x[at:at + len(part)] for x in everyone], all_are_here
        raise ValueError("not a part of a tensor that empty() made")


def why_no_copies(device):
    """'' where processes can read each other's GPU memory, else the reason in a few words."""
    if device.type != 'cuda':
        return "they are between CUDA devices"
    n = dist.get_world_size()
    if os.environ.get('LOCAL_WORLD_SIZE') != str(n):
        return "the processes are not all on one machine"
    if torch.cuda.device_count() < n:
        return "a process does not see the others' GPUs"
    if not all(torch.cuda.can_device_access_peer(device.index, other) for other in {*range(n)} - {device.index}):
        return "the GPUs cannot reach each other's memory"
    return '' if importlib.util.find_spec('torch.distributed._symmetric_memory') else "torch has no symmetric memory"


def choose_exchange(device, copies):
    """ByCopies where `copies` and the machine allow it, else ByGroup, and why: all processes take the same."""
    if not copies:
        return ByGroup(), ''
    reason = why_no_copies(device)
    if device.type != 'cuda':
        return ByGroup(), reason
    reason = reason_of_any(reason, device)
    if not reason:
        os.environ.setdefault('TORCH_SYMM_MEM_DISABLE_MULTICAST', '1') # not needed
        from torch.distributed import _symmetric_memory as symmetric

        def share(n, dtype, device):
            mine = symmetric.empty(n, dtype=dtype, device=device).zero_()
            handle = symmetric.rendezvous(mine, dist.group.WORLD)
            return (mine, [handle.get_buffer(r, (n,), dtype) for r in range(handle.world_size)],
                    lambda: handle.barrier(timeout_ms=TIMEOUT_ms))
        try:
            share(64, torch.float32, device)[2]()
        except RuntimeError as e:
            reason = str(e).splitlines()[0]
        reason = reason_of_any(reason, device)
    if reason:
        return ByGroup(), reason
    atexit.register(os._exit, 1) # after an error a GPU may wait for one that is gone, and would keep the process
    return ByCopies(dist.get_rank(), share, torch.cuda.Stream(device)), ''


def reason_of_any(reason, device):
    """This process's reason, or that another one has some; '' where none has."""
    able = torch.tensor(0.0 if reason else 1.0, device=device)
    dist.all_reduce(able, dist.ReduceOp.MIN)
    return reason or ('' if able.item() else "another process cannot")
