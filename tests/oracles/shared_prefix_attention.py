"""Attention of samples over their shared prompt and their own continuation, float64 numpy, one query at a time."""

import numpy as np


def attention(q, prefix_k, prefix_v, prefix_lengths, suffix_k, suffix_v, suffix_lengths, scale=None):
    """Output [B,N,H,D]; a query that sees nothing gives zeros."""
    q, prefix_k, prefix_v, suffix_k, suffix_v = (
        np.asarray(x, np.float64) for x in (q, prefix_k, prefix_v, suffix_k, suffix_v)
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    per_head = q.shape[2] // prefix_k.shape[2]
    out = np.zeros_like(q)
    for b, n, h in np.ndindex(q.shape[:3]):
        p, s, head = prefix_lengths[b], max(suffix_lengths[b, n], 0), h // per_head
        keys = np.concatenate([prefix_k[b, :p, head], suffix_k[b, n, :s, head]])
        values = np.concatenate([prefix_v[b, :p, head], suffix_v[b, n, :s, head]])
        if len(keys):
            weights = np.exp(scale * (keys @ q[b, n, h]) - np.max(scale * (keys @ q[b, n, h])))
            out[b, n, h] = weights / weights.sum() @ values
    return out
