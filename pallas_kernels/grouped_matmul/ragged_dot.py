"""JAX's own `lax.ragged_dot`, for comparison: it multiplies densely with masks on most platforms."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int

from pallas_kernels.grouped_matmul.reference import owners

# Rows and gradients both give the ragged dimension, which is summed over.
_OVER_ROWS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


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
    common = jnp.promote_types(rows.dtype, weights.dtype)
    out = lax.ragged_dot(rows.astype(common), weights.astype(common), group_sizes, preferred_element_type=dtype)
    return jnp.where(_owned(group_sizes, rows), out, 0)


def weights_gradient(
    rows: Float[Array, "m k"],
    grads: Float[Array, "m n"],
    group_sizes: Int[Array, " g"],
    *,
    dtype: DTypeLike,
) -> Float[Array, "g k n"]:
    """Group g gives `rows[of g].T @ grads[of g]`; an empty group gives zero."""
    common = jnp.promote_types(rows.dtype, grads.dtype)
    owned = _owned(group_sizes, rows)
    rows, grads = (jnp.where(owned, x, 0).astype(common) for x in (rows, grads))
    return lax.ragged_dot_general(rows, grads, group_sizes, _OVER_ROWS, preferred_element_type=dtype)


def _owned(group_sizes: Int[Array, " g"], rows: Float[Array, "m k"]) -> Array:
    return owners(group_sizes, rows.shape[0])[:, None] < group_sizes.shape[0]
