"""Causal attention as it is defined. Tests and benchmarks hold every kernel to this, in float64."""
import math

import torch


def plain_attention(q, k, v):
    """softmax(q k^T / sqrt(D)) v and its lse, (B, H, N, D) and (B, H, N); each row sees itself and earlier rows."""
    N, D = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(D) # (B, H, N, N)
    future = torch.ones(N, N, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(future, float('-inf'))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)
