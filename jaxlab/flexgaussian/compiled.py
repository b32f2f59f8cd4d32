"""The rasteriser compiled for machines that are not here: what an image of a large scene would take."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlab.core import plan
from jaxlab.flexgaussian.projection import View
from jaxlab.flexgaussian.rasteriser import draw, enough_for
from jaxlab.flexgaussian.scene import GaussianScene


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """An image to compile.

    Attributes:
      gaussians: how many, 6.1 million in the Mip-NeRF 360 scene "bicycle".
      degree: of the harmonics.
      width: of the image in pixels.
      height: the same.
      pairs_per_gaussian: room for pairs of a tile and a Gaussian, then rounded up to a power of two.
      gradients: also by all attributes, as `fit` takes them.
    """

    gaussians: int = 6_100_000
    degree: int = 3
    width: int = 1920
    height: int = 1080
    pairs_per_gaussian: float = 4.0
    gradients: bool = False


def compile_rasteriser(config: PlanConfig, target: plan.Target) -> plan.Plan:
    """Compiles `render`, or its gradients, for one device of a target; nothing runs."""
    place = jax.sharding.NamedSharding(target.mesh, jax.sharding.PartitionSpec())

    def like(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)

    n = config.gaussians
    scene = GaussianScene(
        like(n, 3), like(n, 3), like(n, 4), like(n), like(n, 3), like(n, (config.degree + 1) ** 2 - 1, 3)
    )
    size = {"width": config.width, "height": config.height}
    pairs = enough_for(int(config.pairs_per_gaussian * n))

    def image(scene: GaussianScene, view: View) -> tuple[jax.Array, jax.Array]:
        drawn = draw(scene, view, **size, max_pairs=pairs)
        return drawn.image, drawn.num_pairs

    def slopes(scene: GaussianScene, view: View) -> GaussianScene:
        return jax.grad(lambda scene: jnp.sum(image(scene, view)[0] ** 2))(scene)

    view = View(like(4, 4), like(2), like(2))
    return plan.compile(
        slopes if config.gradients else image, scene, view, target=target, labels=("parameters", "input")
    )
