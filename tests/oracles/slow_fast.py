"""Slow-fast steps in float64: SGD on a quadratic in closed form, and AdamW on least squares as a plain loop."""

import numpy as np

from tests.oracles import adam


def quadratic_error(hessian, error, lr, inner_steps, alpha):
    """Error after one step from `error` (the spec, section 2.4), one update a pass."""
    contraction = np.eye(len(hessian)) - lr * hessian
    fast = np.linalg.matrix_power(contraction, inner_steps)
    return contraction @ ((1 - alpha) * np.eye(len(hessian)) + alpha * fast) @ error


def least_squares(w, x, y):
    """Loss 0.5 mean (x w - y)^2 and its gradient."""
    residual = x @ w - y
    return 0.5 * np.mean(residual**2), x.T @ residual / len(y)


def adamw_step(w, moments, x, y, *, mini_batches, inner_steps, alpha, lr, weight_decay, clip_norm, reset=False):
    """One step: w, (m, v, t), the loss averaged over the mini-batches of the last pass."""

    def one_pass(w, moments):
        losses = []
        for rows in np.split(np.arange(len(y)), mini_batches):
            loss, grad = least_squares(w, x[rows], y[rows])
            norm = np.sqrt(np.sum(grad**2))
            grad = grad * min(1.0, clip_norm / norm)
            m, v, t = moments
            w, m, v = adam.step(w, m, v, grad, t=t + 1, lr=lr, weight_decay=weight_decay)
            moments = m, v, t + 1
            losses.append(loss)
        return w, moments, np.mean(losses)

    slow, kept = w, moments
    for _ in range(inner_steps):
        w, moments, _ = one_pass(w, moments)
    if inner_steps:
        w = slow + alpha * (w - slow)
        moments = kept if reset else moments
    return one_pass(w, moments)
