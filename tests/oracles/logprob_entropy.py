"""Log-probability, entropy and log-sum-exp of rows, and their gradients by each row's Jacobian, float64 numpy."""

import numpy as np


def logprob_entropy(
    hidden: np.ndarray, head: np.ndarray, targets: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log p[target] (-inf where that is no column), -sum p log p and log sum exp of hidden head / temperature."""
    logp, entropy, lse = (np.empty(len(hidden)) for _ in range(3))
    for n, (logits, target) in enumerate(zip(hidden @ head / temperature, targets)):
        probabilities, lse[n] = _softmax(logits)
        logp[n] = logits[target] - lse[n] if 0 <= target < len(logits) else -np.inf
        entropy[n] = -np.sum(probabilities * (logits - lse[n]))
    return logp, entropy, lse


def gradients(
    hidden: np.ndarray,
    head: np.ndarray,
    targets: np.ndarray,
    temperature: float,
    d_logp: np.ndarray,
    d_entropy: np.ndarray,
    d_lse: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Gradients of the sum of the results times their cotangents in hidden, head and temperature."""
    products = hidden @ head
    d_logits = np.empty_like(products)
    for n, (row, target) in enumerate(zip(products / temperature, targets)):
        probabilities, lse = _softmax(row)
        jacobian = np.zeros((3, len(row)))
        if 0 <= target < len(row):
            jacobian[0] = -probabilities
            jacobian[0, target] += 1
        # dp_i / dx_j = p_i (1[i = j] - p_j), and the sum of -dp_i vanishes beside that of -dp_i log p_i.
        jacobian[1] = -(np.diag(probabilities) - np.outer(probabilities, probabilities)) @ (row - lse)
        jacobian[2] = probabilities
        d_logits[n] = np.array([d_logp[n], d_entropy[n], d_lse[n]]) @ jacobian
    d_products = d_logits / temperature
    return d_products @ head.T, hidden.T @ d_products, -np.sum(d_logits * products) / temperature**2


def _softmax(logits: np.ndarray) -> tuple[np.ndarray, float]:
    lse = logits.max() + np.log(np.sum(np.exp(logits - logits.max())))
    return np.exp(logits - lse), lse
