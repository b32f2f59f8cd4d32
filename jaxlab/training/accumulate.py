"""Sums over the pieces of a batch, one piece after the other."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def sum_over(function: Callable[[PyTree], PyTree], pieces: PyTree) -> PyTree:
    """The sum of `function(piece)` over the pieces, which are stacked on axis 0, in f32 at least."""
    function = jax.jit(function, inline=True)  # traced once, for its shapes and in the loop
    shapes = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], pieces))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), shapes)

    def body(sums, piece):
        return jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, function(piece)), None

    return jax.lax.scan(body, zeros, pieces)[0]
