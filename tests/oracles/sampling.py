"""The truncated distribution of a row of logits, in float64, by sorting."""

import numpy as np


def truncated(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities that `sample` draws from: top_k, then top_p of what it left, then min_p; equals by lower id."""
    logits = np.asarray(logits, np.float64)
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    scaled = logits / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    kept = order[: top_k or len(order)]
    if top_p < 1:
        mass = probabilities[kept] / probabilities[kept].sum()
        before = np.cumsum(mass) - mass
        kept = kept[before < top_p]
    kept = kept[probabilities[kept] >= min_p * probabilities.max()]
    result = np.zeros_like(probabilities)
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


def log_softmax(logits, temperature=1.0):
    """Log-probabilities of the untruncated distribution; temperature 0 counts as 1."""
    scaled = np.asarray(logits, np.float64) / (temperature or 1.0)
    return (
        scaled
        - scaled.max(-1, keepdims=True)
        - np.log(np.exp(scaled - scaled.max(-1, keepdims=True)).sum(-1, keepdims=True))
    )
