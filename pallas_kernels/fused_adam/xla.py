"""The step in plain XLA: three fused loops, whose products are `rounded`, so that its bits depend on nothing else."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.fused_adam.coefficients import Coefficients, rounded


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
    """New p, m, v, and the copy if `emit`."""
    c = Coefficients(*scalars)

    def times(x: Array, y: Array) -> Array:
        return rounded(x * y, zero)

    g = times(g.astype(jnp.float32), c.factor)
    g = g if decoupled else g + times(c.decay, p)
    m = times(c.b1, m) + times(c.rest1, g)
    v = times(c.b2, v) + times(c.rest2, times(g, g))
    p = p - times(c.decay, p) if decoupled else p
    p = p - times(c.step, m / (times(jnp.sqrt(v), c.root) + c.eps))
    return (p, m, v) if emit is None else (p, m, v, p.astype(emit))
