"""Gathers in plain XLA: what a CPU, and any platform without a kernel, really uses."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.token_gather.reference import accumulator


def gather(
    x: Float[Array, "s h"],
    ids: Int[Array, " b"],
    num_valid: Int[Array, ""],
    weights: Float[Array, "s k"] | None = None,
) -> Float[Array, "b h"]:
    """Row i is `x[ids[i]]`; with weights ids are slots: `weights[slot] * x[slot // k]`. Zero from num_valid on."""
    ids, weights = lax.optimization_barrier((ids, weights))
    valid = jnp.arange(ids.shape[0]) < num_valid
    if weights is None:
        rows = rows_of(x, ids)
    else:
        precise = accumulator(x, weights)
        scale = jnp.where(valid, rows_of(weights.reshape(-1), ids), 0).astype(precise)
        rows = rows_of(x, ids // weights.shape[1]).astype(precise) * scale[:, None]
    return jnp.where(valid[:, None], rows, 0).astype(x.dtype)


def sum_choices(
    y: Float[Array, "b h"],
    inv: Int[Array, "s k"],
    num_valid: Int[Array, ""],
    weights: Float[Array, "s k"] | None = None,
) -> Float[Array, "s h"]:
    """Row t is the sum over j of `y[inv[t, j]]`, times `weights[t, j]` if given; slots without a row count as zero."""
    # Behind a barrier: with what made the weights (a sort) fused into it, the loop below is ten times slower on a CPU.
    inv, num_valid, weights = lax.optimization_barrier((inv, num_valid, weights))
    precise = accumulator(y, *(() if weights is None else (weights,)))
    kept = (inv >= 0) & (inv < num_valid)
    total = jnp.zeros((inv.shape[0], y.shape[1]), precise)
    for j in range(inv.shape[1]):  # one fused loop over tokens; [s, k, h] never exists
        part = jnp.where(kept[:, j, None], rows_of(y, inv[:, j]), 0).astype(precise)
        if weights is not None:
            part = part * jnp.where(kept[:, j], weights[:, j], 0).astype(precise)[:, None]
        total = total + part
    return total.astype(y.dtype)


def rows_of(x: Float[Array, "n *width"], ids: Int[Array, " m"]) -> Float[Array, "m *width"]:
    """x[ids] with ids clamped."""
    return x.at[jnp.clip(ids, 0, x.shape[0] - 1)].get(mode="promise_in_bounds")
