"""AlphaFold3's operations in float64 numpy, one row, pair or window at a time, from the paper's algorithms."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def standard(x, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def layer_norm(x, affine):
    return x if affine is None else standard(x) * affine[0] + affine[1]


def softmax(logits, valid):
    """Over the valid entries of one row; zeros if there are none."""
    out = np.zeros_like(logits)
    if valid.any():
        weights = np.exp(logits[valid] - logits[valid].max())
        out[valid] = weights / weights.sum()
    return out


def attend(q, k, v, bias, valid, heads):
    """One sequence: q, k, v `[N, H*D]`, bias `[N, N, H]` or None, valid keys `[N]`; out `[N, H*D]`."""
    out = np.zeros_like(q)
    width = q.shape[1] // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        for i in range(len(q)):
            logits = k[:, part] @ q[i, part] / np.sqrt(width)
            if bias is not None:
                logits = logits + bias[i, :, h]
            out[i, part] = softmax(logits, valid) @ v[:, part]
    return out


def triangle_attention(z, mask, *, ln_in, w_q, w_k, w_v, w_bias, w_gate, w_out, b_q=None, node="starting"):
    out = np.zeros_like(z)
    for b in range(len(z)):
        x, valid = layer_norm(z[b], ln_in), mask[b]
        for i in range(z.shape[1]):
            # The sequence: row i, or column i. The bias of query j and key k: of pair (j, k), or (k, j).
            row, keys = (x[i], valid[i]) if node == "starting" else (x[:, i], valid[:, i])
            bias = x @ w_bias
            q = row @ w_q + (0 if b_q is None else b_q)
            bias = bias if node == "starting" else bias.transpose(1, 0, 2)
            attended = attend(q, row @ w_k, row @ w_v, bias, keys, w_bias.shape[1])
            update = (sigmoid(row @ w_gate) * attended) @ w_out
            if node == "starting":
                out[b, i] = update
            else:
                out[b, :, i] = update
    return out


def attention_pair_bias(s, z, mask, *, ln_s, ln_z, w_q, w_k, w_v, w_bias, w_gate, w_out, b_q=None):
    """s `[B, T, N, C]`."""
    out = np.zeros_like(s)
    for b, t in np.ndindex(s.shape[:2]):
        x = layer_norm(s[b, t], ln_s)
        q = x @ w_q + (0 if b_q is None else b_q)
        attended = attend(q, x @ w_k, x @ w_v, layer_norm(z[b], ln_z) @ w_bias, mask[b], w_bias.shape[1])
        out[b, t] = (sigmoid(x @ w_gate) * attended) @ w_out
    return out


def outer_product_mean(m, mask, *, ln_in, w_a, w_b, w_out, b_out):
    batch, depth, length, _ = m.shape
    x = layer_norm(m, ln_in)
    a, b_ = x @ w_a, x @ w_b
    out = np.zeros((batch, length, length, w_out.shape[1]))
    for b, i, j in np.ndindex(batch, length, length):
        rows = [r for r in range(depth) if mask[b, r, i] and mask[b, r, j]]
        total = sum((np.outer(a[b, r, i], b_[b, r, j]) for r in rows), np.zeros((w_a.shape[1],) * 2))
        out[b, i, j] = (total / max(len(rows), 1)).reshape(-1) @ w_out + b_out
    return out


def pair_weighted_averaging(m, z, mask, *, ln_m, ln_z, w_bias, w_v, w_gate, w_out):
    x, logits = layer_norm(m, ln_m), layer_norm(z, ln_z) @ w_bias
    v, gate = x @ w_v, sigmoid(x @ w_gate)
    heads = w_bias.shape[1]
    width = w_v.shape[1] // heads
    mean = np.zeros_like(v)
    for b, i, h in np.ndindex(len(m), m.shape[2], heads):
        part = slice(h * width, (h + 1) * width)
        mean[b, :, i, part] = np.einsum("j,sjd->sd", softmax(logits[b, i, :, h], mask[b]), v[b, :, :, part])
    return (gate * mean) @ w_out


def adaptive_layer_norm(x, s, *, scale_s, w_gamma, b_gamma, w_beta):
    s = standard(s) * scale_s
    return sigmoid(s @ w_gamma + b_gamma) * standard(x) + s @ w_beta


def window(length, block, n_q, n_k, edge):
    """The places, inside the array or not, that the queries of a block look at."""
    start = n_q * block + n_q // 2 - n_k // 2
    if edge == "shift":
        padded = -(-length // n_q) * n_q
        start = max(min(start, padded - n_k), 0)
    return range(start, start + n_k)


def local_attention(q, k, v, bias, mask, *, n_q, n_k, edge):
    """Dense: every atom against every atom of `[B, T, N, H, D]`, those outside its window invalid."""
    batch, samples, length, heads, width = q.shape
    out = np.zeros_like(q)
    for i in range(length):
        block, row = divmod(i, n_q)
        places = window(length, block, n_q, n_k, edge)
        for b in range(batch):
            valid = np.array([j in places and mask[b, j] for j in range(length)])
            for t, h in np.ndindex(samples, heads):
                logits = k[b, t, :, h] @ q[b, t, i, h] / np.sqrt(width)
                if bias is not None:
                    for j in range(length):
                        if j in places:
                            logits[j] += bias[b, h, block, row, j - places[0]]
                out[b, t, i, h] = softmax(logits, valid) @ v[b, t, :, h]
    return out


def relative_position(asym_id, residue_index, entity_id, sym_id, token_index, *, r_max=32, s_max=2):
    """Of one structure, `[N, N, 4 r_max + 2 s_max + 7]`."""
    length = len(asym_id)
    out = np.zeros((length, length, 4 * r_max + 2 * s_max + 7))
    wide = 2 * r_max + 2
    for i, j in np.ndindex(length, length):
        chain, entity = asym_id[i] == asym_id[j], entity_id[i] == entity_id[j]
        residue = wide - 1
        if chain:
            residue = min(max(residue_index[i] - residue_index[j] + r_max, 0), 2 * r_max)
        token = wide - 1
        if chain and residue_index[i] == residue_index[j]:
            token = min(max(token_index[i] - token_index[j] + r_max, 0), 2 * r_max)
        copy = 2 * s_max + 1
        if entity:
            copy = min(max(sym_id[i] - sym_id[j] + s_max, 0), 2 * s_max)
        out[i, j, residue] = out[i, j, wide + token] = 1
        out[i, j, 2 * wide] = entity
        out[i, j, 2 * wide + 1 + copy] = 1
    return out


def derivative(function, arguments, direction, step=1e-5):
    """Of `sum(function(arguments))` along a direction of the same structure (a dict of arrays and of pairs of them)."""

    def moved(sign):
        return {
            name: tuple(x + sign * step * d for x, d in zip(value, direction[name]))
            if isinstance(value, tuple)
            else value + sign * step * direction[name]
            for name, value in arguments.items()
        }

    return (function(moved(1)).sum() - function(moved(-1)).sum()) / (2 * step)
