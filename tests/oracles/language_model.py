"""Cross-entropy of a language model and its gradients, NumPy float64, token after token."""

import numpy as np


def cross_entropy(hidden, head, targets, weights):
    """Weighted sums of loss and of correct predictions, and the loss's gradients by hidden [B,T,D] and head [D,V]."""
    hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
    total, hits = 0.0, 0.0
    d_hidden, d_head = np.zeros_like(hidden), np.zeros_like(head)
    for index in np.ndindex(*np.shape(targets)):
        logits = hidden[index] @ head
        chance = np.exp(logits - logits.max())
        chance /= chance.sum()
        target = targets[index]
        total -= weights[index] * np.log(chance[target])
        hits += weights[index] * (logits.argmax() == target)
        error = weights[index] * (chance - np.eye(head.shape[1])[target])
        d_hidden[index] = head @ error
        d_head += np.outer(hidden[index], error)
    return total, hits, d_hidden, d_head
