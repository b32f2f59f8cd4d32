"""Masks as PIE-Bench stores them (arXiv 2310.01506)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool


def rle_to_mask(runs: Sequence[int] | np.ndarray, *, shape: tuple[int, int] = (512, 512)) -> Bool[np.ndarray, "H W"]:
    """A mask from its runs.

    Args:
      runs: flat (start, length) pairs, starts counted from 0 in row-major order; runs may overlap.
      shape: (H, W).

    Raises:
      ValueError: an odd number of entries, entries that are not whole numbers, or a run outside the mask.
    """
    flat = np.asarray(runs)
    if flat.size == 0:
        return np.zeros(shape, bool)
    if flat.ndim != 1 or flat.size % 2 or not np.issubdtype(flat.dtype, np.integer):
        raise ValueError(f"runs: expected whole (start, length) pairs in one row, got {flat.dtype} {flat.shape}")
    size = shape[0] * shape[1]
    starts, ends = flat[::2].astype(np.int64), flat[::2].astype(np.int64) + flat[1::2].astype(np.int64)
    outside = (starts < 0) | (ends < starts) | (ends > size)
    if outside.any():
        start, end = int(starts[outside][0]), int(ends[outside][0])
        raise ValueError(f"runs: expected runs within {size} pixels, got start {start}, length {end - start}")
    steps = np.zeros(size + 1, np.int64)
    np.add.at(steps, starts, 1)
    np.add.at(steps, ends, -1)
    return (np.cumsum(steps[:-1]) > 0).reshape(shape)
