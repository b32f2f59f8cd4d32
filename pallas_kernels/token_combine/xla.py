"""The gradient of the weights in plain XLA; the sum and the gradient of its rows are `token_gather`'s two gathers."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.token_gather.reference import accumulator
from pallas_kernels.token_gather.xla import rows_of


def row_dots(
    y: Float[Array, "b h"], tokens: Float[Array, "s h"], inv: Int[Array, "s k"], num_valid: Int[Array, ""]
) -> Float[Array, "s k"]:
    """Entry (t, j) is the dot product of `y[inv[t, j]]` and `tokens[t]`, float32; zero where the slot has no row."""
    inv = lax.optimization_barrier(inv)
    precise = accumulator(y, tokens)
    tokens = tokens.astype(precise)
    # One column after the other: each is one fused loop over tokens, and [s, k, h] never exists.
    dots = [jnp.sum(rows_of(y, inv[:, j]).astype(precise) * tokens, axis=1) for j in range(inv.shape[1])]
    return jnp.where((inv >= 0) & (inv < num_valid), jnp.stack(dots, axis=1), 0)
