"""Order along a space-filling curve, so that neighbours in a file are neighbours in space."""

import numpy as np
from jaxtyping import Float, Int, UInt64

_BITS = 21
_STEPS = ((32, 0x1F00000000FFFF), (16, 0x1F0000FF0000FF), (8, 0x100F00F00F00F00F), (4, 0x10C30C30C30C30C3))
_STEPS = (*_STEPS, (2, 0x1249249249249249))


def morton_order(means: Float[np.ndarray, "n 3"]) -> Int[np.ndarray, " n"]:
    """The rows sorted by the Morton code of their position in the box of all, ties by row."""
    if len(means) == 0:
        return np.zeros(0, np.int64)
    means = np.asarray(means, np.float64)
    low, extent = means.min(axis=0), np.ptp(means, axis=0).max()
    cells = ((means - low) / (extent or 1.0) * ((1 << _BITS) - 1)).astype(np.uint64)
    return np.argsort(interleaved(cells), kind="stable")


def interleaved(cells: UInt64[np.ndarray, "n 3"]) -> UInt64[np.ndarray, " n"]:
    """Morton codes: the bits of three coordinates of 21 bits in turn, the first's the lowest."""
    spread = cells
    for shift, mask in _STEPS:
        spread = (spread | spread << np.uint64(shift)) & np.uint64(mask)
    x, y, z = spread.T
    return x | y << np.uint64(1) | z << np.uint64(2)


def parted(codes: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, "n 3"]:
    """The coordinates that Morton codes are of."""
    values = codes[:, None] >> np.arange(3, dtype=np.uint64) & np.uint64(_STEPS[-1][1])
    masks = [mask for _, mask in _STEPS[-2::-1]] + [(1 << _BITS) - 1]
    for (shift, _), mask in zip(_STEPS[::-1], masks):
        values = (values | values >> np.uint64(shift)) & np.uint64(mask)
    return values
