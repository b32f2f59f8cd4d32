"""Dynamic loss scaling for float16, with the semantics of DeepSpeed's scaler."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@dataclasses.dataclass(frozen=True)
class LossScaleConfig:
    """When the scale moves; defaults are those of the artifact's training runs.

    Attributes:
      init_scale: first scale.
      window: steps without overflow after which it doubles.
      hysteresis: overflows in a row of steps that it takes to halve it.
      consecutive_hysteresis: every step without overflow, not only a doubling, makes it take as many again.
      min_scale: it does not fall below.
      raise_at_min: an overflow there is an error.
    """

    init_scale: int | float = 4096.0
    window: int = 50
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    min_scale: int | float = 1.0
    raise_at_min: bool = False

    def __post_init__(self):
        if not self.min_scale > 0:
            raise ValueError(f"min_scale: expected a value > 0, got {self.min_scale}")
        if not self.init_scale >= self.min_scale:
            raise ValueError(f"init_scale: expected a value >= min_scale ({self.min_scale}), got {self.init_scale}")
        for name in ("window", "hysteresis"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a value >= 1, got {getattr(self, name)}")


@struct.dataclass
class LossScaleState:
    """The scaler between two steps.

    Attributes:
      scale: f32 scalar, multiplies the loss.
      left: int32, overflows until it is halved.
      iteration: int32, steps tried.
      last_overflow: int32, the last one that overflowed, -1 for none.
    """

    scale: Any
    left: Any
    iteration: Any
    last_overflow: Any


def init_loss_scale(config: LossScaleConfig) -> LossScaleState:
    """The scaler before the first step."""
    integers = (jnp.asarray(x, jnp.int32) for x in (config.hysteresis, 0, -1))
    return LossScaleState(jnp.asarray(config.init_scale, jnp.float32), *integers)


def update_loss_scale(state: LossScaleState, overflow: Any, config: LossScaleConfig) -> LossScaleState:
    """The scaler after a step; jit-able.

    Args:
      state: before it.
      overflow: bool, whether its gradients were not finite.
      config: of the scaler.

    Raises:
      RuntimeError: an overflow at `min_scale`, with `raise_at_min` and outside `jit`.
    """
    overflow = jnp.asarray(overflow, bool)
    halve = overflow & (state.left <= 1)
    if config.raise_at_min and not isinstance(halve, jax.core.Tracer):
        at_min = np.asarray(halve & (state.scale <= config.min_scale))
        if at_min:
            raise RuntimeError(f"gradients overflow at the smallest loss scale, {config.min_scale}: training diverges")
    stable = state.iteration - state.last_overflow - 1
    double = ~overflow & (stable > 0) & (stable % config.window == 0)
    halved = jnp.maximum(state.scale / 2, config.min_scale)
    restore = ~overflow if config.consecutive_hysteresis else double
    left = jnp.where(restore, config.hysteresis, state.left - (overflow & ~halve))
    return LossScaleState(
        jnp.where(halve, halved, jnp.where(double, state.scale * 2, state.scale)),
        left.astype(jnp.int32),
        state.iteration + 1,
        jnp.where(overflow, state.iteration, state.last_overflow),
    )
