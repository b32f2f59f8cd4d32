"""PuzzleMoE and its baselines in numpy float64, position by position, token by token, subset by subset."""

import itertools

import ml_dtypes
import numpy as np


def merge(w_i, w_j, n_i=None, n_j=None, tau=0.4):
    """(mag, mask_i, mask_j, sign_i, sign_j); the input axis is the first one of the norms' shape `[K, 1]`."""
    w_i, w_j = np.asarray(w_i, np.float64), np.asarray(w_j, np.float64)
    a, b = np.abs(w_i), np.abs(w_j)
    similar = a - b <= float(np.float32(tau)) * (a + b)
    similar &= b - a <= float(np.float32(tau)) * (a + b)
    first = a * (1 if n_i is None else n_i) >= b * (1 if n_j is None else n_j)
    mag = np.where(similar, (a + b) / 2, np.where(first, a, b)).astype(ml_dtypes.bfloat16)
    return mag, first | similar, ~first | similar, w_i < 0, w_j < 0


def word(magnitude, mask_i, mask_j, sign_i, sign_j, underflow="clamp"):
    """One position as an integer; `magnitude` is a Python float that bfloat16 holds."""
    bits = int(np.asarray(magnitude, ml_dtypes.bfloat16).view(np.uint16))
    exponent, mantissa = bits >> 7, bits & 0x7F
    if bits == 0 or (underflow == "nearest" and magnitude < 2.0**-16):
        mask_i = mask_j = False
    elif underflow == "nearest" and magnitude < 2.0**-15:
        mantissa = 0
    low = (max(exponent, 112) - 112) * 128 + mantissa
    return 32768 * int(sign_i) + 16384 * int(sign_j) + 8192 * int(mask_i) + 4096 * int(mask_j) + low


def weight(packed, pos):
    """The weight of member `pos` in a word."""
    text = f"{int(packed):016b}"
    if text[2 + pos] == "0":
        return 0.0
    magnitude = 2.0 ** (int(text[4:9], 2) + 112 - 127) * (1 + int(text[9:], 2) / 128)
    return -magnitude if text[pos] == "1" else magnitude


def silu(x):
    return x / (1 + np.exp(-x))


def layer(router, gate, up, down, top_k, renormalise, x, dropped=()):
    """Output `[T,d]` of a layer for tokens x `[T,d]`, the ids of the experts, and the shares `[T,N]`."""
    router, gate, up, down, x = (np.asarray(part, np.float64) for part in (router, gate, up, down, x))
    out, ids, shares = np.zeros_like(x), np.zeros((len(x), top_k), int), np.zeros((len(x), router.shape[1]))
    for t, token in enumerate(x):
        logits = token @ router
        logits[list(dropped)] = -np.inf
        probability = np.exp(logits - logits.max())
        probability /= probability.sum()
        ids[t] = np.argsort(-probability, kind="stable")[:top_k]
        total = probability[ids[t]].sum() if renormalise else 1.0
        for e in ids[t]:
            shares[t, e] = probability[e] / total
            out[t] += shares[t, e] * (silu(token @ gate[e]) * (token @ up[e]) @ down[e])
    return out, ids, shares


def expert_sums(x, gate, up, ids):
    """sum_sq_in `[N,d]`, sum_sq_mid `[N,f]`, tokens `[N]`."""
    x, gate, up = (np.asarray(part, np.float64) for part in (x, gate, up))
    n, d, f = gate.shape
    inside, middle, tokens = np.zeros((n, d)), np.zeros((n, f)), np.zeros(n, int)
    for token, experts in zip(x, ids):
        for e in experts:
            inside[e] += token**2
            middle[e] += (silu(token @ gate[e]) * (token @ up[e])) ** 2
            tokens[e] += 1
    return inside, middle, tokens


def naee(router, gate, up, down, top_k, renormalise, x, num_drop):
    """Loss of every subset, by running the layer without it."""
    losses = {}
    for subset in itertools.combinations(range(router.shape[1]), num_drop):
        losses[subset] = 0.0
        for batch in x:
            full, without = (
                layer(router, gate, up, down, top_k, renormalise, batch, dropped)[0] for dropped in ((), subset)
            )
            losses[subset] += np.sqrt(np.sum((full - without) ** 2))
    return losses


def ward_groups(features, num_groups):
    """Partition by the unsquared ward distance, from its definition alone."""
    groups = [[index] for index in range(len(features))]
    while len(groups) > num_groups:
        far = {
            (a, b): len(groups[a]) * len(groups[b]) / (len(groups[a]) + len(groups[b]))
            * np.linalg.norm(features[groups[a]].mean(0) - features[groups[b]].mean(0))
            for a, b in itertools.combinations(range(len(groups)), 2)
        }  # fmt: skip
        a, b = min(far, key=far.get)
        groups[a] = groups[a] + groups[b]
        del groups[b]
    return {frozenset(group) for group in groups}


def wanda(weight, norm, sparsity=0.5, pattern=None):
    """True = keep, output by output."""
    weight, norm = np.asarray(weight, np.float64), np.asarray(norm, np.float64)
    keep = np.ones(weight.shape, bool)
    for column in range(weight.shape[1]):
        score = list(np.abs(weight[:, column]) * norm)
        if pattern is None:
            for row in sorted(range(len(score)), key=score.__getitem__)[: int(len(score) * sparsity)]:
                keep[row, column] = False
        else:
            kept, of = pattern
            for start in range(0, len(score), of):
                for row in sorted(range(start, start + of), key=score.__getitem__)[: of - kept]:
                    keep[row, column] = False
    return keep
