"""What is left of a scene after pruning, adapted to what the whole one shows. No photographs are needed (ours)."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxlab.core.progress import progress
from jaxlab.flexgaussian.cameras import Camera
from jaxlab.flexgaussian.projection import View, view_of
from jaxlab.flexgaussian.rasteriser import draw, enough_for, first_guess
from jaxlab.flexgaussian.scene import ATTRIBUTES, GaussianScene, checked

RATES = {"sh0": 0.02, "shN": 0.01, "opacity_logit": 0.1, "log_scales": 0.02}
"""Adam's learning rates at the start; they fall to a tenth."""
_EPS = 1e-15


def refit(
    scene: GaussianScene,
    cameras: Sequence[Camera],
    references: Sequence[Float[Array | np.ndarray, "h w 3"]],
    *,
    steps: int,
    rates: Mapping[str, float] | None = None,
    keep_plain: bool = True,
) -> GaussianScene:
    """Gradient descent on the mean square difference to reference images, one a step in their order.

    Args:
      scene: what is left.
      cameras: of the references.
      references: what to look like: renders of the whole scene.
      steps: how many.
      rates: learning rates of the attributes that may change; None: `RATES`.
      keep_plain: harmonics that are all zero stay so.

    Raises:
      ValueError: an invalid scene; no cameras, or another number of references; rates of unknown attributes.
    """
    scene, rates = checked(scene), dict(RATES if rates is None else rates)
    if not cameras or len(cameras) != len(references):
        raise ValueError(f"references: expected one a camera, {len(cameras)} and at least one, got {len(references)}")
    unknown = set(rates) - set(ATTRIBUTES)
    if unknown:
        raise ValueError(f"rates: expected some of {ATTRIBUTES}, got {sorted(unknown)}")
    shaded = np.any(scene.shN, axis=(1, 2)) if keep_plain else np.ones(scene.num_gaussians, bool)
    optimizer = _optimizer(tuple(sorted(rates.items())), steps)
    free = {name: jnp.asarray(getattr(scene, name)) for name in rates}
    state, scene = optimizer.init(free), jax.device_put(scene)
    pairs = first_guess(scene.num_gaussians)
    for step in progress(range(steps), "refitting", steps):
        camera, reference = cameras[step % len(cameras)], references[step % len(cameras)]
        while True:
            fixed = {"optimizer": optimizer, "width": camera.width, "height": camera.height, "max_pairs": pairs}
            new = _step(scene, free, state, view_of(camera), jnp.asarray(reference), shaded, **fixed)
            if int(new[2]) <= pairs:
                break
            pairs = enough_for(int(new[2]))
        free, state, _ = new
    return checked(scene.replace(**jax.tree.map(np.asarray, free)))


@functools.lru_cache(maxsize=8)
def _optimizer(rates: tuple[tuple[str, float], ...], steps: int) -> optax.GradientTransformation:
    groups: dict[Any, Any] = {
        name: optax.adam(optax.exponential_decay(rate, steps, 0.1), eps=_EPS) for name, rate in rates
    }
    return optax.multi_transform(groups, {name: name for name, _ in rates})


@functools.partial(jax.jit, static_argnames=("optimizer", "width", "height", "max_pairs"))
def _step(
    scene: GaussianScene,
    free: dict[str, Array],
    state: optax.OptState,
    view: View,
    reference: Array,
    shaded: Array,
    *,
    optimizer: optax.GradientTransformation,
    width: int,
    height: int,
    max_pairs: int,
) -> tuple[dict[str, Array], optax.OptState, Array]:
    """The attributes after one reference, the optimiser's state, and how many pairs there were."""

    def loss_of(free: dict[str, Array]) -> tuple[Array, Array]:
        drawn = draw(scene.replace(**free), view, width=width, height=height, max_pairs=max_pairs)
        return jnp.mean(jnp.square(drawn.image - reference)), drawn.num_pairs

    gradient, pairs = jax.grad(loss_of, has_aux=True)(free)
    if "shN" in gradient:
        gradient["shN"] = jnp.where(shaded[:, None, None], gradient["shN"], 0.0)
    updates, state = optimizer.update(gradient, state, free)
    moved: Any = optax.apply_updates(free, updates)
    return moved, state, pairs
