"""The training step: AlphaFold3's optimiser, a moving average of the weights, and states that resume exactly."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, PyTree

from jaxlab.core import named_key
from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.features import FEATURES
from jaxlab.megafold.geometry import ArrayLike
from jaxlab.megafold.modules import initial_params
from jaxlab.megafold.objective import LossSettings, objective


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How to train; defaults are AlphaFold3's (supplement, section 5.4).

    Attributes:
      learning_rate: Adam's, after the warm-up (MegaFold's own configuration has 1e-4).
      warmup_steps: updates over which it rises linearly; the first one has a share of it.
      decay_every: updates after which it falls, ...
      decay: ... by this factor.
      b1, b2, eps: Adam's.
      clip_norm: largest global norm of the gradients.
      ema_decay: of the moving average of the weights.
      loss: weights of the losses.
    """

    learning_rate: float = 1.8e-3
    warmup_steps: int = 1000
    decay_every: int = 50_000
    decay: float = 0.95
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 10.0
    ema_decay: float = 0.999
    loss: LossSettings = dataclasses.field(default_factory=LossSettings)

    def __post_init__(self):
        for name in ("learning_rate", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a value >= 0, got {getattr(self, name)}")
        for name in ("decay_every", "decay", "eps", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a value > 0, got {getattr(self, name)}")
        for name in ("b1", "b2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a value in [0, 1), got {getattr(self, name)}")


@struct.dataclass
class TrainState:
    """Everything a run needs to go on; a pytree for `core.Checkpointer`.

    Attributes:
      step: updates made, int32 scalar.
      params: weights, f32.
      ema_params: their moving average, which is what to fold with.
      opt_state: Adam's moments.
      config: of the network. Static.
      settings: of the training. Static.
    """

    step: Any
    params: Any
    ema_params: Any
    opt_state: Any
    config: AF3Config = struct.field(pytree_node=False)
    settings: TrainSettings = struct.field(pytree_node=False)


def learning_rate(settings: TrainSettings, step: Any) -> Float[Array, ""]:
    """Of the update that follows `step` others."""
    warmup = jnp.minimum((jnp.asarray(step) + 1) / max(settings.warmup_steps, 1), 1.0)
    return settings.learning_rate * warmup * settings.decay ** (jnp.asarray(step) // settings.decay_every)


def optimizer(settings: TrainSettings) -> optax.GradientTransformation:
    """Adam behind a clip by global norm."""
    adam = optax.adam(lambda step: learning_rate(settings, step), b1=settings.b1, b2=settings.b2, eps=settings.eps)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adam)


def create_train_state(
    config: AF3Config, key: Array, batch: Mapping[str, ArrayLike], *, settings: TrainSettings | None = None
) -> TrainState:
    """The state before the first update. The batch is checked, and decides nothing.

    Raises:
      ValueError: A feature is missing, or its shape does not fit the others.
    """
    check_batch(batch)
    settings = TrainSettings() if settings is None else settings
    params = initial_params(config, named_key(key, "params"))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer(settings).init(params),
        config=config,
        settings=settings,
    )


def train_step(
    state: TrainState, batch: Mapping[str, ArrayLike], key: Array
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One update; compiled at the first call for a configuration and sizes.

    The same state, batch and key give the same bits. The old state stays valid; to give its memory to the new one, as
    large networks need, compile with it donated: `jax.jit(train_step, donate_argnums=0)`.

    Args:
      state: of `create_train_state`, or restored.
      batch: features, each with a leading axis of B, host or device arrays.
      key: of everything random in this step; every step wants a new one.

    Returns:
      The new state, and f32 scalars: `loss`, its parts without their weights (`objective`), `grad_norm` before
      clipping, and `lr`.

    Raises:
      ValueError: A feature is missing, or its shape does not fit the others.
    """
    check_batch(batch)
    return _train_step(state, dict(batch), key)


@jax.jit
def _train_step(state: TrainState, batch: dict[str, ArrayLike], key: Array) -> tuple[TrainState, dict[str, Array]]:
    settings = state.settings

    def loss(params: PyTree):
        return objective(params, batch, key, config=state.config, settings=settings.loss)

    (value, parts), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimizer(settings).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = parts | {
        "loss": value,
        "grad_norm": optax.tree.norm(grads),
        "lr": learning_rate(settings, state.step),
    }
    ema_params = optax.incremental_update(params, state.ema_params, 1 - settings.ema_decay)
    new = dataclasses.replace(state, step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state)
    return new, metrics


def check_batch(batch: Mapping[str, ArrayLike]) -> None:
    """Holds a batch to `FEATURES`: all there, with a leading axis, of sizes that agree.

    Raises:
      ValueError: One is not; the message names it.
    """
    missing = [name for name in FEATURES if name not in batch]
    if missing:
        raise ValueError(f"batch: expected all features, got none named {missing[0]!r} ({len(missing)} are missing)")
    size: dict[str, int] = {}
    for name, feature in FEATURES.items():
        shape, axes = batch[name].shape, ("B", *feature.axes)
        if len(shape) == len(axes):
            for axis, length in zip(axes, shape):
                if isinstance(axis, str):
                    size.setdefault(axis, length)
        expected = tuple(size.get(axis, axis) if isinstance(axis, str) else axis for axis in axes)
        if shape != expected:
            raise ValueError(f"batch[{name!r}]: expected shape {list(expected)}, got {list(shape)}")
