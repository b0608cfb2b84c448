"""
GPT-2 and nanoGPT's first training steps from the papers: the definition that model.py and train.py are held to.

Written from the maths (arXiv:1706.03762, the GPT-2 report, arXiv:1607.06450), slow and plain. It shares with
nanoGPT what makes a run comparable: the names, and the order in which random numbers are drawn.
"""
import math

import numpy as np
import torch
from torch import nn


class Norm(nn.Module):
    def __init__(self, C, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C)) if bias else None

    def forward(self, x):
        off = x - x.mean(-1, keepdim=True)
        y = off / (off.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight
        return y if self.bias is None else y + self.bias


class PlainBlock(nn.Module):
    def __init__(self, C, n_head, bias):
        super().__init__()
        self.ln_1, self.n_head = Norm(C, bias), n_head
        self.attn = nn.ModuleDict({'c_attn': nn.Linear(C, 3 * C, bias), 'c_proj': nn.Linear(C, C, bias)})
        self.ln_2 = Norm(C, bias)
        self.mlp = nn.ModuleDict({'c_fc': nn.Linear(C, 4 * C, bias), 'c_proj': nn.Linear(4 * C, C, bias)})

    def forward(self, x):
        heads, T = [], x.size(1)
        qkv = self.attn['c_attn'](self.ln_1(x)).chunk(3, dim=-1)
        for q, k, v in zip(*(t.chunk(self.n_head, dim=-1) for t in qkv)): # one head: (B, T, hs)
            scores = torch.einsum('bid,bjd->bij', q, k) / math.sqrt(q.size(-1))
            future = torch.arange(T)[None, :] > torch.arange(T)[:, None]
            heads.append(torch.softmax(scores.masked_fill(future, -math.inf), dim=-1) @ v)
        x = x + self.attn['c_proj'](torch.cat(heads, dim=-1))
        h = self.mlp['c_fc'](self.ln_2(x))
        return x + self.mlp['c_proj'](h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))) # the exact GELU


class PlainGPT(nn.Module):
    def __init__(self, block_size, vocab_size, n_layer, n_head, n_embd, bias, dropout=0.0):
        super().__init__()
        assert dropout == 0.0, "the plain model has none"
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(vocab_size, n_embd), 'wpe': nn.Embedding(block_size, n_embd),
            'h': nn.ModuleList([PlainBlock(n_embd, n_head, bias) for _ in range(n_layer)]), 'ln_f': Norm(n_embd, bias)})
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer['wte'].weight = self.lm_head.weight
        for module in self.modules(): # wte and the head hold one tensor, drawn twice as in nanoGPT
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if getattr(module, 'bias', None) is not None:
                    nn.init.zeros_(module.bias)
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * n_layer))

    def forward(self, ids, targets=None):
        x = self.transformer['wte'].weight[ids] + self.transformer['wpe'].weight[:ids.size(1)]
        for block in self.transformer['h']:
            x = block(x)
        logits = self.transformer['ln_f'](x) @ self.lm_head.weight.T # (B, T, V)
        if targets is None:
            return logits
        log_p = logits - logits.logsumexp(-1, keepdim=True)
        picked = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return logits, -picked[targets >= 0].mean()


def nanogpt_optimizer(model, weight_decay, lr, betas):
    """nanoGPT's AdamW: matrices decay, vectors do not; parameters in the order of their names in the model."""
    parameters = list(model.parameters())
    groups = [{'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


def nanogpt_lr(it, learning_rate, warmup_iters, lr_decay_iters, min_lr):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    along = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + (1 + math.cos(math.pi * along)) / 2 * (learning_rate - min_lr)


def nanogpt_losses(folder, shape, steps, batch_size, accumulation, eval_interval, eval_iters, schedule, weight_decay,
                   betas, grad_clip, seed=1337):
    """
    The losses that nanoGPT's train.py prints on one CPU process without dropout, at full precision:
    ([(step, train, val)], [(step, loss)]). Every random number is drawn where nanoGPT draws it.
    """
    torch.manual_seed(seed)
    data = {split: np.fromfile(f'{folder}/{split}.bin', np.uint16).astype(np.int64) for split in ('train', 'val')}

    def get_batch(split):
        T = shape['block_size']
        starts = torch.randint(len(data[split]) - T, (batch_size,))
        return (torch.stack([torch.from_numpy(data[split][i + j:i + j + T]) for i in starts]) for j in (0, 1))

    model = PlainGPT(**shape)
    optimizer = nanogpt_optimizer(model, weight_decay, schedule['learning_rate'], betas)
    evaluations, losses = [], []
    x, y = get_batch('train')
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = optimizer.param_groups[1]['lr'] = nanogpt_lr(step, **schedule)
        if step % eval_interval == 0:
            with torch.no_grad():
                means = [torch.stack([model(*get_batch(split))[1] for _ in range(eval_iters)]).mean().item()
                         for split in ('train', 'val')]
            evaluations.append((step, *means))
        for _ in range(accumulation):
            loss = model(x, y)[1]
            x, y = get_batch('train')
            (loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append((step, loss.item()))
    return evaluations, losses
