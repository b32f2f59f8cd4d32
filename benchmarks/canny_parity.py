"""Canny's edges beside OpenCV on scikit-image's photographs, colour and grey, both gradients.

Called by `benchmarks.parity`.
"""

import functools
from collections.abc import Iterator

import numpy as np

NAMES = ("canny",)
BOUND = 1e-3  # of the pixels
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "brick", "moon")
GOLDEN = ("chelsea", "camera")
THRESHOLDS = ((100, 200), (30, 90))


@functools.cache
def photograph(name: str) -> np.ndarray:
    """One of scikit-image's, uint8."""
    import skimage.data

    return getattr(skimage.data, name)()


def ours(name: str, low: int, high: int, l2_gradient: bool) -> np.ndarray:
    """Jaxlab's edges."""
    from jaxlab.instantedit import canny

    return np.asarray(canny(photograph(name), low, high, l2_gradient=l2_gradient))


def theirs(name: str, low: int, high: int, l2_gradient: bool) -> np.ndarray:
    """OpenCV's edges."""
    import cv2

    return cv2.Canny(photograph(name), low, high, L2gradient=l2_gradient) > 0


def rows(name: str) -> Iterator[tuple[str, float]]:
    """(what, part of the pixels that differ) of each photograph, the worse thresholds."""
    for photo in PHOTOGRAPHS:
        for l2_gradient in (False, True):
            worst = max(
                float(np.mean(ours(photo, *limits, l2_gradient) != theirs(photo, *limits, l2_gradient)))
                for limits in THRESHOLDS
            )
            yield f"{photo}, L{1 + l2_gradient} gradient, pixels that differ", worst


def content(name: str) -> dict[str, np.ndarray]:
    """What a golden file holds: OpenCV's edges of two photographs, eight pixels a byte."""
    return {
        f"{photo}/{low}/{high}/L{1 + l2_gradient}": np.packbits(theirs(photo, low, high, l2_gradient))
        for photo in GOLDEN
        for low, high in THRESHOLDS[:1]
        for l2_gradient in (False, True)
    }
