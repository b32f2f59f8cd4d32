"""Memory that a device shares."""

import jax
import numpy as np
import pytest

from jaxlab.core.memory import aligned


@pytest.mark.parametrize("shape", [(5,), (3, 0, 2), (1001, 3)])
def test_a_device_takes_it_as_it_is(shape):
    for dtype in (np.float32, np.uint8):
        array = aligned(shape, dtype)
        assert (array.shape, array.dtype) == (shape, dtype)
        assert array.ctypes.data % 64 == 0 or array.size == 0
    array = aligned((1001, 3), "float32")
    array[:] = 1
    placed = jax.block_until_ready(jax.device_put(array, jax.devices("cpu")[0]))
    assert placed.unsafe_buffer_pointer() == array.ctypes.data
