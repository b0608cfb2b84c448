"""
A GPT's training step by hand: forward, backward and AdamW on flat tensors, replayed as CUDA graphs.

    from ThunderKittens.examples.gpt2_step import AdamW, TrainStep, why_not
    step = TrainStep(model, model.configure_optimizers(..., kind=AdamW), grad_clip=1.0)
    loss = step.forward_backward(x, y)
    step.update()

The mathematics, the parameters' names and the optimiser's state are those of model.py, which is the definition:
float32 weights, optimiser and residual stream, bfloat16 matmuls. What differs is what moves: logits never stand whole
in memory, weights are kept in bfloat16 beside the float32 ones, gradients leave their matmul in float32 where they are
summed, and the passes between the matmuls are one kernel each (kernels.py).
"""
import collections
import functools
import math

import torch
import torch.distributed as dist

from model import sdpa_attention_qkv
from ThunderKittens.examples import decode
from ThunderKittens.examples.attn_causal import causal_attention_qkv, causal_attention_qkv_and_backward

from . import kernels
from .exchange import ByGroup

HEAD_ROWS = 16384 # rows whose logits stand in memory at a time: 1.6 GB at GPT-2's vocabulary
KEPT_share = 0.2 # of the GPU's memory: GELUs that take more altogether are computed once more in the backward


def why_not(device_type, dtype):
    """'' where the step runs, else the reason in a few words."""
    if device_type != 'cuda':
        return f"it runs on a CUDA device, not on {device_type}"
    if dtype != 'bfloat16':
        return f"it computes in bfloat16, not in {dtype}"
    return decode.why_unavailable() # Triton's kernels both, with the same needs


def sdpa_attention_qkv_and_backward(qkv, n_head, dropout=0.0):
    """sdpa_attention_qkv, and a function from its gradient to that of qkv: what autograd does, as a pair."""
    qkv.requires_grad_()
    with torch.enable_grad():
        y = sdpa_attention_qkv(qkv, n_head, dropout)
    return y.detach(), lambda dy: torch.autograd.grad(y, qkv, dy)[0]


class AdamW:
    """
    What the step and a checkpoint need of torch.optim.AdamW, by the same names. The first of torch's own that is made
    imports torch._dynamo, which takes more than a second of a run's start.
    """

    def __init__(self, groups, lr, betas, fused):
        rest = dict(lr=lr, betas=betas, eps=1e-8, amsgrad=False, maximize=False, foreach=None, capturable=False,
                    differentiable=False, fused=fused, decoupled_weight_decay=True)
        self.param_groups, self.state = [{**group, **rest} for group in groups], collections.defaultdict(dict)

    def state_dict(self):
        """As torch's: parameters by their number."""
        number = {p: i for i, p in enumerate(p for group in self.param_groups for p in group['params'])}
        groups = [{**group, 'params': [number[p] for p in group['params']]} for group in self.param_groups]
        return {'state': {number[p]: state for p, state in self.state.items()}, 'param_groups': groups}


class TrainStep:
    """
    model      model.GPT; its parameters become views of one flat tensor, their .grad of another
    optimizer  AdamW or torch.optim.AdamW of the model's parameters: gives learning rate, decay, betas, eps and its
               state, which become views too, so that its state_dict() stays right. Its step() is update() here
    grad_clip  the largest norm of the gradient, 0 for any
    residual   dtype of the residual stream
    half       dtype of the matmuls
    graphs     whether work is captured the second time that a shape comes
    exchange   how processes sum their gradients, where there are several
    """

    def __init__(self, model, optimizer, grad_clip=1.0, residual=torch.float32, half=torch.bfloat16, graphs=True,
                 exchange=None):
        self.config, self.optimizer, self.grad_clip = model.config, optimizer, grad_clip
        self.residual, self.half = residual, half
        self.attention = causal_attention_qkv if model.config.TK_kernel else sdpa_attention_qkv
        self.attention_and_backward = \
            causal_attention_qkv_and_backward if model.config.TK_kernel else sdpa_attention_qkv_and_backward
        self.device = model.lm_head.weight.device
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle() if graphs and self.device.type == 'cuda' else None
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.exchange, self.rows = exchange or ByGroup(), {}
        self.kept_bytes = math.inf if self.device.type != 'cuda' else \
            KEPT_share * torch.cuda.get_device_properties(self.device).total_memory
        self.head_rows = -(-model.config.vocab_size // 64) * 64 # matmuls like whole tiles of vocabulary
        self._take_over(model)
        self._place_sums()

    def _lay_out(self, params):
        """Set where each parameter begins in the flat tensors, (n), and where the undecayed ones end; returns n."""
        L = self.config.n_layer
        norms = [f'transformer.h.{i}.ln_{j}' for i in range(L) for j in (1, 2)] + ['transformer.ln_f']
        undecayed = [f'{norm}.{kind}' for kind in ('weight', 'bias') for norm in norms if f'{norm}.{kind}' in params]
        undecayed += [name for name, p in params.items() if p.dim() < 2 and name not in undecayed]
        decayed = ['transformer.wpe.weight', 'transformer.wte.weight'] # a backward goes from the last layer to them
        decayed += [f'transformer.h.{i}.{name}.weight' for i in range(L)
                    for name in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')]
        assert {*undecayed, *decayed} == set(params)
        self.norms, self.first, n = norms, {}, 0
        for name in undecayed + decayed:
            self.first[name] = n
            rows = self.head_rows if 'wte' in name else len(params[name])
            n += -(-rows * params[name][0].numel() // 64) * 64
        self.undecayed = self.first[decayed[0]]
        return n

    def _view(self, flat, name, shape):
        return flat[self.first[name]:self.first[name] + shape.numel()].view(shape)

    def _take_over(self, model):
        """Parameters, gradients, averages and bfloat16 copies, each flat, in the place of the model's and AdamW's."""
        params = dict(model.named_parameters())
        n, dtype = self._lay_out(params), model.lm_head.weight.dtype
        self.params, self.exp_avg, self.exp_avg_sq = \
            (torch.zeros(n, dtype=dtype, device=self.device) for _ in range(3))
        self.grads = self.exchange.empty(n, dtype, self.device)
        self.copies = torch.zeros(n, dtype=self.half, device=self.device)
        self.steps = torch.zeros(len(params), dtype=torch.float32, device=self.device) # alike: AdamW has one for each
        self.w, self.g, self.half_w = {}, {}, {}
        for i, (name, p) in enumerate(params.items()):
            w, g, half_w, exp_avg, exp_avg_sq = (self._view(flat, name, p.shape) for flat in (
                self.params, self.grads, self.copies, self.exp_avg, self.exp_avg_sq))
            old = self.optimizer.state[p]
            w.copy_(p.data)
            if old:
                exp_avg.copy_(old['exp_avg'])
                exp_avg_sq.copy_(old['exp_avg_sq'])
                self.steps[i] = old['step']
            self.optimizer.state[p] = {'step': self.steps[i], 'exp_avg': exp_avg, 'exp_avg_sq': exp_avg_sq}
            p.data, p.grad = w, g
            self.w[name], self.g[name], self.half_w[name] = w, g, half_w
        if self.world_size > 1:
            dist.broadcast(self.params, 0)
        self.refresh()

    def _place_sums(self):
        """Where the step writes besides: the head with the rows that fill its last tile, the norms' sums, scalars."""
        C, dtype, norms = self.config.n_embd, self.params.dtype, self.norms
        self.head, self.dhead = (self._view(flat, 'transformer.wte.weight', torch.Size((self.head_rows, C)))
                                 for flat in (self.copies, self.grads))
        each = self.first[norms[-1] + '.weight'] // (len(norms) - 1) # from one norm's weight to the next one's
        self.norm_grads = [self.grads[self.first[f'{norms[0]}.{kind}']:].as_strided((len(norms), C), (each, 1))
                           for kind in ('weight', 'bias') if f'{norms[0]}.{kind}' in self.w]
        self.norm_parts = [torch.zeros(len(norms), kernels.PROGRAMS, C, dtype=dtype, device=self.device)
                           for _ in self.norm_grads]
        self.lr = torch.zeros((), dtype=torch.float64, device=self.device)
        self.loss, self.bad = (torch.zeros((), dtype=dtype, device=self.device) for _ in range(2))

    def refresh(self):
        """Tell the step that parameters were changed by somebody else."""
        self.copies.copy_(self.params)

    # ---- what a training loop calls -------------------------------------------------------------------------------

    def forward_backward(self, x, y, share=1.0, first=True, last=True):
        """
        Loss and gradients of a micro-batch.

        x, y     (B, T) int64, as for model.forward
        share    of its loss in the step's
        first    set the gradients, else add to them
        last     sum the gradients over all processes, while the rest of the backward runs; all with the same B and T
        returns  its mean loss, 0-d, unscaled; good until the next call
        """
        several = last and self.world_size > 1
        work = functools.partial(self._forward_backward, share=share, add=not first, several=several)
        self.exchange.begin()
        with torch.no_grad():
            for finished in self._play(('train', share, first, several), work, x, y):
                if type(finished) is tuple:
                    self.exchange.gather(*finished)
                elif finished is not None:
                    self.exchange.sum(finished)
                elif several:
                    self.exchange.wait()
        if several:
            self.exchange.wait()
        return self.loss

    def evaluate(self, x, y):
        """The mean loss of a batch without dropout, 0-d: x, y (B, T) int64."""
        with torch.no_grad():
            list(self._play(('evaluate',), self._evaluate, x, y))
        return self.loss.clone()

    def compile(self, B, T):
        """
        Compile what batches of (B, T) need, all kernels at once, before the first of them comes. Parameters, state and
        random numbers stay as they are, gradients are forgotten; all processes call this together.
        """
        if not self.params.is_cuda:
            return
        x = torch.zeros(B, T, dtype=torch.long, device=self.device)
        with torch.random.fork_rng([self.device]), kernels.compiled_together(self.device):
            self.forward_backward(x, x)
            self.evaluate(x, x)
            self.update()
        self.graphs.clear() # nothing has run
        self.exchange.begin()
        self.grads.zero_()

    def update(self):
        """Clip the gradients and step, unless one is not finite: returns 1 if so and 0 otherwise, 0-d on the device."""
        self.lr.fill_(self.optimizer.param_groups[0]['lr'])
        with torch.no_grad():
            list(self._play(('update',), self._update))
        return self.bad

    def _play(self, name, work, *inputs):
        """
        Run the generator work(*inputs) and pass on what it yields. The first time that such inputs come it runs as it
        is, which compiles what is not compiled yet; the second time each piece between two yields becomes a CUDA graph.
        """
        key = name + tuple(x.shape for x in inputs)
        if self.pool is None or key not in self.graphs:
            pieces = 0
            for yielded in work(*inputs):
                pieces += 1
                yield yielded
            self.graphs[key] = pieces
            return
        if isinstance(self.graphs[key], int):
            mine, running, pieces = [x.clone() for x in inputs], None, []
            for _ in range(self.graphs[key]):
                graph = torch.cuda.CUDAGraph()
                with decode.capture(graph, pool=self.pool):
                    running = running or work(*mine)
                    pieces.append((graph, next(running)))
            self.graphs[key] = mine, pieces
        mine, pieces = self.graphs[key]
        for static, x in zip(mine, inputs):
            static.copy_(x, non_blocking=True)
        for graph, yielded in pieces:
            graph.replay()
            yield yielded

    # ---- forward --------------------------------------------------------------------------------------------------

    def _linear(self, x, name):
        """x (M, in) times a weight (out, in), and its bias if it has one."""
        w, b = self.half_w[f'{name}.weight'], self.half_w.get(f'{name}.bias')
        return x @ w.t() if b is None else torch.addmm(b, x, w.t())

    def _add_norm(self, stream, branch, norm, seed, p):
        """The stream after, its LayerNorm, and of those what the backward needs besides."""
        weight, bias = self.w[f'{norm}.weight'], self.w.get(f'{norm}.bias')
        stream, h, stats = kernels.add_norm(stream, branch, weight, bias, seed, p, self.half)
        return stream, h, (h if bias is None else stream, stats)

    def _forward(self, x, p, keep):
        """What the head reads, (B T, C), and with `keep` what the backward needs."""
        B, T = x.shape
        L, tanh = self.config.n_layer, self.config.gelu == 'tanh'
        # a seed for the embeddings and each branch, drawn on the device so that a graph draws anew
        seeds = torch.randint(2**62, (2 * L + 1, 1), device=self.device) if p else [x.new_empty(1)] * (2 * L + 1)
        stream = kernels.embed(x, self.w['transformer.wte.weight'], self.w['transformer.wpe.weight'], seeds[0], p,
                               self.residual)
        branch, layers = None, []
        for i in range(L):
            block, k = f'transformer.h.{i}', {}
            stream, h, saved = self._add_norm(stream, branch, f'{block}.ln_1', seeds[2 * i], p)
            k.update(h1=h, saved1=saved)
            qkv = self._linear(h, f'{block}.attn.c_attn').view(B, T, -1)
            if keep:
                y, backward = self.attention_and_backward(qkv, self.config.n_head, p) # (B, T, C)
                k.update(y=y, attention_backward=backward)
            else:
                y = self.attention(qkv, self.config.n_head, p)
            branch = self._linear(y.view(B * T, -1), f'{block}.attn.c_proj')
            stream, h, saved = self._add_norm(stream, branch, f'{block}.ln_2', seeds[2 * i + 1], p)
            w, b = self.half_w[f'{block}.mlp.c_fc.weight'], self.half_w.get(f'{block}.mlp.c_fc.bias')
            before, act = kernels.linear_gelu(h, w, b, tanh) # (B T, 4C) each
            k.update(h2=h, saved2=saved, before=before, act=act if L * act.nbytes <= self.kept_bytes else None)
            branch = self._linear(act, f'{block}.mlp.c_proj')
            layers += [k] if keep else []
        stream, h, saved = self._add_norm(stream, branch, 'transformer.ln_f', seeds[2 * L], p)
        return h, (seeds, layers, saved)

    def _head(self, h, targets, share=None, add=False):
        """
        The mean loss, into self.loss; with `share` also h's gradient, returned, and the head's weight's: HEAD_ROWS rows
        at a time, their logits changed in place to the gradient of the logits.
        """
        targets = targets.reshape(-1)
        losses = torch.empty(len(h), dtype=self.loss.dtype, device=h.device)
        counted = (targets != -1).sum()
        dh = None if share is None else torch.empty_like(h)
        for i in range(0, len(h), HEAD_ROWS):
            rows = slice(i, i + HEAD_ROWS)
            logits = h[rows] @ self.head.t() # (rows, V)
            kernels.cross_entropy_(logits, targets[rows], losses[rows], share or 0.0, counted, self.config.vocab_size,
                                   share is not None)
            if share is not None:
                torch.mm(logits, self.head, out=dh[rows])
                self._weight_grad(self.dhead, logits, h[rows], add or i > 0)
        torch.div(losses.sum(), counted, out=self.loss)
        return dh

    def _evaluate(self, x, y):
        self._head(self._forward(x, 0.0, keep=False)[0], y)
        yield None

    # ---- backward -------------------------------------------------------------------------------------------------

    def _weight_grad(self, grad, dy, x, add):
        """grad (out, in), float32: dy (M, out)^T x (M, in), added to what is there with `add`."""
        wider = {} if grad.dtype == x.dtype else dict(out_dtype=grad.dtype)
        if add:
            torch.addmm(grad, dy.t(), x, out=grad, **wider)
        else:
            torch.mm(dy.t(), x, out=grad, **wider)

    def _weight_grads(self, name, dy, x, add, later=None):
        """Gradients of a _linear's weight (left to `later`, a list, if there) and bias: dy (M, out), x (M, in)."""
        if later is None:
            self._weight_grad(self.g[f'{name}.weight'], dy, x, add)
        else:
            later.append((f'{name}.weight', dy, x))
        if f'{name}.bias' in self.g:
            kernels.sum_into(self.g[f'{name}.bias'], dy, 0, add)

    def _norm_backward(self, n, norm, dh, saved, dx, seed, p):
        parts = [part[n] for part in self.norm_parts] + [None]
        return kernels.norm_backward(dh, *saved, self.w[f'{norm}.weight'], dx, seed, p, *parts[:2], self.residual)

    def _forward_backward(self, x, y, share, add, several):
        """
        With `several` it yields the parts of self.grads that are to be summed over the processes as they are finished,
        the last layers' first, (all processes', this process's) tensors that are to be gathered, and None where it
        needs what was started, and at the end.
        """
        p, L, tanh = self.config.dropout, self.config.n_layer, self.config.gelu == 'tanh'
        h, (seeds, layers, saved) = self._forward(x, p, keep=True)
        dh = self._head(h, y, share, add)
        wte, layer_0 = (self.first[f'transformer.{name}.weight'] for name in ('wte', 'h.0.attn.c_attn'))
        by_rows = several and self.world_size * x.numel() <= self.head_rows # fewer bytes than the whole embedding
        if by_rows:
            yield self.grads[wte:layer_0]
        late, later = (2, []) if by_rows else (0, None) # the first layers' weights have time while tokens' rows travel
        # dx: the gradient of the residual stream, d: of the branch that was added to it
        dx, d = self._norm_backward(2 * L, 'transformer.ln_f', dh, saved, None, seeds[2 * L], p)
        del h, dh, saved
        end = len(self.grads)
        for i in reversed(range(L)):
            block, k = f'transformer.h.{i}', layers.pop()
            weight_grads = functools.partial(self._weight_grads, add=add, later=later if i < late else None)
            dbefore, act = kernels.linear_gelu_backward(d, self.half_w[f'{block}.mlp.c_proj.weight'], k['before'], tanh,
                                                        again=k['act'] is None) # (B T, 4C)
            weight_grads(f'{block}.mlp.c_proj', d, k['act'] if act is None else act)
            weight_grads(f'{block}.mlp.c_fc', dbefore, k['h2'])
            dh = dbefore @ self.half_w[f'{block}.mlp.c_fc.weight']
            del act, dbefore
            dx, d = self._norm_backward(2 * i + 1, f'{block}.ln_2', dh, k['saved2'], dx, seeds[2 * i + 1], p)
            weight_grads(f'{block}.attn.c_proj', d, k['y'].view(len(d), -1))
            dy = d @ self.half_w[f'{block}.attn.c_proj.weight']
            dqkv = k['attention_backward'](dy.view(k['y'].shape)).view(len(d), -1)
            weight_grads(f'{block}.attn.c_attn', dqkv, k['h1'])
            dh = dqkv @ self.half_w[f'{block}.attn.c_attn.weight']
            dx, d = self._norm_backward(2 * i, f'{block}.ln_1', dh, k['saved1'], dx, seeds[2 * i], p)
            if several and i >= late and i in (3 * L // 4, L // 2, L // 4, late, 1, 0): # the last ones are small
                start = self.first[f'{block}.attn.c_attn.weight']
                yield self.grads[start:end]
                end = start
        for grad, parts in zip(self.norm_grads, self.norm_parts):
            kernels.sum_into(grad, parts, 1, add)
        self.grads[0] += 0 * self.loss # a loss that is not finite makes a gradient so, on every process
        embed_backward = functools.partial(kernels.embed_backward, dx, seed=seeds[0], p=p, add=add,
                                           dwpe=self.g['transformer.wpe.weight'])
        if not by_rows:
            embed_backward(ids=x, dwte=self.dhead)
            yield self.grads[:end] if several else None
            return
        mine, rows, ids, small = self._rows(x.numel(), wte)
        rows.zero_()
        embed_backward(ids=kernels.number_tokens(x, ids, self.head_rows), dwte=rows)
        small.copy_(self.grads[:wte])
        every = mine.new_empty(self.world_size, len(mine))
        yield every, mine
        for name, dy, x in later:
            self._weight_grad(self.g[name], dy, x, add)
            if name == 'transformer.h.0.mlp.c_fc.weight':
                yield None
                for r, theirs in enumerate(every): # in this order everywhere: the same bits
                    rows, ids, small = self._split(theirs, len(ids))
                    kernels.add_rows(self.dhead, ids, rows)
                    self.grads[:wte].copy_(small) if r == 0 else self.grads[:wte].add_(small)
            if name.endswith(('h.1.attn.c_attn.weight', 'h.0.mlp.c_fc.weight', 'h.0.attn.c_attn.weight')):
                yield self.grads[self.first[name]:end]
                end = self.first[name]

    def _rows(self, n, small):
        """What is gathered of n tokens: all of it, and its _split(). It keeps its place from step to step."""
        if n not in self.rows:
            self.rows[n] = self.exchange.empty(n * (self.config.n_embd + 1) + small, self.grads.dtype, self.device)
        return self.rows[n], *self._split(self.rows[n], n)

    def _split(self, flat, n):
        """Gradients of a batch's different tokens (n, C), these (n) or -1, the gradients before the embedding's."""
        rows, ids, small = flat.split([n * self.config.n_embd, n, len(flat) - n * (self.config.n_embd + 1)])
        return rows.view(n, -1), ids.view(torch.int32 if flat.itemsize == 4 else torch.int64), small

    # ---- AdamW ----------------------------------------------------------------------------------------------------

    def _update(self):
        group = self.optimizer.param_groups[0]
        (beta1, beta2), eps = group['betas'], group['eps']
        hyper = torch.empty(6, dtype=self.params.dtype, device=self.device)
        kernels.plan_(hyper, self.bad, self.steps, kernels.squares(self.grads), self.lr, group['weight_decay'],
                      self.grad_clip, beta1, beta2)
        kernels.adamw_(self.params, self.copies, self.grads, self.exp_avg, self.exp_avg_sq, hyper, beta1, beta2, eps,
                       self.undecayed)
        yield None
