"""The obvious grouped matrix product: the specification that every other implementation is held to."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from pallas_kernels.dispatch import zeros_alike


def rows_times_weights(
    rows: Float[Array, "m k"],
    weights: Float[Array, "g k n"] | Float[Array, "g n k"],
    group_sizes: Int[Array, " g"],
    *,
    transpose: bool,
    dtype: DTypeLike,
) -> Float[Array, "m n"]:
    """Row i of group g gives `rows[i] @ weights[g]` (`weights[g].T` with `transpose`); rows of no group give zero."""
    weights = jnp.swapaxes(weights, 1, 2) if transpose else weights
    groups, _, n = weights.shape
    precise = jnp.promote_types(jnp.promote_types(rows.dtype, weights.dtype), jnp.float32)
    owner = owners(group_sizes, rows.shape[0])[:, None]
    rows = jnp.where(owner < groups, rows, 0).astype(precise)

    def add_group(out, group):
        index, matrix = group
        product = jnp.dot(rows, matrix.astype(precise), precision=jax.lax.Precision.HIGHEST)
        return jnp.where(owner == index, product, out), None

    start = zeros_alike((rows.shape[0], n), precise, rows)
    return jax.lax.scan(add_group, start, (jnp.arange(groups), weights))[0].astype(dtype)


def weights_gradient(
    rows: Float[Array, "m k"],
    grads: Float[Array, "m n"],
    group_sizes: Int[Array, " g"],
    *,
    dtype: DTypeLike,
) -> Float[Array, "g k n"]:
    """Group g gives `rows[of g].T @ grads[of g]`; an empty group gives zero."""
    precise = jnp.promote_types(jnp.promote_types(rows.dtype, grads.dtype), jnp.float32)
    owner = owners(group_sizes, rows.shape[0])[:, None]

    def one_group(index):
        own = owner == index
        left, right = (jnp.where(own, x, 0).astype(precise) for x in (rows, grads))
        return jnp.dot(left.T, right, precision=jax.lax.Precision.HIGHEST)

    return jax.lax.map(one_group, jnp.arange(group_sizes.shape[0])).astype(dtype)


def owners(group_sizes: Int[Array, " g"], m: int) -> Int[Array, " m"]:
    """The group of each of m rows; rows past the last group have the number of groups."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(m), side="right")
