"""The obvious gradient of the weights; the sum and the gradient of its rows are `token_gather`'s two gathers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.token_gather.reference import accumulator


def row_dots(
    y: Float[Array, "b h"], tokens: Float[Array, "s h"], inv: Int[Array, "s k"], num_valid: Int[Array, ""]
) -> Float[Array, "s k"]:
    """Entry (t, j) is the dot product of `y[inv[t, j]]` and `tokens[t]`, float32; zero where the slot has no row."""
    precise = accumulator(y, tokens)
    kept = (inv >= 0) & (inv < num_valid)
    rows = jnp.where(kept[..., None], y[jnp.clip(inv, 0, y.shape[0] - 1)], 0).astype(precise)
    return jnp.einsum("skh,sh->sk", rows, tokens.astype(precise), precision=jax.lax.Precision.HIGHEST)
