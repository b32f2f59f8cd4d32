"""Positions in 16 or 24 bits."""

import numpy as np

from jaxlab.flexgaussian.scene import GaussianScene

_LARGEST = float(np.finfo(np.float16).max)
_FIXED = (1 << 24) - 1
_SHARE = 0.25
"""Ours: float16 is too coarse where its step is a larger share of the median Gaussian (specification, section 3)."""


def encode_positions(scene: GaussianScene, form: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The stored values of the means, and the origin and step they are relative to, `[3]` float64 each."""
    means = np.asarray(scene.means, np.float64)
    if form == "auto":
        form = "fixed24" if _too_coarse(scene) else "fp16"
    low, high = means.min(axis=0), means.max(axis=0)
    if form == "fixed24":
        step = np.maximum(high - low, np.finfo(np.float32).tiny) / _FIXED
        fixed = np.rint((means - low) / step).astype("<u4")
        return fixed.view(np.uint8).reshape(-1, 3, 4)[:, :, :3].reshape(-1, 9), low, step
    origin, step = np.zeros(3), np.ones(3)
    if np.abs(means).max() >= _LARGEST:
        origin = (low + high) / 2
        step = np.full(3, max(float(np.abs(means - origin).max()) / (_LARGEST / 2), 1.0))
    return ((means - origin) / step).astype(np.float16), origin, step


def decode_positions(stored: np.ndarray, origin: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The means, [N, 3] float32."""
    if stored.dtype == np.uint8:
        low, middle, high = np.moveaxis(stored.reshape(-1, 3, 3).astype(np.uint32), -1, 0)
        stored = high << 16 | middle << 8 | low
    return (origin + step * stored.astype(np.float64)).astype(np.float32)


def _too_coarse(scene: GaussianScene) -> bool:
    """Whether float16's step at the median distance from the origin exceeds a quarter of the median Gaussian's size."""
    size = float(np.exp(np.median(scene.log_scales)))
    furthest = np.abs(scene.means).max(axis=1)
    step = np.spacing(np.minimum(np.median(furthest), _LARGEST).astype(np.float16))
    return float(step) > _SHARE * size
