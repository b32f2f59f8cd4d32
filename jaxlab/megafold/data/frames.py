"""Frames of tokens: three atoms each, the middle one at the origin (AlphaFold3, supplement 4.3.2)."""

import numpy as np
from jaxtyping import Bool, Float, Int

_IN_LINE = np.cos(np.deg2rad(25.0))  # three atoms within 25 degrees of a line are no frame


def atom_frames(positions: Float[np.ndarray, "A 3"], usable: Bool[np.ndarray, " A"]) -> Int[np.ndarray, "A 3"]:
    """The frame of every atom of one molecule: nearest atom, itself, second nearest (itself where there is none).

    Args:
      positions: of its atoms, Å; a reference conformer, or the truth where there is none.
      usable: atoms with a position; the others are nobody's neighbour, and have none.
    """
    itself = np.arange(len(positions))
    if len(positions) < 3:
        return np.repeat(itself[:, None], 3, axis=1)
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    distance[~(usable[:, None] & usable[None])] = np.inf
    np.fill_diagonal(distance, np.inf)
    near = np.argsort(distance, axis=1, kind="stable")[:, :2]
    near = np.where(np.isfinite(np.take_along_axis(distance, near, axis=1)), near, itself[:, None])
    return np.stack([near[:, 0], itself, near[:, 1]], axis=1)


def valid_frames(
    frames: Int[np.ndarray, "N 3"], coords: Float[np.ndarray, "A 3"], resolved: Bool[np.ndarray, " A"]
) -> Bool[np.ndarray, " N"]:
    """Whether the three atoms differ, are resolved, and are not in line."""
    first, origin, last = np.moveaxis(coords[frames].astype(np.float64), 1, 0)
    a, b = first - origin, last - origin
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = np.abs(np.sum(a * b, axis=-1)) / np.maximum(lengths, 1e-8)
    return resolved[frames].all(axis=1) & (lengths > 1e-8) & (cosine < _IN_LINE)
