"""Causal attention as it is defined. Tests and benchmarks hold every kernel to this, in float64."""
import math

import torch


def plain_attention(q, k, v):
    """softmax(q k^T / sqrt(D)) v over (B, H, N, D); each row sees itself and earlier rows. Returns it and lse (B, H, N)."""
    N, D = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(D) # (B, H, N, N)
    future = torch.ones(N, N, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(future, float('-inf'))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)
