"""A scene for machines that have none: a striped ball, shinier on one side, on a checkered floor."""

import numpy as np

from jaxlab.flexgaussian.harmonics import C0
from jaxlab.flexgaussian.scene import GaussianScene


def striped_ball(count: int, *, seed: int = 0) -> GaussianScene:
    """`count` flat Gaussians on the surfaces of a ball and a floor, with harmonics of degree 1."""
    rng = np.random.default_rng(seed)
    on_ball = count * 2 // 3
    normals = rng.standard_normal((on_ball, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    floor = np.stack(
        [rng.uniform(-1, 1, count - on_ball), np.full(count - on_ball, 0.5), rng.uniform(-1, 1, count - on_ball)], 1
    )
    means = np.concatenate([0.5 * normals, floor])
    up = np.concatenate([normals, np.tile([0.0, -1.0, 0.0], (count - on_ball, 1))])
    stripes = (np.floor(8 * means[:, 1]) % 2)[:, None]
    checks = ((np.floor(4 * means[:, 0]) + np.floor(4 * means[:, 2])) % 2)[:, None]
    ball_color = stripes * [0.9, 0.5, 0.1] + (1 - stripes) * [0.15, 0.3, 0.6]
    floor_color = 0.2 + 0.5 * checks * [1, 1, 1]
    colors = np.where(np.arange(count)[:, None] < on_ball, ball_color, floor_color) + 0.03 * rng.standard_normal(
        (count, 3)
    )
    shine = np.where(np.arange(count)[:, None, None] < on_ball, up[:, [1, 2, 0], None] * [[0.15], [0.15], [0.15]], 0.0)
    size = 1.6 / np.sqrt(count)
    log_scales = np.log(np.tile([size, size, 0.1 * size], (count, 1))) + 0.2 * rng.standard_normal((count, 3))
    return GaussianScene(
        means=means.astype(np.float32),
        log_scales=log_scales.astype(np.float32),
        quats=_facing(up).astype(np.float32),
        opacity_logit=rng.normal(3, 1, count).astype(np.float32),
        sh0=((colors - 0.5) / C0).astype(np.float32),
        shN=np.broadcast_to(shine, (count, 3, 3)).astype(np.float32),
    )


def _facing(normals: np.ndarray) -> np.ndarray:
    """Quaternions that turn z into unit vectors."""
    quats = np.stack([1 + normals[:, 2], -normals[:, 1], normals[:, 0], 0 * normals[:, 0]], axis=1)
    length = np.linalg.norm(quats, axis=1, keepdims=True)
    return np.where(length > 1e-6, quats / np.maximum(length, 1e-6), [0.0, 1.0, 0.0, 0.0])
