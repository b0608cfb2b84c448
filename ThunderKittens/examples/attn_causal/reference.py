"""Causal attention as it is defined. Tests and benchmarks hold every kernel to this, in float64."""
import math

import torch


def plain_attention(q, k, v, weight_of_kept=None):
    """softmax(q k^T / sqrt(D)) v and its lse, (B, H, N, D) and (B, H, N); each row sees itself and earlier rows.
    `weight_of_kept` (B, H, N, N) multiplies the softmax: dropout, 0 where dropped."""
    N, D = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(D) # (B, H, N, N)
    future = torch.ones(N, N, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(future, float('-inf'))
    weights = scores.softmax(-1)
    return (weights if weight_of_kept is None else weights * weight_of_kept) @ v, scores.logsumexp(-1)


def philox2x32_7(x0, x1, key):
    """Seven rounds of Philox2x32 (Salmon et al., SC11) of counters in int64 tensors under one 32-bit key: two words."""
    for _ in range(7):
        low, high = (x0 & 0xffff) * 0xD256D193, (x0 >> 16) * 0xD256D193 # x0 * 0xD256D193 has more than 63 bits
        high += low >> 16
        x0, x1 = (high >> 16) ^ key ^ x1, (high & 0xffff) << 16 | low & 0xffff
        key = key + 0x9E3779B9 & 0xffffffff
    return x0, x1


def dropout_mask(seed, B, H, N, p, device='cpu'):
    """What dropout.cuh defines: (which scores are kept, (B, H, N, N) bool; what a kept one is multiplied by)."""
    threshold = min(round(65536 * p), 65535)
    row, col = torch.arange(N, device=device).view(N, 1), torch.arange(N, device=device).view(1, N)
    kept = []
    for head in range(B * H):
        x = seed + (head + 1) * 0x9E3779B97F4A7C15 & 2 ** 64 - 1
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 2 ** 64 - 1
        x = (x ^ x >> 27) * 0x94D049BB133111EB & 2 ** 64 - 1
        x ^= x >> 31
        group_row = row // 16 * 8 + row % 8 + (x >> 32) & 0xffffffff
        words = philox2x32_7(*torch.broadcast_tensors(group_row, col // 16 * 8 + col % 8), x & 0xffffffff)
        word = torch.where(row // 8 % 2 == 1, words[1], words[0])
        kept.append(torch.where(col // 8 % 2 == 1, word >> 16, word & 0xffff) >= threshold)
    return torch.stack(kept).view(B, H, N, N), 65536 / (65536 - threshold)
