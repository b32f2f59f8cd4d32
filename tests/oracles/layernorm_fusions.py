"""LayerNorm into a linear map and into SwiGLU, with closed-form gradients, float64 numpy (MegaFold 2.2 and 2.3)."""

import numpy as np

EPS = 1e-5


def layernorm_linear(
    x: np.ndarray, scale: np.ndarray, offset: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float = EPS
) -> np.ndarray:
    """LN(x) w + b over the last axis."""
    return (_standardised(x, eps)[0] * scale + offset) @ w + b


def layernorm_linear_gradients(
    x: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray,
    w: np.ndarray,
    b: np.ndarray,
    d_out: np.ndarray,
    eps: float = EPS,
) -> tuple[np.ndarray, ...]:
    """Gradients of sum(d_out * layernorm_linear(...)) in x, scale, offset, w and b."""
    normal, _ = _standardised(x, eps)
    d_normed = d_out @ w.T
    rows = tuple(range(x.ndim - 1))
    d_w = np.einsum("mk,mn->kn", _flat(normal * scale + offset), _flat(d_out))
    d_x, d_scale, d_offset = _through_norm(x, scale, d_normed, eps)
    return d_x, d_scale, d_offset, d_w, d_out.sum(rows)


def transition(
    x: np.ndarray, scale: np.ndarray, offset: np.ndarray, w_in: np.ndarray, w_out: np.ndarray, eps: float = EPS
) -> np.ndarray:
    """(silu(gate) * value) w_out, the value from the first half of w_in's columns."""
    value, gate = _hidden(_standardised(x, eps)[0] * scale + offset, w_in)
    return (gate / (1 + np.exp(-gate)) * value) @ w_out


def transition_gradients(
    x: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray,
    w_in: np.ndarray,
    w_out: np.ndarray,
    d_out: np.ndarray,
    eps: float = EPS,
) -> tuple[np.ndarray, ...]:
    """Gradients of sum(d_out * transition(...)) in the five arrays."""
    normed = _standardised(x, eps)[0] * scale + offset
    value, gate = _hidden(normed, w_in)
    share = 1 / (1 + np.exp(-gate))
    d_product = d_out @ w_out.T
    slope = share + gate * share * (1 - share)
    d_hidden = np.concatenate([d_product * gate * share, d_product * value * slope], axis=-1)
    d_x, d_scale, d_offset = _through_norm(x, scale, d_hidden @ w_in.T, eps)
    d_in = _flat(normed).T @ _flat(d_hidden)
    return d_x, d_scale, d_offset, d_in, _flat(gate * share * value).T @ _flat(d_out)


def _standardised(x: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    rstd = 1 / np.sqrt(x.var(-1, keepdims=True) + eps)
    return (x - x.mean(-1, keepdims=True)) * rstd, rstd


def _through_norm(x, scale, d_normed, eps):
    normal, rstd = _standardised(x, eps)
    w = d_normed * scale
    d_x = rstd * (w - normal * (w * normal).mean(-1, keepdims=True) - w.mean(-1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    return d_x, (d_normed * normal).sum(rows), d_normed.sum(rows)


def _hidden(normed, w_in):
    half = w_in.shape[1] // 2
    return normed @ w_in[:, :half], normed @ w_in[:, half:]


def _flat(x):
    return x.reshape(-1, x.shape[-1])
