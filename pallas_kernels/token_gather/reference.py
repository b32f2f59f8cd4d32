"""The obvious gathers: the specification that every other implementation is held to.

Both directions between tokens and the buffer of their slots, weighted or not; `token_combine` is made of the same two.
"""

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int


def gather(
    x: Float[Array, "s h"],
    ids: Int[Array, " b"],
    num_valid: Int[Array, ""],
    weights: Float[Array, "s k"] | None = None,
) -> Float[Array, "b h"]:
    """Row i is `x[ids[i]]`; with weights ids are slots: `weights[slot] * x[slot // k]`. Zero from num_valid on."""
    valid = jnp.arange(ids.shape[0]) < num_valid
    if weights is None:
        rows = x[jnp.clip(ids, 0, x.shape[0] - 1)]
    else:
        slots = jnp.clip(ids, 0, weights.size - 1)
        precise = accumulator(x, weights)
        rows = x[slots // weights.shape[1]].astype(precise) * weights.reshape(-1)[slots, None].astype(precise)
    return jnp.where(valid[:, None], rows, 0).astype(x.dtype)


def sum_choices(
    y: Float[Array, "b h"],
    inv: Int[Array, "s k"],
    num_valid: Int[Array, ""],
    weights: Float[Array, "s k"] | None = None,
) -> Float[Array, "s h"]:
    """Row t is the sum over j of `y[inv[t, j]]`, times `weights[t, j]` if given; slots without a row count as zero."""
    precise = accumulator(y, *(() if weights is None else (weights,)))
    kept = (inv >= 0) & (inv < num_valid)
    rows = jnp.where(kept[..., None], y[jnp.clip(inv, 0, y.shape[0] - 1)], 0).astype(precise)
    if weights is not None:
        rows = rows * jnp.where(kept, weights, 0).astype(precise)[..., None]
    return jnp.sum(rows, axis=1).astype(y.dtype)


def accumulator(*arrays: Array) -> DTypeLike:
    """Sums are taken in float32, of float64 in float64."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
