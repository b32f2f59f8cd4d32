"""Attention within runs of rows, float64 numpy, one segment and head at a time, with hand-derived gradients."""

import itertools

import numpy as np


def attention(q, k, v, offsets, scale=None):
    """Output [T,H,D]; rows outside every segment give zeros."""
    return _run(q, k, v, np.zeros(q.shape), offsets, scale)[0]


def gradients(q, k, v, offsets, d_out, scale=None):
    """dq, dk, dv of sum(out * d_out)."""
    return _run(q, k, v, d_out, offsets, scale)[1:]


def _run(q, k, v, d_out, offsets, scale):
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for start, stop in itertools.pairwise(offsets):
        for h in range(q.shape[1] if stop > start else 0):
            own, head = (slice(start, stop), h), (slice(start, stop), h * k.shape[1] // q.shape[1])
            weights = np.exp(scale * q[own] @ k[head].T)
            weights /= weights.sum(axis=1, keepdims=True)
            out[own] = weights @ v[head]
            d_weights = d_out[own] @ v[head].T
            d_logits = scale * weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True))
            dq[own] = d_logits @ k[head]
            dk[head] += d_logits.T @ q[own]
            dv[head] += weights.T @ d_out[own]
    return out, dq, dk, dv
