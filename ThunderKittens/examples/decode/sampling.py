"""
How the next token is drawn: by seeds that depend on nothing but the sample and the place in its text. The plain
definition of what the kernels `draw` and `append` do.
"""
import torch
from torch.nn import functional as F

from ThunderKittens.examples import decode


def row_seeds(seed, rows, device):
    """(B) int64, a seed for each sample; `seed` None draws one from torch's generator."""
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    return scramble(torch.arange(rows, device=device) + scramble(torch.tensor(seed, device=device)))


def scramble(x):
    """int64 -> int64 whose every bit depends on every bit: splitmix64's finaliser, https://prng.di.unimi.it"""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor # >> keeps the sign: mask what it brings in
    return x


def pick(logits, seeds, place, temperature=1.0, top_k=None, top_p=None, n_tokens=None):
    """
    One token id a row, drawn by the row's seed, the place in the text and nothing else, whatever the batch.

    logits       (B, V)
    seeds        (B) int64
    place        (B) int64 or int
    temperature  0 takes the likeliest token
    top_k        draw only among so many likeliest tokens
    top_p        draw only among the likeliest tokens that together have this probability
    n_tokens     ids from here on belong to no token (a padded vocabulary) and are never drawn
    returns      (B) int64
    """
    logits = logits[:, :n_tokens].float()
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_p is None and not decode.why_unavailable(logits.device.type):
        return decode.draw(logits, seeds + place, temperature, top_k) # the same in few kernels
    logits = logits / temperature
    if top_k is not None:
        kth = torch.topk(logits, min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, -float('inf'))
    if top_p is not None:
        p, order = F.softmax(logits, dim=-1).sort(dim=-1, descending=True)
        beyond = p.cumsum(-1) - p >= top_p # the likeliest is always within
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -float('inf'))
    # the largest of logit + Gumbel noise falls on a token with its probability
    bits = scramble(scramble(seeds + place)[:, None] + torch.arange(logits.size(-1), device=logits.device))
    uniform = ((bits >> 41 & 0x7FFFFF).float() + 0.5) * 2**-23 # (B, V), above 0 and below 1
    return (logits - torch.log(-torch.log(uniform))).argmax(dim=-1)
