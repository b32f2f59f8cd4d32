"""The scalars of one Adam step, computed once for all elements and handed to every implementation alike."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

MODES = ("adamw", "adam")


class Coefficients(NamedTuple):
    """f32 scalars of one step; `rest` is one minus the beta before it.

    Attributes:
      factor: multiplies the gradient (inverse loss scale, times the clipping coefficient).
      b1: decay of the first moment.
      rest1: 1 - b1.
      b2: decay of the second moment.
      rest2: 1 - b2.
      eps: added to the denominator.
      decay: lr * weight decay (AdamW), or weight decay (Adam: L2, added to the gradient).
      step: lr / (1 - b1^t), or lr without bias correction.
      root: 1 / sqrt(1 - b2^t), or 1.
    """

    factor: Array
    b1: Array
    rest1: Array
    b2: Array
    rest2: Array
    eps: Array
    decay: Array
    step: Array
    root: Array


def coefficients(
    *,
    count: Any,
    lr: Any,
    b1: Any,
    b2: Any,
    eps: Any,
    weight_decay: Any,
    scale: Any,
    mode: str,
    bias_correction: bool,
) -> Coefficients:
    """The scalars of step `count + 1`; arguments as for `fused_adam`."""
    lr, b1, b2, eps, weight_decay, scale = (jnp.asarray(x, jnp.float32) for x in (lr, b1, b2, eps, weight_decay, scale))
    step, root = lr, jnp.ones((), jnp.float32)
    if bias_correction:
        zero, t = runtime_zero(count), (jnp.asarray(count, jnp.int32) + 1).astype(jnp.float32)
        step = lr / (1 - b1**t)
        root = 1 / rounded(jnp.sqrt(1 - b2**t), zero)  # the compiler's reciprocal root has other bits
    decay = lr * weight_decay if mode == "adamw" else weight_decay
    return Coefficients(scale, b1, 1 - b1, b2, 1 - b2, eps, decay, step, root)


def runtime_zero(count: Any) -> Int[Array, ""]:
    """An int32 zero that the compiler takes for a variable: a count of steps is never negative."""
    return jnp.minimum(jnp.asarray(count, jnp.int32), 0)


def rounded(x: Float[Array, "..."], zero: Int[Array, ""]) -> Float[Array, "..."]:
    """`x` itself, rounded to float32 before it is used: the bits pass through an integer operation.

    Compilers contract a product and a sum into one fused operation where it suits them, differently in a loop's body
    and tail, or in two programs. What is `rounded` has the same bits everywhere.
    """
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) ^ zero, jnp.float32)


def check_hyper(**values: Any) -> None:
    """Checks what is known of the hyper-parameters; traced values, and None, pass.

    Raises:
      ValueError: a beta outside [0, 1), `eps` not positive, a negative `lr`, `weight_decay` or `count`, another mode.
      NotImplementedError: mode "amsgrad".
    """
    for name, value in values.items():
        if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
            value = np.asarray(value)  # a comparison by JAX would be traced where something else is
        if name == "mode":
            if value == "amsgrad":
                raise NotImplementedError("mode: 'amsgrad' is not implemented; expected one of: 'adamw', 'adam'")
            if value not in MODES:
                raise ValueError(f"mode: expected one of {MODES}, got {value!r}")
        elif value is None or isinstance(value, jax.core.Tracer):
            continue
        elif name in ("b1", "b2"):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected a value in [0, 1), got {value}")
        elif name == "eps":
            if not value > 0:
                raise ValueError(f"eps: expected a value > 0, got {value}")
        elif not value >= 0:
            raise ValueError(f"{name}: expected a value >= 0, got {value}")
