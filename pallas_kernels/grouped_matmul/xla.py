"""Grouped matrix products in plain XLA: what a CPU, and any platform without a kernel, really uses.

One loop over tiles of rows; a tile never crosses the end of its group. Tiles start where their group or the tile before
ended, so no row is copied, padded or permuted beforehand; what hangs over is masked when it is stored. How many rows a
tile really multiplies is chosen from a few sizes by what is left of the group, so little is computed in vain. Nothing
larger than a tile is ever a temporary, and there is no gather and no scatter. (Measured against the alternatives on a
CPU: a batched product over padded groups, loops over equal tiles, tiles gathered beforehand.)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int

from pallas_kernels.dispatch import zeros_alike
from pallas_kernels.grouped_matmul.gating import activate, gate_gradients

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
    m, n = rows.shape[0], weights.shape[1 if transpose else 2]
    contract = (((1,), (1 if transpose else 0,)), ((), ()))
    precise = _accumulator(rows, weights)

    def compute(tile):
        # Cast here and not in the product: a CPU multiplies in float32 anyway, and this way at full speed.
        matrix = tile.matrix(weights).astype(precise)
        return tile.tall(lax.dot_general(tile.rows(rows).astype(precise), matrix, contract).astype(dtype))

    return _over_tiles(m, group_sizes, compute, _put, zeros_alike((m, n), dtype, rows))


def weights_gradient(
    rows: Float[Array, "m k"],
    grads: Float[Array, "m n"],
    group_sizes: Int[Array, " g"],
    *,
    dtype: DTypeLike,
) -> Float[Array, "g k n"]:
    """Group g gives `rows[of g].T @ grads[of g]`; an empty group gives zero."""
    (m, k), n, groups = rows.shape, grads.shape[1], group_sizes.shape[0]
    precise = _accumulator(rows, grads)

    def compute(tile):
        return _rows_transposed_times(*(tile.own_rows(x).astype(precise) for x in (rows, grads)))

    def store(tile, part, out):
        return tile.add(out, part)

    return _over_tiles(m, group_sizes, compute, store, zeros_alike((groups, k, n), precise, rows)).astype(dtype)


def gated(
    rows: Float[Array, "m k"],
    gate: Float[Array, "g k n"],
    up: Float[Array, "g k n"],
    group_sizes: Int[Array, " g"],
    *,
    act: str,
    dtype: DTypeLike,
) -> Float[Array, "m n"]:
    """Row i of group g gives `act(rows[i] @ gate[g]) * (rows[i] @ up[g])`; rows of no group give zero."""
    m, n = rows.shape[0], gate.shape[2]
    precise = _accumulator(rows, gate, up)

    def compute(tile):
        z, u = jnp.split(tile.rows(rows).astype(precise) @ tile.both(gate, up, precise), 2, axis=1)
        return tile.tall((activate(z, act) * u).astype(dtype))

    return _over_tiles(m, group_sizes, compute, _put, zeros_alike((m, n), dtype, rows))


def gated_gradients(
    rows: Float[Array, "m k"],
    gate: Float[Array, "g k n"],
    up: Float[Array, "g k n"],
    group_sizes: Int[Array, " g"],
    grads: Float[Array, "m n"],
    *,
    act: str,
) -> tuple[Float[Array, "m k"], Float[Array, "g k n"], Float[Array, "g k n"]]:
    """Gradients of `gated` in rows, gate and up; both products are computed again, a tile at a time."""
    precise = _accumulator(rows, gate, up, grads)

    def compute(tile):
        # Masked on both sides: what a foreign row holds may be NaN.
        left, matrices = tile.own_rows(rows).astype(precise), tile.both(gate, up, precise)
        z, u = jnp.split(left @ matrices, 2, axis=1)
        d_products = jnp.concatenate(gate_gradients(z, u, tile.own_rows(grads).astype(precise), act)[1:], axis=1)
        d_rows = lax.dot_general(d_products, matrices, (((1,), (1,)), ((), ())))
        return tile.tall(d_rows.astype(rows.dtype)), _rows_transposed_times(left, d_products)

    def store(tile, parts, out):
        d_rows, d_gate, d_up = out
        gate_part, up_part = jnp.split(parts[1], 2, axis=1)
        return tile.put(d_rows, parts[0]), tile.add(d_gate, gate_part), tile.add(d_up, up_part)

    start = (zeros_alike(rows.shape, rows.dtype, rows), *(zeros_alike(gate.shape, precise, rows) for _ in range(2)))
    d_rows, d_gate, d_up = _over_tiles(rows.shape[0], group_sizes, compute, store, start)
    return d_rows, d_gate.astype(gate.dtype), d_up.astype(up.dtype)


def _put(tile, part, out):
    return tile.put(out, part)


class _Tile:
    """Rows [at, at + height) of the arrays, of which [first, end) belong to the tile's group."""

    def __init__(self, group, at, first, end, height, tallest):
        self.group, self.at, self.height, self.tallest = group, at, height, tallest
        self._first, self._end = first - at, end - at

    def _own(self, height):
        offsets = jnp.arange(height, dtype=jnp.int32)[:, None]
        return (offsets >= self._first) & (offsets < self._end)

    def rows(self, array: Array) -> Array:
        return lax.dynamic_slice_in_dim(array, self.at, self.height)

    def own_rows(self, array: Array) -> Array:
        return jnp.where(self._own(self.height), self.rows(array), 0)

    def tall(self, part: Array) -> Array:
        return jnp.pad(part, ((0, self.tallest - self.height), (0, 0)))

    def matrix(self, weights: Array) -> Array:
        return lax.dynamic_index_in_dim(weights, self.group, keepdims=False)

    def both(self, gate: Array, up: Array, dtype: DTypeLike) -> Array:
        """One product of twice the width packs the rows once."""
        return jnp.concatenate([self.matrix(gate).astype(dtype), self.matrix(up).astype(dtype)], axis=1)

    def put(self, out: Array, part: Array) -> Array:
        before = lax.dynamic_slice_in_dim(out, self.at, self.tallest)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(self._own(self.tallest), part, before), self.at, 0)

    def add(self, out: Array, part: Array) -> Array:
        return lax.dynamic_update_index_in_dim(out, self.matrix(out) + part, self.group, 0)


def _over_tiles(
    m: int, group_sizes: Int[Array, " g"], compute: Callable[..., Any], store: Callable[..., Any], out: Any
) -> Any:
    """Folds `store(tile, compute(tile), out)` over the tiles of all groups.

    `compute` sees a tile of the height that it needs, one of a few, and makes its rows `tall`; `store` sees the tallest
    (it lies outside the switch, or XLA would copy `out`).
    """
    heights = _tile_heights(m, group_sizes.shape[0])
    tallest = heights[-1]
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)

    def computed(height, *place):
        return compute(_Tile(*place, height, tallest))

    branches = [functools.partial(computed, height) for height in heights]

    def body(state):
        group, first, out = state
        group = lax.while_loop(lambda g: ends[g] <= first, lambda g: g + 1, group)  # past empty groups
        end = ends[group]
        # A tile that would hang over the end of the arrays is moved back and takes the full height; rows that then
        # belong to others are masked.
        at = jnp.minimum(first, m - tallest)
        choice = sum((end - at > height).astype(jnp.int32) for height in heights[:-1])
        place = (group, at, first, end)
        parts = lax.switch(choice, branches, *place) if len(branches) > 1 else branches[0](*place)
        out = store(_Tile(*place, tallest, tallest), parts, out)
        return group, jnp.minimum(at + tallest, end), out

    return lax.while_loop(lambda state: state[1] < ends[-1], body, (*_start(ends), out))[2]


def _start(ends):
    zero = ends[0] * 0  # varies over the mesh axes over which the sizes do
    return zero, zero


def _rows_transposed_times(left, right):
    # Transposed beforehand: XLA's CPU library multiplies only what is contracted along its last axis.
    return lax.optimization_barrier(left.T) @ right


def _tile_heights(m: int, groups: int) -> tuple[int, ...]:
    """Quarters of the power of two at or above three quarters of a mean group: most groups take one or two tiles."""
    share = max(1, 3 * m // (4 * groups))
    tallest = min(m, max(_MIN_ROWS, min(_MAX_ROWS, 1 << (share - 1).bit_length())))
    return tuple(sorted({max(min(_MIN_ROWS, tallest), tallest * quarter // 4) for quarter in (1, 2, 3, 4)}))


def _accumulator(*arrays):
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
