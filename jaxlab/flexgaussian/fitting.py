"""A scene learned from photographs: gradient descent on a fixed number of Gaussians, of which idle ones move.

Loss and learning rates are those of 3D Gaussian Splatting (Kerbl et al. 2023). Instead of splits and clones, Gaussians
that have faded are moved onto others, and all jitter, as in "3D Gaussian Splatting as Markov Chain Monte
Carlo" (Kheradmand et al. 2024): their number never changes, so that one compiled program serves the whole run.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float

from jaxlab.core import Checkpointer, MetricsLogger, image_metrics, named_key
from jaxlab.core.progress import progress
from jaxlab.flexgaussian.cameras import Camera
from jaxlab.flexgaussian.projection import View, rotations, view_of
from jaxlab.flexgaussian.rasteriser import draw, enough_for, first_guess
from jaxlab.flexgaussian.relocation import relocated
from jaxlab.flexgaussian.scene import ATTRIBUTES, GaussianScene, checked
from jaxlab.flexgaussian.starting import initial_scene, scene_extent
from pallas_kernels.splat_rasterize import Rasterized


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How a scene is learned.

    Attributes:
      count: Gaussians.
      degree: of the harmonics at the end; it rises by one each quarter of the run.
      means_rate: Adam's learning rate of centres at the start, times the extent of the cameras (Kerbl et al.).
      means_decay: what it is multiplied by in the course of the run, geometrically (Kerbl et al.: 0.01).
      sh0_rate: of the colours' constant terms (Kerbl et al.).
      shN_rate: of the higher terms (Kerbl et al.).
      opacity_rate: of the logits (Kerbl et al.).
      scale_rate: of the logarithms (Kerbl et al.).
      rotation_rate: of the quaternions (Kerbl et al.).
      ssim_weight: the loss is (1 - weight) L1 + weight (1 - SSIM) (Kerbl et al.).
      opacity_cost: of the mean opacity, and
      scale_cost: of the mean scale, added to the loss (Kheradmand et al.).
      jitter: how strongly faint Gaussians move at random (Kheradmand et al.); 0: not.
      relocate_every: steps between moves of idle Gaussians (Kheradmand et al.); 0: never.
      faint: the opacity below which a Gaussian is idle (Kheradmand et al.).
    """

    count: int = 10_000
    degree: int = 2
    means_rate: float = 1.6e-4
    means_decay: float = 0.01
    sh0_rate: float = 2.5e-3
    shN_rate: float = 1.25e-4
    opacity_rate: float = 0.05
    scale_rate: float = 5e-3
    rotation_rate: float = 1e-3
    ssim_weight: float = 0.2
    opacity_cost: float = 0.01
    scale_cost: float = 0.01
    jitter: float = 5e5
    relocate_every: int = 100
    faint: float = 0.005

    def __post_init__(self):
        if self.count < 1 or not 0 <= self.degree <= 3:
            raise ValueError(f"count, degree: expected at least 1 and 0 to 3, got {self.count} and {self.degree}")


class GaussianModel(nn.Module):
    """A scene as parameters, one leaf an attribute, whose call draws it. `init` makes grey points at the origin.

    Attributes:
      count: Gaussians.
      degree: of the harmonics.
    """

    count: int
    degree: int

    @nn.compact
    def __call__(self, view: View, *, width: int, height: int, max_pairs: int) -> Rasterized:
        """Draws the scene; see `rasteriser.draw`."""
        shapes: dict[str, tuple[int, ...]] = {
            "means": (3,),
            "log_scales": (3,),
            "quats": (4,),
            "opacity_logit": (),
            "sh0": (3,),
        }
        shapes["shN"] = ((self.degree + 1) ** 2 - 1, 3)
        fill = {name: nn.initializers.constant(float(name == "quats")) for name in ATTRIBUTES}
        leaves = {name: self.param(name, fill[name], (self.count, *shapes[name])) for name in ATTRIBUTES}
        return draw(GaussianScene(**leaves), view, width=width, height=height, max_pairs=max_pairs)


class FitState(flax.struct.PyTreeNode):
    """Everything that a run goes on from."""

    step: Array
    params: dict[str, Array]
    opt_state: Any


def fit(
    images: Sequence[Float[Array | np.ndarray, "h w 3"]],
    cameras: Sequence[Camera],
    init_points: Float[Array | np.ndarray, "p 3"] | tuple[Any, Any] | None,
    *,
    steps: int,
    config: FitConfig | None = None,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    checkpoint_every: int = 500,
) -> tuple[GaussianScene, list[dict[str, float]]]:
    """Learns a scene from photographs with known cameras.

    Args:
      images: photographs in [0, 1], all of one size.
      cameras: one each.
      init_points: where Gaussians start: points [P, 3], or points and their colours [P, 3] in [0, 1]; None: at random
        where the cameras look.
      steps: one photograph each.
      config: of the run.
      seed: of the order of photographs, of starting points and of moves.
      folder: for checkpoints and `metrics.jsonl`; a run that was interrupted goes on there, to the same numbers.
      checkpoint_every: steps between checkpoints.

    Returns:
      The scene as numpy arrays, and one entry a hundred steps: step, loss and psnr of the photographs since the last
      entry, live Gaussians, seconds.

    Raises:
      ValueError: images that do not fit the cameras; no steps.
      FloatingPointError: the loss is not finite.
    """
    config = config or FitConfig()
    views, pictures, size = _checked(images, cameras, steps)
    key = jax.random.key(seed)
    extent = scene_extent(cameras)
    start = initial_scene(cameras, init_points, config.count, config.degree, named_key(key, "start"))
    model = GaussianModel(config.count, config.degree)
    optimizer = _optimizer(config, extent, steps)
    fixed = {"model": model, "optimizer": optimizer, "config": config, "steps": steps, "extent": extent, **size}
    params = {name: jnp.asarray(getattr(start, name)) for name in ATTRIBUTES}
    state = FitState(jnp.int32(0), params, optimizer.init(params))
    checkpointer = None if folder is None else Checkpointer(Path(folder) / "checkpoints", keep=1)
    history: list[dict[str, float]] = []
    if checkpointer is not None and checkpointer.latest() is not None:
        state, extra = checkpointer.restore(state)
        history = list(extra["history"])
    rounds = range(math.ceil(steps / len(views)))
    order = np.concatenate([jax.random.permutation(named_key(key, f"round {i}"), len(views)) for i in rounds])
    pairs = first_guess(config.count)
    sums, since, started = np.zeros(2), 0, time.monotonic()
    logger = None if folder is None else MetricsLogger(folder)
    first = int(state.step)
    for step in progress(range(first, steps), "fitting", steps - first):
        i = int(order[step])
        degree = min(config.degree, 4 * step // steps)
        while True:
            new, loss, psnr, needed = _step(
                *(state, views[i], pictures[i], degree, named_key(key, f"step {step}")),
                **fixed,
                max_pairs=pairs,
            )
            if int(needed) <= pairs:
                break
            pairs = enough_for(int(needed))
        if not math.isfinite(float(loss)):
            raise FloatingPointError(f"the loss of step {step} is {float(loss)}")
        state = new
        if config.relocate_every and (step + 1) % config.relocate_every == 0 and step + 1 < 0.9 * steps:
            state = _move(state, named_key(key, f"move {step}"), faint=config.faint)
        sums += float(loss), float(psnr)
        since += 1
        if (step + 1) % 100 == 0 or step + 1 == steps:
            live = float(np.mean(jax.nn.sigmoid(state.params["opacity_logit"]) > config.faint) * config.count)
            entry = {"loss": sums[0] / since, "psnr": sums[1] / since, "live": live}
            entry["seconds"] = time.monotonic() - started
            history.append({"step": step + 1, **entry})
            if logger is not None:
                logger.log(step + 1, entry)
            sums, since = np.zeros(2), 0
        if checkpointer is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
            checkpointer.save(step + 1, state, {"history": history})
    if logger is not None:
        logger.close()
    return checked(GaussianScene(**jax.tree.map(np.asarray, state.params))), history


def _optimizer(config: FitConfig, extent: float, steps: int) -> optax.GradientTransformation:
    falling = optax.exponential_decay(config.means_rate * extent, steps, config.means_decay)
    rates = {
        "means": falling,
        "log_scales": config.scale_rate,
        "quats": config.rotation_rate,
        "opacity_logit": config.opacity_rate,
        "sh0": config.sh0_rate,
        "shN": config.shN_rate,
    }
    groups: dict[Any, Any] = {name: optax.adam(rate, eps=1e-15) for name, rate in rates.items()}
    return optax.multi_transform(groups, {name: name for name in ATTRIBUTES})


@functools.partial(
    jax.jit, static_argnames=("model", "optimizer", "config", "steps", "extent", "max_pairs", "width", "height")
)
def _step(
    state: FitState,
    view: View,
    picture: Array,
    degree: int | Array,
    key: Array,
    *,
    model: GaussianModel,
    optimizer: optax.GradientTransformation,
    config: FitConfig,
    steps: int,
    extent: float,
    max_pairs: int,
    width: int,
    height: int,
) -> tuple[FitState, Array, Array, Array]:
    """One photograph: the new state, loss and PSNR before it, and how many pairs there were."""

    def loss_of(params: dict[str, Array]) -> tuple[Array, tuple[Array, Array]]:
        terms = params["shN"].shape[1]
        used = jnp.arange(terms) < (degree + 1) ** 2 - 1
        shown = {**params, "shN": jnp.where(used[:, None], params["shN"], 0.0)}
        drawn: Any = model.apply({"params": shown}, view, width=width, height=height, max_pairs=max_pairs)
        similar = image_metrics.ssim(drawn.image, picture)
        loss = (1 - config.ssim_weight) * jnp.mean(jnp.abs(drawn.image - picture)) + config.ssim_weight * (1 - similar)
        loss += config.opacity_cost * jnp.mean(jax.nn.sigmoid(params["opacity_logit"]))
        loss += config.scale_cost * jnp.mean(jnp.exp(params["log_scales"]))
        return loss, (image_metrics.psnr(drawn.image, picture), drawn.num_pairs)

    (loss, (psnr, pairs)), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    if config.jitter:
        rate = config.means_rate * extent * config.means_decay ** (state.step / steps)
        faintness = jax.nn.sigmoid(-100 * (jax.nn.sigmoid(params["opacity_logit"]) - config.faint))
        spread = rotations(params["quats"]) * jnp.exp(params["log_scales"])[:, None]
        noise = jax.random.normal(key, params["means"].shape) * (faintness * rate * config.jitter)[:, None]
        params["means"] += jnp.einsum("nij,nkj,nk->ni", spread, spread, noise)
    return FitState(state.step + 1, params, opt_state), loss, psnr, pairs


@functools.partial(jax.jit, static_argnames="faint")
def _move(state: FitState, key: Array, *, faint: float) -> FitState:
    """Idle Gaussians onto others, with empty moments for all that changed."""
    params, changed = relocated(state.params, key, faint)

    def cleared(leaf: Array) -> Array:
        fits = leaf.ndim > 0 and leaf.shape[0] == changed.shape[0]
        return jnp.where(changed.reshape(-1, *[1] * (leaf.ndim - 1)), 0, leaf) if fits else leaf

    return state.replace(params=params, opt_state=jax.tree.map(cleared, state.opt_state))


def _checked(
    images: Sequence[Any], cameras: Sequence[Camera], steps: int
) -> tuple[list[View], list[Array], dict[str, int]]:
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not cameras or len(images) != len(cameras):
        raise ValueError(f"images: expected one a camera, {len(cameras)} of them and at least one, got {len(images)}")
    size = {"width": cameras[0].width, "height": cameras[0].height}
    for i, (image, camera) in enumerate(zip(images, cameras)):
        expected = (size["height"], size["width"], 3)
        if np.shape(image) != expected or (camera.height, camera.width, 3) != expected:
            got = f"{np.shape(image)} for a camera of {camera.width} x {camera.height}"
            raise ValueError(f"images[{i}]: expected shape {expected} for all, got {got}")
        if not np.isfinite(image).all():
            raise ValueError(f"images[{i}]: expected finite numbers")
    return [view_of(camera) for camera in cameras], [jnp.asarray(image, jnp.float32) for image in images], size
