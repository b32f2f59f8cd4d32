"""The step as it is written in the docstring of `fused_adam`."""

from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.fused_adam.coefficients import Coefficients


def step(
    p: Float[Array, " n"],
    m: Float[Array, " n"],
    v: Float[Array, " n"],
    g: Float[Array, " n"],
    scalars: Float[Array, "9"],
    zero: Int[Array, ""],
    *,
    decoupled: bool,
    emit: jnp.dtype | None,
) -> tuple[Float[Array, " n"], ...]:
    """New p, m, v, and the copy if `emit`; `zero` is not needed, for the compiler may contract here."""
    del zero
    new = formula(p, m, v, g, scalars, decoupled=decoupled)
    return new if emit is None else (*new, new[0].astype(emit))


def formula(
    p: Array, m: Array, v: Array, g: Array, scalars: Iterable[Array], *, decoupled: bool
) -> tuple[Array, Array, Array]:
    """New p, m and v of some elements."""
    c = Coefficients(*scalars)
    g = g.astype(jnp.float32) * c.factor
    g = g if decoupled else g + c.decay * p
    m = c.b1 * m + c.rest1 * g
    v = c.b2 * v + c.rest2 * (g * g)
    p = p - c.decay * p if decoupled else p
    return p - c.step * (m / (jnp.sqrt(v) * c.root + c.eps)), m, v
