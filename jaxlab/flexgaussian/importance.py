"""How much each Gaussian matters for what cameras see: LightGaussian's global significance (section 3.1)."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxlab.core.progress import progress
from jaxlab.flexgaussian.cameras import Camera
from jaxlab.flexgaussian.harmonics import C0
from jaxlab.flexgaussian.projection import View, view_of
from jaxlab.flexgaussian.rasteriser import draw, enough_for, first_guess
from jaxlab.flexgaussian.scene import GaussianScene, checked

WEIGHTS = ("opacity", "alpha_T", "count")
_REFERENCE_RANK = 0.9
"""The volume that scores are relative to: this share of the way down from the largest."""


def importance_scores(
    scene: GaussianScene,
    cameras: Sequence[Camera],
    *,
    weights: str = "opacity",
    volume_power: float = 0.1,
    volume_clamp: bool = False,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, " n"]:
    """Scores by which `prune` ranks Gaussians.

    Over all pixels of all views in which a Gaussian is composited its opacity is added up, and multiplied by its volume
    relative to one near the tenth percentile, to the power `volume_power`.

    Args:
      scene: N Gaussians.
      cameras: the training cameras; their photographs are not needed.
      weights: what a pixel adds: "opacity" (the paper), "alpha_T" (ours: the share of the pixel that is the
        Gaussian's) or "count" (1).
      volume_power: 0 leaves the volume out.
      volume_clamp: limit the relative volume to 1, as LightGaussian's text has it; the official code does not.
      mesh: one with an axis "view" divides the cameras of one size among its devices. They may belong to several
        processes, which all call this with the same arguments and get the same scores.

    Returns:
      [N] float64, not below 0.

    Raises:
      ValueError: an invalid scene; no camera, or none that sees any Gaussian.
    """
    scene = checked(scene)
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {WEIGHTS}, got {weights!r}")
    if not cameras:
        raise ValueError("cameras: expected at least one")
    if volume_power < 0:
        raise ValueError(f"volume_power: expected at least 0, got {volume_power}")
    total = np.zeros(scene.num_gaussians)
    for part in progress(_weighed(scene, cameras, weights == "alpha_T", mesh), "scoring views", len(cameras)):
        total += part
    if not total.any():
        raise ValueError("cameras: no camera sees the scene")
    if weights == "opacity":
        total *= 1 / (1 + np.exp(-scene.opacity_logit.astype(np.float64)))
    volumes = np.exp(scene.log_scales.sum(axis=1, dtype=np.float64))
    reference = np.sort(volumes)[::-1][int(_REFERENCE_RANK * len(volumes))]
    ratio = volumes / reference
    return total * (np.minimum(ratio, 1) if volume_clamp else ratio) ** volume_power


def blending(scene: GaussianScene, cameras: Sequence[Camera]) -> Float[np.ndarray, " n"]:
    """Pixels that each Gaussian colours, [N]: `importance_scores` by "alpha_T" without volumes (ours)."""
    return importance_scores(scene, cameras, weights="alpha_T", volume_power=0)


def _weighed(scene: GaussianScene, cameras: Sequence[Camera], blended: bool, mesh: Mesh | None) -> Iterator[np.ndarray]:
    """What the pixels of each view add to every Gaussian, or of each round of views that a mesh takes at once."""
    pairs = first_guess(scene.num_gaussians)
    width, place = (1, None) if mesh is None else (mesh.shape["view"], NamedSharding(mesh, PartitionSpec()))
    scene = jax.device_put(scene.replace(shN=scene.shN[:, :0]), place)  # which pixels, not in which colours
    for size in dict.fromkeys((camera.width, camera.height) for camera in cameras):
        views = [view_of(camera) for camera in cameras if (camera.width, camera.height) == size]
        for start in range(0, len(views), width):
            group = views[start : start + width]
            used = np.arange(width) < len(group)
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *group, *[group[0]] * (width - len(group)))
            while True:
                weights, needed = weigh_views(scene, stacked, used, *size, pairs, blended, mesh)
                if int(needed) <= pairs:
                    break
                pairs = enough_for(int(needed))
            yield np.asarray(weights, np.float64)


@functools.partial(jax.jit, static_argnames=("width", "height", "max_pairs", "blended", "mesh"))
def weigh_views(
    scene: GaussianScene,
    views: View,
    used: Array,
    width: int,
    height: int,
    max_pairs: int,
    blended: bool,
    mesh: Mesh | None,
) -> tuple[Array, Array]:
    """Weights of all views together, and the most pairs that one of them needs."""

    def one(scene: GaussianScene, views: View, used: Array) -> tuple[Array, Array]:
        view = jax.tree.map(lambda leaf: leaf[0], views)
        weights, pairs = _of_view(scene, view, width, height, max_pairs, blended)
        weights = jnp.where(used[0], weights, 0)
        if mesh is None:
            return weights, pairs
        return jax.lax.psum(weights, "view"), jax.lax.pmax(pairs, "view")

    if mesh is None:
        return one(scene, views, used)
    whole, split = PartitionSpec(), PartitionSpec("view")
    return jax.shard_map(one, mesh=mesh, in_specs=(whole, split, split), out_specs=whole, check_vma=False)(
        scene, views, used
    )


def _of_view(
    scene: GaussianScene, view: View, width: int, height: int, max_pairs: int, blended: bool
) -> tuple[Array, Array]:
    if not blended:
        drawn = draw(scene, view, width=width, height=height, max_pairs=max_pairs)
        return drawn.pixel_counts, drawn.num_pairs

    def red(shade: Array) -> tuple[Array, Array]:
        # An image is linear in colours: the derivative by a Gaussian's red is the sum of its blending weights.
        grey = scene.replace(sh0=jnp.stack([shade, 0 * shade, 0 * shade], axis=1), shN=jnp.zeros((len(shade), 0, 3)))
        drawn = draw(grey, view, width=width, height=height, max_pairs=max_pairs)
        return drawn.image[..., 0].sum(), drawn.num_pairs

    slope, pairs = jax.grad(red, has_aux=True)(jnp.zeros(scene.num_gaussians))
    return slope / C0, pairs
