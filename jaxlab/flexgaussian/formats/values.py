"""Opacities as files hold them."""

import numpy as np

_EDGE = 0.25 / 255


def logit(opacity: np.ndarray) -> np.ndarray:
    """The logits of opacities, float32; 0 and 1 are moved by a quarter of a step of 8 bits, so that they are finite."""
    opacity = np.clip(np.asarray(opacity, np.float64), _EDGE, 1 - _EDGE)
    return np.log(opacity / (1 - opacity)).astype(np.float32)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """The opacities of logits, float64."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(logits, np.float64)))


def byte(values: np.ndarray) -> np.ndarray:
    """Values rounded into 0 to 255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
