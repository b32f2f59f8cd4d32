"""One of the 48 ways to write down the same ellipsoid: axes from the longest to the shortest, the smallest rotation."""

import numpy as np
from jaxtyping import Float

_R = 0.5**0.5
_TURNS = {
    (0, 1, 2): (1, 0, 0, 0),
    (1, 2, 0): (0.5, 0.5, 0.5, 0.5),
    (2, 0, 1): (0.5, -0.5, -0.5, -0.5),
    (1, 0, 2): (0, _R, _R, 0),
    (0, 2, 1): (_R, _R, 0, 0),
    (2, 1, 0): (_R, 0, -_R, 0),
}
"""The rotation that takes x, y, z to the axes of these numbers, the last up to its sign."""


def canonical(
    log_scales: Float[np.ndarray, "n 3"], quats: Float[np.ndarray, "n 4"]
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"]]:
    """Scales that fall, and x, y, z of unit quaternions whose w is at least 1/2, of the same ellipsoids."""
    order = np.argsort(-log_scales, axis=1, kind="stable")
    table = np.zeros((3, 3, 4))
    for (first, second, _), turn in _TURNS.items():
        table[first, second] = turn
    unit = quats / np.linalg.norm(quats, axis=1, keepdims=True)
    turned = _product(unit.astype(np.float64), table[order[:, 0], order[:, 1]])
    # Half a turn about an axis of an ellipsoid changes nothing: it brings any part of the quaternion to the front.
    halves = np.argmax(np.abs(turned), axis=1)
    turned = _product(turned, np.eye(4)[halves] * np.where(np.arange(4) == 0, 1.0, -1.0))
    turned *= np.where(turned[:, :1] < 0, -1.0, 1.0)
    return np.take_along_axis(log_scales, order, axis=1), turned[:, 1:]


def whole_quats(vectors: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 4"]:
    """Unit quaternions with these x, y, z, float32; vectors that are too long are scaled back."""
    squares = np.sum(vectors**2, axis=1, keepdims=True)
    vectors = vectors / np.sqrt(np.maximum(squares, 1))
    return np.concatenate([np.sqrt(np.maximum(1 - squares, 0)), vectors], axis=1).astype(np.float32)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of quaternions, row by row."""
    w, x, y, z = a.T
    p, q, r, s = b.T
    parts = (w * p - x * q - y * r - z * s, w * q + x * p + y * s - z * r)
    return np.stack([*parts, w * r - x * s + y * p + z * q, w * s + x * r - y * q + z * p], axis=1)
