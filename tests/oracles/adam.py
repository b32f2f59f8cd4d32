"""Adam and AdamW in numpy: in float64, and in float32 with every operation rounded; norms, clips, a loss scaler."""

import numpy as np

F = np.float32


def step(p, m, v, g, *, t, lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, scale=1.0, mode="adamw", bias=True):
    """Step number t (the first is 1) in float64, from the textbook: corrected moments, decay of the old parameter."""
    p, m, v, g = (np.asarray(x, np.float64) for x in (p, m, v, g))
    g = g * scale
    if mode == "adam":
        g = g + weight_decay * p
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    m_hat, v_hat = (m / (1 - b1**t), v / (1 - b2**t)) if bias else (m, v)
    decay = lr * weight_decay * p if mode == "adamw" else 0.0
    return p - decay - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


def strict(p, m, v, g, c, *, mode="adamw"):
    """The step in float32, nothing fused; `c` is factor, b1, 1-b1, b2, 1-b2, eps, decay, step size, root."""
    factor, b1, rest1, b2, rest2, eps, decay, size, root = (F(x) for x in c)
    p, m, v, g = (np.asarray(x, F) for x in (p, m, v, g))
    with np.errstate(all="ignore"):
        g = g * factor
        if mode == "adam":
            g = g + decay * p
        m = b1 * m + rest1 * g
        v = b2 * v + rest2 * (g * g)
        kept = p - decay * p if mode == "adamw" else p
        return kept - size * (m / (np.sqrt(v) * root + eps)), m, v


def clipped(grads, *, scale=1.0, clip_norm=None, eps=1e-6):
    """Global norm of the scaled gradients and the clipping coefficient, float64."""
    norm = np.sqrt(sum(np.sum((np.asarray(g, np.float64) * scale) ** 2) for g in grads))
    return norm, 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + eps))


def loss_scales(overflows, *, scale, window, hysteresis, consecutive, minimum):
    """The scale after each step: halved when patience is out, doubled after `window` good steps since the last bad."""
    patience, last_bad, scales = hysteresis, -1, []
    for iteration, bad in enumerate(overflows):
        if bad:
            if patience == 1 or hysteresis == 1:
                scale = max(scale / 2, minimum)
            else:
                patience -= 1
            last_bad = iteration
        else:
            if consecutive:
                patience = hysteresis
            good = iteration - last_bad - 1
            if good > 0 and good % window == 0:
                patience = hysteresis
                scale *= 2
        scales.append(scale)
    return scales
