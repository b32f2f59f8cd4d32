"""Attention and its mean probabilities in float64 numpy, one query and head at a time, with hand-derived gradients."""

import numpy as np


def attention(q, k, v, scale=None):
    """Output [B,T,H,D], and the mean over heads of the probabilities [B,T,S]."""
    return _run(q, k, v, None, None, scale)[:2]


def gradients(q, k, v, d_out, d_map, scale=None):
    """dq, dk, dv of sum(out * d_out) + sum(map * d_map)."""
    return _run(q, k, v, d_out, d_map, scale)[2:]


def _run(q, k, v, d_out, d_map, scale):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, queries, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    out, probabilities = np.zeros_like(q), np.zeros((batch, queries, k.shape[1]))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, t, h in np.ndindex(batch, queries, heads):
        weights = np.exp(scale * (k[b, :, h] @ q[b, t, h] - np.max(k[b, :, h] @ q[b, t, h])))
        weights /= weights.sum()
        out[b, t, h] = weights @ v[b, :, h]
        probabilities[b, t] += weights / heads
        if d_out is None:
            continue
        d_own = np.asarray(d_out[b, t, h], np.float64)
        d_weights = v[b, :, h] @ d_own + np.asarray(d_map[b, t], np.float64) / heads
        d_logits = scale * weights * (d_weights - weights @ d_weights)
        dq[b, t, h] = d_logits @ k[b, :, h]
        dk[b, :, h] += np.outer(d_logits, q[b, t, h])
        dv[b, :, h] += np.outer(weights, d_own)
    return out, probabilities, dq, dk, dv
