"""Attention of one query a row over tokens in pages, float64 numpy, one head of one row and one token at a time."""

import numpy as np


def attention(q, k_pages, v_pages, page_table, lengths, scale=None):
    """Output [B,H,D] for pages [Hkv,P,page,D]; a row of length 0 gives zeros. Only what a row owns is looked at."""
    (rows, heads, dim), (kv_heads, _, page, _) = q.shape, k_pages.shape
    q, k_pages, v_pages = (np.asarray(x, np.float64) for x in (q, k_pages, v_pages))
    page_table, lengths = np.asarray(page_table), np.asarray(lengths)
    scale = dim**-0.5 if scale is None else scale
    out = np.zeros(q.shape)
    for b in range(rows):
        places = [(page_table[b, t // page], t % page) for t in range(max(lengths[b], 0))]
        for h in range(heads):
            head = h * kv_heads // heads
            keys = np.array([k_pages[head, p, s] for p, s in places]).reshape(-1, dim)
            values = np.array([v_pages[head, p, s] for p, s in places]).reshape(-1, dim)
            if places:
                logits = scale * (keys @ q[b, h])
                weights = np.exp(logits - logits.max())
                out[b, h] = weights @ values / weights.sum()
    return out
