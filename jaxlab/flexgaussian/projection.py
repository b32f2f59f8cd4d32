"""Gaussians seen by a camera: ellipses on the image, depths and colours (Zwicker et al. 2001; Kerbl et al. 2023)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.flexgaussian.cameras import Camera
from jaxlab.flexgaussian.harmonics import colors
from jaxlab.flexgaussian.scene import GaussianScene

NEAR = 0.2
"""Gaussians whose centre is not further away are not seen (official code)."""
_DILATION = 0.3
_LIMIT = 1.3
_HIGHEST = jax.lax.Precision.HIGHEST


class Projection(NamedTuple):
    """Rows in the order of the scene.

    Attributes:
      means2d: centres in pixels, [N, 2]; the centre of the first pixel is at (0.5, 0.5).
      depths: along the viewing direction, [N].
      conics: inverse covariances (a, b, c) of [[a, b], [b, c]] in 1/pixels^2, [N, 3].
      rgb: colours seen from there, not below 0, [N, 3].
      radii: three standard deviations of the longer axis in pixels, rounded up, [N]; 0 = culled.
    """

    means2d: Float[Array, "n 2"]
    depths: Float[Array, " n"]
    conics: Float[Array, "n 3"]
    rgb: Float[Array, "n 3"]
    radii: Int[Array, " n"]


class View(NamedTuple):
    """A camera as arrays, so that one compiled program serves all cameras of a size."""

    viewmat: Any  # [4, 4]
    focal: Any  # [2]
    principal: Any  # [2]


def view_of(camera: Camera) -> View:
    """The arrays of a camera; its size stays static."""
    focal, principal = (np.array(pair, np.float32) for pair in ((camera.fx, camera.fy), (camera.cx, camera.cy)))
    return View(camera.viewmat, focal, principal)


def project(scene: GaussianScene, camera: Camera) -> Projection:
    """Where a camera sees the Gaussians of a scene. Differentiable in the scene."""
    return project_view(scene, view_of(camera), camera.width, camera.height)


def project_view(scene: GaussianScene, view: View, width: int, height: int) -> Projection:
    """`project` with a traced camera."""
    rotation, shift = jnp.asarray(view.viewmat)[:3, :3], jnp.asarray(view.viewmat)[:3, 3]
    means = jnp.asarray(scene.means)
    points = jnp.matmul(means, rotation.T, precision=_HIGHEST) + shift
    depths = points[:, 2]
    seen = depths > NEAR
    z = jnp.where(seen, depths, 1.0)  # derivatives of what is culled stay finite
    ratio = points[:, :2] / z[:, None]
    focal, size = jnp.asarray(view.focal), jnp.array([width, height], np.float32)
    means2d = focal * ratio + jnp.asarray(view.principal)

    limit = _LIMIT * size / (2 * focal)
    x, y = jnp.moveaxis(jnp.clip(ratio, -limit, limit) * z[:, None], 1, 0)
    zero = jnp.zeros_like(z)
    fx, fy = focal
    jacobian = jnp.stack([fx / z, zero, -fx * x / z**2, zero, fy / z, -fy * y / z**2], axis=1).reshape(-1, 2, 3)
    half = jnp.matmul(jacobian, rotation, precision=_HIGHEST)
    half = (
        jnp.matmul(half, rotations(scene.quats), precision=_HIGHEST) * jnp.exp(jnp.asarray(scene.log_scales))[:, None]
    )
    xx, yy = (jnp.sum(half[:, i] ** 2, axis=1) + _DILATION for i in (0, 1))
    xy = jnp.sum(half[:, 0] * half[:, 1], axis=1)
    determinant = xx * yy - xy**2
    seen &= determinant > 0
    safe = jnp.where(seen, determinant, 1.0)
    conics = jnp.stack([yy, -xy, xx], axis=1) / safe[:, None]

    middle = 0.5 * (xx + yy)
    longest = middle + jnp.sqrt(jnp.maximum(0.1, middle**2 - determinant))
    radii = jnp.ceil(3 * jnp.sqrt(longest))
    inside = jnp.all((means2d + radii[:, None] > 0) & (means2d - radii[:, None] < size), axis=1)
    radii = jnp.where(seen & inside, jnp.minimum(radii, 1e9), 0).astype(jnp.int32)

    centre = -jnp.matmul(rotation.T, shift, precision=_HIGHEST)
    offsets = jnp.where(seen[:, None], means - centre, 1.0)
    directions = offsets / jnp.linalg.norm(offsets, axis=1, keepdims=True)
    rgb = colors(directions, jnp.asarray(scene.sh0), jnp.asarray(scene.shN))
    return Projection(means2d, depths, conics, rgb, radii)


def rotations(quats: Float[Array | np.ndarray, "n 4"]) -> Float[Array, "n 3 3"]:
    """The rotation matrices of quaternions (w, x, y, z) of any length above 0."""
    quats = jnp.asarray(quats)
    w, x, y, z = jnp.moveaxis(quats / jnp.linalg.norm(quats, axis=1, keepdims=True), 1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row, axis=1) for row in rows], axis=1)
