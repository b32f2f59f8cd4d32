"""Superchip-aware casting: on which side of the link a bucket changes its dtype (paper, section on casting)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

SIDES = ("gpu", "cpu")


def cast_bucket(x: Float[Array, " n"], dtype: DTypeLike, *, where: Literal["gpu", "cpu"] = "gpu") -> Float[Array, " n"]:
    """`x` in another dtype, cast on the accelerator or on the host; both give the same bits (round to nearest, even).

    "gpu" casts on the accelerator: gradients cross the link as float32, or parameters as float32 that become 16 bits
    there, which is faster on a fast link. "cpu" casts on the host: 16 bits cross the link, which is faster over PCIe.
    Outside `jit` x is moved there first, and the result stays; under `jit` it is cast where the program runs. From
    65520 on float16 is infinite.

    Args:
      x: floating.
      dtype: floating.
      where: "gpu" (the default device where there is no GPU) or "cpu".

    Raises:
      ValueError: another place.
      TypeError: x or dtype not floating.
    """
    if where not in SIDES:
        raise ValueError(f"where: expected one of {SIDES}, got {where!r}")
    x = jnp.asarray(x)
    for name, found in (("x", x.dtype), ("dtype", jnp.dtype(dtype))):
        if not jnp.issubdtype(found, jnp.floating):
            raise TypeError(f"{name} must be floating, got {found}")
    if not isinstance(x, jax.core.Tracer):
        x = jax.device_put(x, jax.devices()[0] if where == "gpu" else jax.devices("cpu")[0])
    return x.astype(dtype)
