"""Grouped matrix products in plain XLA: what a CPU, and any platform without a kernel, really uses.

A loop over the groups, and inside it one over tiles of the group's rows. Tiles start where their group starts, so no
row is copied, padded or permuted beforehand; a last tile hangs over into the next group, where its rows are masked.
Nothing larger than a tile is ever a temporary, and there is no gather and no scatter. (Measured against the
alternatives on a CPU: a batched product over padded groups, one loop over all tiles, tiles gathered beforehand.)
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int

from pallas_kernels.dispatch import zeros_alike

# Tiles of fewer rows pay more for the loop than for the product; more rows are not faster.
_MIN_ROWS, _MAX_ROWS = 32, 256


def rows_times_weights(
    rows: Float[Array, "m k"],
    weights: Float[Array, "g k n"] | Float[Array, "g n k"],
    group_sizes: Int[Array, " g"],
    *,
    transpose: bool,
    dtype: DTypeLike,
) -> Float[Array, "m n"]:
    """Row i of group g gives `rows[i] @ weights[g]` (`weights[g].T` with `transpose`); rows of no group give zero."""
    m, groups = rows.shape[0], weights.shape[0]
    n = weights.shape[1 if transpose else 2]
    tile = _tile_rows(m, groups)
    contract = (((1,), (1 if transpose else 0,)), ((), ()))
    accumulate = _accumulator(rows, weights)

    def group(g, out):
        # Cast here and not in the product: a CPU multiplies in float32 anyway, and this way at full speed.
        matrix = lax.dynamic_index_in_dim(weights, g, keepdims=False).astype(accumulate)

        def add_tile(at, own, out):
            part = lax.dynamic_slice_in_dim(rows, at, tile).astype(accumulate)
            part = lax.dot_general(part, matrix, contract).astype(dtype)
            before = lax.dynamic_slice_in_dim(out, at, tile)
            return lax.dynamic_update_slice_in_dim(out, jnp.where(own, part, before), at, 0)

        return _over_tiles(starts[g], ends[g], m, tile, add_tile, out)

    starts, ends = _bounds(group_sizes)
    return lax.fori_loop(0, groups, group, zeros_alike((m, n), dtype, rows))


def weights_gradient(
    rows: Float[Array, "m k"],
    grads: Float[Array, "m n"],
    group_sizes: Int[Array, " g"],
    *,
    dtype: DTypeLike,
) -> Float[Array, "g k n"]:
    """Group g gives `rows[of g].T @ grads[of g]`; an empty group gives zero."""
    (m, k), n, groups = rows.shape, grads.shape[1], group_sizes.shape[0]
    tile = _tile_rows(m, groups)
    accumulate = _accumulator(rows, grads)

    def group(g, out):
        def add_tile(at, own, total):
            # Both sides are masked: what a foreign row holds may be NaN.
            left, right = (
                jnp.where(own, lax.dynamic_slice_in_dim(x, at, tile), 0).astype(accumulate) for x in (rows, grads)
            )
            return total + lax.dot_general(left, right, (((0,), (0,)), ((), ())))

        total = _over_tiles(starts[g], ends[g], m, tile, add_tile, zeros_alike((k, n), accumulate, rows))
        return lax.dynamic_update_index_in_dim(out, total.astype(dtype), g, 0)

    starts, ends = _bounds(group_sizes)
    return lax.fori_loop(0, groups, group, zeros_alike((groups, k, n), dtype, rows))


def _over_tiles(start, end, m, tile, step, carry):
    """Folds `step(at, own, carry)` over the tiles of the rows [start, end); `own[tile, 1]` marks rows of the range.

    A tile that would hang over the end of the array is moved back; rows done twice are masked the second time.
    """
    offsets = jnp.arange(tile, dtype=jnp.int32)[:, None]

    def body(state):
        first, carry = state
        at = jnp.minimum(first, m - tile)
        return first + tile, step(at, (offsets >= first - at) & (offsets < end - at), carry)

    return lax.while_loop(lambda state: state[0] < end, body, (start, carry))[1]


def _bounds(group_sizes):
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    return ends - group_sizes, ends


def _tile_rows(m: int, groups: int) -> int:
    """The power of two at or above three quarters of a mean group: most groups take one or two tiles."""
    share = max(1, 3 * m // (4 * groups))
    return min(m, max(_MIN_ROWS, min(_MAX_ROWS, 1 << (share - 1).bit_length())))


def _accumulator(*arrays):
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
