"""Attention with a pair bias in float64 numpy, one query at a time, with hand-derived gradients."""

import numpy as np


def evo_attention(q, k, v, mask=None, bias=None, *, scale=None):
    """Output `[B,S,N,H,D]` and log-sum-exp `[B,S,H,N]`; a row without valid keys gives zeros and -inf."""
    out, lse, *_ = _run(q, k, v, mask, bias, None, None, scale)
    return out, lse


def gradients(q, k, v, mask, bias, d_out, *, scale=None, d_lse=None):
    """dq, dk, dv, d_mask `[B,S,1,1,N]` and d_bias `[B,1,H,N,N]` of sum(out * d_out) + sum(lse * d_lse)."""
    return _run(q, k, v, mask, bias, d_out, d_lse, scale)[2:]


def _run(q, k, v, mask, bias, d_out, d_lse, scale):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, rows, length, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    bias = np.zeros((batch, 1, heads, length, length)) if bias is None else np.asarray(bias, np.float64)
    mask = np.ones(1, bool) if mask is None else np.asarray(mask)
    valid = np.broadcast_to(mask if mask.dtype == bool else True, (batch, rows, 1, 1, length))
    added = np.broadcast_to(0.0 if mask.dtype == bool else mask.astype(np.float64), (batch, rows, 1, 1, length))
    out, lse = np.zeros_like(q), np.full((batch, rows, heads, length), -np.inf)
    dq, dk, dv, d_mask, d_bias = (np.zeros(x.shape) for x in (q, k, v, added, bias))
    for b, s, h, i in np.ndindex(batch, rows, heads, length):
        sees = np.flatnonzero(valid[b, s, 0, 0])
        if not sees.size:
            continue
        logits = scale * k[b, s, sees, h] @ q[b, s, i, h] + bias[b, 0, h, i, sees] + added[b, s, 0, 0, sees]
        peak = logits.max()
        weights = np.exp(logits - peak)
        lse[b, s, h, i] = peak + np.log(weights.sum())
        weights /= weights.sum()
        out[b, s, i, h] = weights @ v[b, s, sees, h]
        if d_out is None:
            continue
        g = np.asarray(d_out[b, s, i, h], np.float64)
        d_weights = v[b, s, sees, h] @ g
        d_logits = weights * (d_weights - weights @ d_weights)
        if d_lse is not None:
            d_logits += weights * np.float64(d_lse[b, s, h, i])
        dq[b, s, i, h] = scale * d_logits @ k[b, s, sees, h]
        dk[b, s, sees, h] += scale * np.outer(d_logits, q[b, s, i, h])
        dv[b, s, sees, h] += np.outer(weights, g)
        d_mask[b, s, 0, 0, sees] += d_logits
        d_bias[b, 0, h, i, sees] += d_logits
    return out, lse, dq, dk, dv, d_mask, d_bias
