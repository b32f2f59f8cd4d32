"""Scores over eight devices, in any number of processes, against those of one device."""

import numpy as np

from jaxlab.core import make_mesh
from jaxlab.flexgaussian.cameras import orbit_cameras
from jaxlab.flexgaussian.importance import importance_scores
from tests.flexgaussian.scenes import random_scene

SCENE = random_scene(50, degree=1)
CAMERAS = orbit_cameras(SCENE, 9, 32, 16)


def check_scores(cameras, weights):
    mesh = make_mesh({"view": 8})
    alone, together = (importance_scores(SCENE, cameras, weights=weights, mesh=m) for m in (None, mesh))
    if weights == "opacity":
        np.testing.assert_array_equal(together, alone)
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-4)


def case_counts(folder):
    """Nine views, one more than devices, and one of another size."""
    check_scores([*CAMERAS, *orbit_cameras(SCENE, 1, 16, 32)], "opacity")


def case_blending_weights(folder):
    check_scores(CAMERAS[:3], "alpha_T")
