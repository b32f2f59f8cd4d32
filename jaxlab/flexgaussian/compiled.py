"""The rasteriser compiled for machines that are not here: what an image of a large scene would take."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.core import plan
from jaxlab.flexgaussian.importance import WEIGHTS, weigh_views
from jaxlab.flexgaussian.projection import View
from jaxlab.flexgaussian.rasteriser import draw, enough_for
from jaxlab.flexgaussian.scene import GaussianScene

PHASES = ("image", "gradients", "scores")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What to compile, of images of one size.

    Attributes:
      phase: "image": one of a scene, on each device; "gradients": and by all attributes, as `fit` takes them;
        "scores": what one view adds to `importance_scores`, or one on each device of a mesh's axis `view`.
      gaussians: how many, 6.1 million in the Mip-NeRF 360 scene "bicycle".
      degree: of the harmonics.
      width: of the image in pixels.
      height: the same.
      pairs_per_gaussian: room for pairs of a tile and a Gaussian, then rounded up to a power of two.
      weights: of the scores, see `importance_scores`.
    """

    phase: str = "image"
    gaussians: int = 6_100_000
    degree: int = 3
    width: int = 1920
    height: int = 1080
    pairs_per_gaussian: float = 4.0
    weights: str = "opacity"

    def __post_init__(self):
        for name, known in (("phase", PHASES), ("weights", WEIGHTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")


def compile_rasteriser(config: PlanConfig, target: plan.Target, *, read_kernels: bool = True) -> plan.Plan:
    """Compiles a phase for a target; nothing runs. The whole scene lies on every device."""
    n, spread = config.gaussians, config.phase == "scores" and "view" in target.mesh.shape

    def like(*shape: int, axes: tuple[str, ...] = ()) -> Any:
        place = NamedSharding(target.mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)

    terms = 0 if config.phase == "scores" else (config.degree + 1) ** 2 - 1  # as `importance_scores` leaves them out
    scene = GaussianScene(like(n, 3), like(n, 3), like(n, 4), like(n), like(n, 3), like(n, terms, 3))
    size = {"width": config.width, "height": config.height}
    pairs = enough_for(int(config.pairs_per_gaussian * n))

    def image(scene: GaussianScene, view: View) -> tuple[jax.Array, jax.Array]:
        drawn = draw(scene, view, **size, max_pairs=pairs)
        return drawn.image, drawn.num_pairs

    def slopes(scene: GaussianScene, view: View) -> GaussianScene:
        return jax.grad(lambda scene: jnp.sum(image(scene, view)[0] ** 2))(scene)

    def weighed(scene: GaussianScene, views: View) -> tuple[jax.Array, jax.Array]:
        blended, mesh = config.weights == "alpha_T", target.mesh if spread else None
        used = jnp.ones(views.focal.shape[0], bool)
        return weigh_views(scene, views, used, **size, max_pairs=pairs, blended=blended, mesh=mesh)

    view = View(like(4, 4), like(2), like(2))
    if config.phase == "scores":
        count, axes = (target.mesh.shape["view"], ("view",)) if spread else (1, ())
        view = View(*(like(count, *leaf.shape, axes=axes) for leaf in view))
    fn = {"image": image, "gradients": slopes, "scores": weighed}[config.phase]
    return plan.compile(fn, scene, view, target=target, labels=("parameters", "input"), read_kernels=read_kernels)
