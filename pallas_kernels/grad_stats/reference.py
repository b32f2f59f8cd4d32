"""The statistics as they are defined."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def stats(g: Float[Array, " n"]) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """Sum of squares in float32, and whether all elements are finite."""
    return jnp.sum(jnp.square(g.astype(jnp.float32))), jnp.all(jnp.isfinite(g))
