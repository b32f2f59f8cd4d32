"""Grouped matrix products in plain XLA: what a CPU, and any platform without a kernel, really uses.

A loop over the groups, most of which are one tile of rows; the others are finished in a second loop. Tiles start where
their group or the tile before ended, so no row is copied, padded or permuted beforehand; what hangs over is masked when
it is stored. How many rows a tile really multiplies is chosen from a few heights, so little is computed in vain.
Nothing larger than a tile is ever a temporary, and nothing is gathered or scattered. (Measured against others on a CPU:
a batched product over padded groups, loops over equal tiles, tiles gathered beforehand.)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from pallas_kernels.dispatch import zeros_alike
from pallas_kernels.grouped_matmul.gating import activate, gate_gradients

# Tiles of fewer rows pay more for the loop than for the product; more rows are not faster.
_MIN_ROWS, _MAX_ROWS, _MIN_STEP, _FEW_ROWS = 32, 512, 16, 4


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
        left, right = (tile.own_rows(x).astype(precise) for x in (rows, grads))
        return _transposed(left) @ right

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

    def compute(tile):
        z, u = tile.products(rows, gate, up)
        return tile.tall((activate(z, act) * u).astype(dtype))

    return _over_tiles(m, group_sizes, compute, _put, zeros_alike((m, n), dtype, rows))


def products(
    rows: Float[Array, "m k"],
    gate: Float[Array, "g k n"],
    up: Float[Array, "g k n"],
    group_sizes: Int[Array, " g"],
    *,
    dtype: DTypeLike,
) -> tuple[Float[Array, "m n"], Float[Array, "m n"]]:
    """Row i of group g gives `rows[i] @ gate[g]` and `rows[i] @ up[g]`; rows of no group give zeros."""
    m, n = rows.shape[0], gate.shape[2]

    def compute(tile):
        return tuple(tile.tall(part.astype(dtype)) for part in tile.products(rows, gate, up))

    def store(tile, parts, out):
        return tuple(map(tile.put, out, parts))

    return _over_tiles(m, group_sizes, compute, store, tuple(zeros_alike((m, n), dtype, rows) for _ in range(2)))


def gated_gradients(
    rows: Float[Array, "m k"],
    gate: Float[Array, "g k n"],
    up: Float[Array, "g k n"],
    group_sizes: Int[Array, " g"],
    z: Float[Array, "m n"],
    u: Float[Array, "m n"],
    grads: Float[Array, "m n"],
    *,
    act: str,
) -> tuple[Float[Array, "m k"], Float[Array, "g k n"], Float[Array, "g k n"]]:
    """Gradients of `gated` in rows, gate and up, given its two products."""
    precise = _accumulator(rows, gate, up)
    transposed = (((1,), (1,)), ((), ()))

    def compute(tile):
        # Masked on both sides: what a foreign row holds may be NaN.
        left, *factors = (tile.own_rows(x).astype(precise) for x in (rows, z, u, grads))
        d_z, d_u = gate_gradients(factors[0], factors[1], factors[2], act)
        d_rows = lax.dot_general(d_z, tile.matrix(gate).astype(precise), transposed)
        d_rows += lax.dot_general(d_u, tile.matrix(up).astype(precise), transposed)
        left = _transposed(left)
        return tile.tall(d_rows.astype(rows.dtype)), left @ d_z, left @ d_u

    def store(tile, parts, out):
        (d_rows, *d_weights), (part, *weights_parts) = out, parts
        return tile.put(d_rows, part), *map(tile.add, d_weights, weights_parts)

    start = (zeros_alike(rows.shape, rows.dtype, rows), *(zeros_alike(gate.shape, precise, rows) for _ in range(2)))
    d_rows, d_gate, d_up = _over_tiles(rows.shape[0], group_sizes, compute, store, start)
    return d_rows, d_gate.astype(gate.dtype), d_up.astype(up.dtype)


def _put(tile, part, out):
    return tile.put(out, part)


class _Tile:
    """Rows [at, at + height) of the arrays, of which [first, end) belong to the tile's group.

    `opens` says that it is the first of its group.
    """

    def __init__(self, group, at, first, end, height, tallest, opens=False):
        self.group, self.at, self.height, self.tallest, self.opens = group, at, height, tallest, opens
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

    def products(self, rows: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        precise = _accumulator(rows, gate, up)
        left = self.rows(rows).astype(precise)
        return left @ self.matrix(gate).astype(precise), left @ self.matrix(up).astype(precise)

    def put(self, out: Array, part: Array) -> Array:
        before = lax.dynamic_slice_in_dim(out, self.at, self.tallest)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(self._own(self.tallest), part, before), self.at, 0)

    def add(self, out: Array, part: Array) -> Array:
        part = part if self.opens else self.matrix(out) + part
        return lax.dynamic_update_index_in_dim(out, part, self.group, 0)


def _over_tiles(
    m: int, group_sizes: Int[Array, " g"], compute: Callable[..., Any], store: Callable[..., Any], out: Any
) -> Any:
    """Folds `store(tile, compute(tile), out)` over the tiles of all groups.

    `compute` sees a tile of the height that it needs, one of a few, and makes its rows `tall`; `store` sees the tallest
    (it lies outside the switch, or XLA would copy `out`). First come the first tiles of all groups, and mostly that is
    all; then what is left of the groups that are taller than the tallest tile.
    """
    heights = _tile_heights(m, group_sizes.shape[0])
    tallest = heights[-1]
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    starts = ends - group_sizes

    def computed(height, group, at, first, end):
        return compute(_Tile(group, at, first, end, height, tallest))

    def add_tile(group, first, out, heights, opens):
        end = ends[group]
        # A tile that would hang over the end of the arrays is moved back, and rows that then belong to others are
        # masked.
        at = jnp.minimum(first, m - tallest)
        place = (group, at, first, end)
        branches = [functools.partial(computed, height) for height in heights]
        choice = sum((end - at > height).astype(jnp.int32) for height in heights[:-1])
        parts = lax.switch(choice, branches, *place) if len(branches) > 1 else branches[0](*place)
        return store(_Tile(*place, tallest, tallest, opens), parts, out)

    def first_tile(group, out):
        return add_tile(group, starts[group], out, heights, opens=True)

    def other_tiles(group, out):
        def body(state):
            first, out = state
            return first + tallest, add_tile(group, first, out, heights[-1:], opens=False)

        return lax.while_loop(lambda state: state[0] < ends[group], body, (starts[group] + tallest, out))[1]

    out = _over_groups(group_sizes > 0, first_tile, out)
    if m == tallest:
        return out
    return _over_groups(group_sizes > tallest, other_tiles, out)


def _over_groups(wanted: Bool[Array, " g"], visit: Callable[[Array, Any], Any], out: Any) -> Any:
    """Folds `visit(group, out)` over the wanted groups."""
    groups = wanted.shape[0]
    stop = jnp.append(wanted, True)

    def next_one(group):
        return lax.while_loop(lambda g: ~stop[g], lambda g: g + 1, group)

    def body(state):
        return next_one(state[0] + 1), visit(*state)

    zero = jnp.sum(wanted, dtype=jnp.int32) * 0  # varies over the mesh axes over which the sizes do
    return lax.while_loop(lambda state: state[0] < groups, body, (next_one(zero), out))[1]


def _transposed(x):
    # Beforehand: XLA's CPU library multiplies only what is contracted along its last axis.
    return lax.optimization_barrier(x.T)


def _tile_heights(m: int, groups: int) -> tuple[int, ...]:
    """Up to eight heights in equal steps to half as much again as a mean group: most groups are one fitting tile.

    Where groups are small (decoding), one height for the few rows that most have, and one for the others.
    """
    tallest = min(_MAX_ROWS, -(-3 * m // (2 * groups)))
    if tallest <= _MIN_ROWS:
        return tuple(sorted({min(m, rows) for rows in (_FEW_ROWS, _MIN_ROWS)}))
    step = max(_MIN_STEP, -(-tallest // 64) * 8)
    return tuple(min(m, step * (i + 1)) for i in range(-(-min(m, tallest) // step)))


def _accumulator(*arrays):
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
