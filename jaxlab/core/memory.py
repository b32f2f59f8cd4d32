"""Host memory that a CPU device takes over as it is."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_ALIGNMENT = 64


def aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array to be filled, whose memory starts at a multiple of 64 bytes: `device_put` copies what does not."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
