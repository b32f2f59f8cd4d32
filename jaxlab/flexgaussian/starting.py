"""Where the Gaussians of a fit begin."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jaxlab.flexgaussian.cameras import Camera
from jaxlab.flexgaussian.harmonics import C0
from jaxlab.flexgaussian.scene import GaussianScene

_OPACITY = 0.1
_NEIGHBOURS = 3


def scene_extent(cameras: Sequence[Camera]) -> float:
    """1.1 times the largest distance of a camera from the middle of all, to which rates are relative (Kerbl et al.)."""
    centers = np.stack([camera.center for camera in cameras]).astype(np.float64)
    return max(1.1 * float(np.linalg.norm(centers - centers.mean(axis=0), axis=1).max()), 1e-3)


def initial_scene(cameras: Sequence[Camera], points: Any, count: int, degree: int, key: Array) -> GaussianScene:
    """`count` round, faint Gaussians: at given points, of which some are drawn or repeated, or at random.

    At random they fill a box around where the viewing axes meet, half as large as the distance of the cameras, and a
    fifth of them a larger one. Their size is the mean distance to the three nearest.

    Raises:
      ValueError: points that are not [P, 3], or not finite; colours of another number.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    if points is None:
        means, colors = _around(cameras, count, rng), None
    else:
        means, colors = points if isinstance(points, tuple) else (points, None)
        means = np.asarray(means, np.float64)
        if means.ndim != 2 or means.shape[1] != 3 or not len(means) or not np.isfinite(means).all():
            raise ValueError(f"init_points: expected finite points [P, 3], got shape {means.shape}")
        if colors is not None and np.shape(colors) != means.shape:
            raise ValueError(f"init_points: expected colours of shape {means.shape}, got {np.shape(colors)}")
        chosen = rng.permutation(np.resize(rng.permutation(len(means)), count))
        means = means[chosen]
        colors = None if colors is None else np.asarray(colors, np.float64)[chosen]
    spacing = np.clip(_spacing(means), 1e-4 * scene_extent(cameras), 0.2 * scene_extent(cameras))
    if len(means) > 1:  # points that are repeated part
        means = means + 0.1 * spacing[:, None] * rng.standard_normal(means.shape)
    shade = rng.uniform(0.3, 0.7, means.shape) if colors is None else colors
    return GaussianScene(
        means=means.astype(np.float32),
        log_scales=np.repeat(np.log(spacing)[:, None], 3, axis=1).astype(np.float32),
        quats=np.tile(np.array([1, 0, 0, 0], np.float32), (count, 1)),
        opacity_logit=np.full(count, np.log(_OPACITY / (1 - _OPACITY)), np.float32),
        sh0=((shade - 0.5) / C0).astype(np.float32),
        shN=np.zeros((count, (degree + 1) ** 2 - 1, 3), np.float32),
    )


def _around(cameras: Sequence[Camera], count: int, rng: np.random.Generator) -> np.ndarray:
    axes = np.stack([camera.viewmat[2, :3] for camera in cameras]).astype(np.float64)
    centers = np.stack([camera.center for camera in cameras]).astype(np.float64)
    across = np.eye(3) - axes[:, :, None] * axes[:, None]
    # Parallel axes meet nowhere: a little weight on the points before the cameras keeps the system solvable.
    ahead = centers + axes * scene_extent(cameras)
    system, side = across.sum(axis=0) + 1e-3 * np.eye(3), np.einsum("nij,nj->i", across, centers)
    middle = np.linalg.solve(system, side + 1e-3 * ahead.mean(axis=0))
    distance = float(np.median(np.linalg.norm(centers - middle, axis=1)))
    reach = np.where(np.arange(count) < 0.8 * count, 0.5 * distance, 1.5 * distance)
    return middle + reach[:, None] * rng.uniform(-1, 1, (count, 3))


def _spacing(means: np.ndarray) -> np.ndarray:
    """Mean distance to the three nearest other points."""
    from scipy.spatial import KDTree

    near = min(_NEIGHBOURS, len(means) - 1)
    if near == 0:
        return np.ones(1)
    distances, _ = KDTree(means).query(means, k=near + 1)
    return distances[:, 1:].mean(axis=1)
