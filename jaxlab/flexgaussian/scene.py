"""A scene of 3D Gaussians as a pytree of float32 arrays before activation, and what makes one valid."""

import warnings
from typing import Any

import flax.struct
import jax
import numpy as np

from jaxlab.core.memory import aligned
from jaxlab.flexgaussian.harmonics import degree_of

ATTRIBUTES = ("means", "log_scales", "quats", "opacity_logit", "sh0", "shN")
UNSEEN_LOGIT = -40.0
_COLUMNS = {"means": (3,), "log_scales": (3,), "quats": (4,), "opacity_logit": (), "sh0": (3,)}


class SceneFormatError(ValueError):
    """A file that is not a scene, is damaged, or is of a form that this library does not read."""


class GaussianScene(flax.struct.PyTreeNode):
    """N Gaussians as 3D Gaussian Splatting trains them (Kerbl et al. 2023), numpy or JAX arrays.

    Attributes:
      means: centres, [N, 3], in world units.
      log_scales: logarithms of the three standard deviations, [N, 3].
      quats: rotations as quaternions (w, x, y, z), not normalised, [N, 4].
      opacity_logit: logits of the opacities, [N].
      sh0: the constant term of the colour's spherical harmonics, [N, 3]; 0 is grey.
      shN: the higher terms, [N, K, 3] with K = (degree + 1)^2 - 1, that is 0, 3, 8 or 15.
    """

    means: Any
    log_scales: Any
    quats: Any
    opacity_logit: Any
    sh0: Any
    shN: Any

    @property
    def num_gaussians(self) -> int:
        """N."""
        return self.means.shape[0]

    @property
    def degree(self) -> int:
        """Of the spherical harmonics, 0 to 3."""
        return degree_of(self.shN.shape[1])

    @property
    def num_bytes(self) -> int:
        """Of the arrays; a plain .ply also has normals, 12 bytes a Gaussian."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def checked(scene: GaussianScene, *, sanitize: bool = False) -> GaussianScene:
    """`scene` on the host as float32, if it is valid.

    Quaternions of length zero become the identity, with a warning.

    Args:
      scene: any.
      sanitize: drop Gaussians that have a NaN or an infinity, with a warning, where they are an error otherwise.

    Raises:
      ValueError: wrong shapes; no Gaussians; a number of harmonics that no degree has; NaN or infinity.
    """
    check_shapes(scene)
    arrays = {name: np.asarray(getattr(scene, name), np.float32) for name in ATTRIBUTES}
    arrays = _finite(arrays, sanitize)
    zero = ~np.any(arrays["quats"], axis=1)
    if zero.any():
        warnings.warn(f"scene: {zero.sum()} quaternions of length zero became the identity", stacklevel=2)
        arrays["quats"] = np.where(zero[:, None], np.array([1, 0, 0, 0], np.float32), arrays["quats"])
    return GaussianScene(**arrays)


def take(scene: GaussianScene, rows: Any) -> GaussianScene:
    """The Gaussians at `rows`: indices, a slice or a mask."""
    return jax.tree.map(lambda leaf: leaf[rows], scene)


def padded(scene: GaussianScene, count: int) -> GaussianScene:
    """`scene` and behind it Gaussians that nobody sees, `count` in all: scenes of many sizes share a program."""
    more = count - scene.num_gaussians
    unseen = dict.fromkeys(ATTRIBUTES, 0.0) | {"quats": 1.0, "opacity_logit": UNSEEN_LOGIT}

    def longer(name: str) -> np.ndarray:
        leaf = np.asarray(getattr(scene, name))
        whole = aligned((count, *leaf.shape[1:]), leaf.dtype)
        whole[: len(leaf)], whole[len(leaf) :] = leaf, unseen[name]
        return whole

    return scene if more == 0 else GaussianScene(**{name: longer(name) for name in ATTRIBUTES})


def check_shapes(scene: GaussianScene) -> None:
    """Raises ValueError where the shapes of a scene do not fit together, also of one that is traced."""
    count = np.shape(scene.means)[0] if np.ndim(scene.means) else 0
    if count == 0:
        raise ValueError("scene: expected at least one Gaussian, got none")
    for name, columns in _COLUMNS.items():
        if np.shape(getattr(scene, name)) != (count, *columns):
            raise ValueError(f"scene.{name}: expected shape {(count, *columns)}, got {np.shape(getattr(scene, name))}")
    shape = np.shape(scene.shN)
    if len(shape) != 3 or shape[0] != count or shape[2] != 3:
        raise ValueError(f"scene.shN: expected shape ({count}, K, 3), got {shape}")
    degree_of(shape[1])


def _finite(arrays: dict[str, np.ndarray], sanitize: bool) -> dict[str, np.ndarray]:
    bad = {name: ~np.isfinite(array) for name, array in arrays.items() if not np.isfinite(array).all()}
    if not bad:
        return arrays
    rows = np.any([mask.reshape(len(mask), -1).any(axis=1) for mask in bad.values()], axis=0)
    if not sanitize:
        name, mask = next(iter(bad.items()))
        first = tuple(int(i) for i in np.argwhere(mask)[0])
        raise ValueError(
            f"scene.{name}: expected finite numbers, got {int(mask.sum())} NaN or infinite ones, the first at {first}; "
            f"sanitize=True drops their Gaussians"
        )
    if rows.all():
        raise ValueError(f"scene: all {len(rows)} Gaussians have NaN or infinite numbers")
    warnings.warn(f"scene: dropped {int(rows.sum())} Gaussians with NaN or infinite numbers", stacklevel=3)
    return {name: array[~rows] for name, array in arrays.items()}
