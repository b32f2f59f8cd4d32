"""The statistics in plain XLA: sums of blocks, then the sum of those; elements are looked at only where it is odd."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

# Elements summed by one loop: enough for a core to be busy, and few enough for rounding errors to stay small.
_BLOCK = 8192


def stats(g: Float[Array, " n"]) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """Sum of squares in float32, and whether all elements are finite."""
    squares = jnp.square(g.astype(jnp.float32))
    whole = g.shape[0] // _BLOCK * _BLOCK
    total = jnp.sum(squares[whole:])
    if whole:
        total += jnp.sum(jnp.sum(squares[:whole].reshape(-1, _BLOCK), axis=1))
    # Where the sum is finite every element is: a second pass is rare. (XLA would make two of the two reductions.)
    finite = lax.cond(jnp.isfinite(total), lambda _: jnp.bool_(True), lambda g: jnp.all(jnp.isfinite(g)), g)
    return total, finite
