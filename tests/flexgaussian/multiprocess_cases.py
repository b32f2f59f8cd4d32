"""Scores over eight devices, in any number of processes, against those of one device."""

import numpy as np
import pytest

from jaxlab.core import make_mesh
from jaxlab.flexgaussian import importance
from jaxlab.flexgaussian.cameras import orbit_cameras
from jaxlab.flexgaussian.importance import importance_scores
from tests.flexgaussian.scenes import random_scene

SCENE = random_scene(50, degree=1)
CAMERAS = orbit_cameras(SCENE, 9, 32, 16)


def check_scores(cameras, weights, first_guess=4096):
    mesh = make_mesh({"view": 8})
    alone = importance_scores(SCENE, cameras, weights=weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "first_guess", lambda count: first_guess)
        together = importance_scores(SCENE, cameras, weights=weights, mesh=mesh)
    if weights == "opacity":
        np.testing.assert_array_equal(together, alone)
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-4)


def case_counts(folder):
    """Nine views, one more than devices, and one of another size; all make room where one view has more pairs."""
    check_scores([*CAMERAS, *orbit_cameras(SCENE, 1, 16, 32)], "opacity", first_guess=16)


def case_blending_weights(folder):
    check_scores(CAMERAS[:3], "alpha_T")
