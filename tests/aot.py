"""What the tests that compile for absent GPUs share."""

import functools

import pytest

from jaxlab.core.errors import MissingExtra
from jaxlab.core.plan import ptx, target


@functools.cache
def _compiler() -> bool:
    try:
        target()
    except MissingExtra:
        return False
    return True


needs_aot = pytest.mark.skipif(not _compiler(), reason="the GPU compiler is not installed (extra 'aot')")
needs_ptxas = pytest.mark.skipif(ptx.find_ptxas() is None, reason="ptxas is not installed (package nvidia-cuda-nvcc)")
