"""Attention in float64 numpy, one row at a time, with hand-derived gradients."""

import numpy as np


def attention(q, k, v, *, causal=True, q_segments=None, kv_segments=None, q_positions=None, window=None, scale=None):
    """Output [B,T,H,D]; a query that sees nothing gives zeros."""
    return _run(q, k, v, None, causal, q_segments, kv_segments, q_positions, window, scale)[0]


def attention_gradients(q, k, v, d_out, *, causal=True, q_segments=None, kv_segments=None, q_positions=None,
                        window=None, scale=None):  # fmt: skip
    """dq, dk, dv of sum(out * d_out)."""
    return _run(q, k, v, d_out, causal, q_segments, kv_segments, q_positions, window, scale)[1:]


def _run(q, k, v, d_out, causal, q_segments, kv_segments, q_positions, window, scale):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, queries, heads, dim = q.shape
    keys, per_head = k.shape[1], heads // k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    kv_segments = q_segments if kv_segments is None else kv_segments
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(batch):
        for t in range(queries):
            place = t if q_positions is None else q_positions[b, t]
            sees = np.array(
                [
                    (not causal or s <= place)
                    and (window is None or s > place - window)
                    and (q_segments is None or (q_segments[b, t] == kv_segments[b, s] != 0))
                    for s in range(keys)
                ]
            )
            if not sees.any():
                continue
            for h in range(heads):
                own_k, own_v = k[b, sees, h // per_head], v[b, sees, h // per_head]
                logits = scale * own_k @ q[b, t, h]
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                out[b, t, h] = weights @ own_v
                if d_out is None:
                    continue
                g = np.asarray(d_out[b, t, h], np.float64)
                d_weights = own_v @ g
                d_logits = scale * weights * (d_weights - weights @ d_weights)
                dq[b, t, h] = d_logits @ own_k
                dk[b, sees, h // per_head] += np.outer(d_logits, q[b, t, h])
                dv[b, sees, h // per_head] += np.outer(weights, g)
    return out, dq, dk, dv
