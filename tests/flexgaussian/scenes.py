"""Scenes of tests: random ones, and the real files."""

import numpy as np
import pytest

from jaxlab.core import DataUnavailable, data_path
from jaxlab.flexgaussian.scene import GaussianScene


def random_scene(count=40, degree=3, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return GaussianScene(
        means=normal(count, 3),
        log_scales=normal(count, 3) * 0.5 - 2,
        quats=normal(count, 4),
        opacity_logit=normal(count) * 2,
        sh0=normal(count, 3),
        shN=normal(count, (degree + 1) ** 2 - 1, 3) * 0.3,
    )


def real(name):
    """The path of a file of shared data; skips where it is absent."""
    try:
        return data_path(f"splats/{name}", download=False)
    except DataUnavailable as error:
        pytest.skip(str(error))
