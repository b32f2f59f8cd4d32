"""Grouped matrix products as Pallas kernels on the Triton backend (NVIDIA, AMD).

Three kernels. `rows_times_weights` serves the forward pass and the gradient of the rows: its work units are (group,
tile of the group's rows), found by every program from the group sizes themselves, so nothing is prepared outside the
kernel and no row is copied; the transposed weights are a matter of addresses, and several products may be summed.
`weights_gradient` has one program for each tile of each group's matrix, which walks over the group's rows. `gated` has
the units of the first and two accumulators, and applies the gate to them before anything is stored; where there will be
a gradient, the same kernel stores both (`products`). All accumulate in float32.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, DTypeLike, Float, Int

from pallas_kernels.dispatch import output_like
from pallas_kernels.grouped_matmul.gating import activate, gate_gradients
from pallas_kernels.tiles import check_tiles

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the tile that one program computes, and how it is run.

    Attributes:
      rows: rows of the result.
      columns: columns of the result.
      depth: how much of the contracted dimension one step of the loop takes.
      warps: warps a program.
      stages: tiles in flight in the software pipeline.
    """

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3

    def __post_init__(self):
        check_tiles(self)


def rows_times_weights(
    rows: Float[Array, "m k"],
    weights: Float[Array, "g k n"] | Float[Array, "g n k"],
    group_sizes: Int[Array, " g"],
    *more: Array,
    transpose: bool,
    dtype: DTypeLike,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """Row i of group g gives `rows[i] @ weights[g]` (`weights[g].T` with `transpose`); rows of no group give zero.

    The products of further rows and weights (`more`, of the same shapes) are added.
    """
    common = _check(interpret, rows, weights, *more)
    (m, k), groups = rows.shape, weights.shape[0]
    n = weights.shape[1 if transpose else 2]
    tiles = tiles or _fit(_ROWS_TILES[common.itemsize], rows=-(-m // groups), columns=n, depth=k)
    return pl.pallas_call(
        functools.partial(_rows_kernel, transpose=transpose, tiles=tiles, common=common),
        out_shape=output_like((m, n), dtype, rows),
        grid=(_units(m, groups, tiles) * pl.cdiv(n, tiles.columns),),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="grouped_matmul_transposed" if transpose else "grouped_matmul",
    )(group_sizes, rows, weights, *more)


def _rows_kernel(sizes_ref: Any, *refs: Any, transpose: bool, tiles: Tiles, common: Any) -> None:
    *factors, out_ref = refs
    (_, k), (_, n) = factors[0].shape, out_ref.shape
    unit = _Unit.find(sizes_ref, out_ref.shape, tiles)

    def step(i, total):
        depth = i * tiles.depth + jnp.arange(tiles.depth, dtype=jnp.int32)
        for rows_ref, weights_ref in zip(factors[::2], factors[1::2], strict=True):
            left = unit.rows(rows_ref, depth)
            where = (unit.column[None, :], depth[:, None]) if transpose else (depth[:, None], unit.column[None, :])
            right = _load(weights_ref, (unit.group, *where), (depth[:, None], k), (unit.column[None, :], n))
            total += jnp.dot(left.astype(common), right.astype(common), preferred_element_type=jnp.float32)
        return total

    total = lax.fori_loop(0, unit.steps(k), step, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))
    unit.store(out_ref, total)


def gated(
    rows: Float[Array, "m k"],
    gate: Float[Array, "g k n"],
    up: Float[Array, "g k n"],
    group_sizes: Int[Array, " g"],
    *,
    act: str,
    dtype: DTypeLike,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """Row i of group g gives `act(rows[i] @ gate[g]) * (rows[i] @ up[g])`; rows of no group give zero."""
    (out,) = _dual_call(rows, gate, up, group_sizes, act=act, dtypes=(dtype,), tiles=tiles, interpret=interpret)
    return out


def products(
    rows: Float[Array, "m k"],
    gate: Float[Array, "g k n"],
    up: Float[Array, "g k n"],
    group_sizes: Int[Array, " g"],
    *,
    dtype: DTypeLike,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "m n"], Float[Array, "m n"]]:
    """Row i of group g gives `rows[i] @ gate[g]` and `rows[i] @ up[g]`; rows of no group give zeros."""
    z, u = _dual_call(rows, gate, up, group_sizes, act=None, dtypes=(dtype, dtype), tiles=tiles, interpret=interpret)
    return z, u


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
    interpret: bool = False,
) -> tuple[Float[Array, "m k"], Float[Array, "g k n"], Float[Array, "g k n"]]:
    """Gradients of `gated` in rows, gate and up, given its two products."""
    common = _check(interpret, rows, gate, up)
    z, u, grads = (x.astype(jnp.float32) for x in (z, u, grads))
    d_z, d_u = (d.astype(common) for d in gate_gradients(z, u, grads, act))
    d_rows = rows_times_weights(d_z, gate, group_sizes, d_u, up, transpose=True, dtype=rows.dtype, interpret=interpret)
    d_gate, d_up = (
        weights_gradient(rows, d, group_sizes, dtype=w.dtype, interpret=interpret) for d, w in ((d_z, gate), (d_u, up))
    )
    return d_rows, d_gate, d_up


def _dual_call(
    rows: Array, gate: Array, up: Array, group_sizes: Array, *, act, dtypes, tiles=None, interpret=False
) -> tuple[Array, ...]:
    common = _check(interpret, rows, gate, up)
    (m, k), (groups, _, n) = rows.shape, gate.shape
    tiles = tiles or _fit(_GATED_TILES[common.itemsize], rows=-(-m // groups), columns=n, depth=k)
    outs = pl.pallas_call(
        functools.partial(_dual_kernel, act=act, tiles=tiles, common=common),
        out_shape=tuple(output_like((m, n), dtype, rows) for dtype in dtypes),
        grid=(_units(m, groups, tiles) * pl.cdiv(n, tiles.columns),),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="grouped_matmul_gated" if act else "grouped_matmul_products",
    )(group_sizes, rows, gate, up)
    return tuple(outs)


def _dual_kernel(
    sizes_ref: Any,
    rows_ref: Any,
    gate_ref: Any,
    up_ref: Any,
    *out_refs: Any,
    act: str | None,
    tiles: Tiles,
    common: Any,
) -> None:
    (_, k), (_, n) = rows_ref.shape, out_refs[0].shape
    unit = _Unit.find(sizes_ref, out_refs[0].shape, tiles)

    def step(i, totals):
        depth = i * tiles.depth + jnp.arange(tiles.depth, dtype=jnp.int32)
        left = unit.rows(rows_ref, depth).astype(common)
        place = (unit.group, depth[:, None], unit.column[None, :])
        limits = ((depth[:, None], k), (unit.column[None, :], n))
        return tuple(
            total + jnp.dot(left, _load(ref, place, *limits).astype(common), preferred_element_type=jnp.float32)
            for total, ref in zip(totals, (gate_ref, up_ref), strict=True)
        )

    zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    z, u = lax.fori_loop(0, unit.steps(k), step, (zeros, zeros))
    for ref, value in zip(out_refs, (z, u) if act is None else (activate(z, act) * u,), strict=True):
        unit.store(ref, value)


def _units(m: int, groups: int, tiles: Tiles) -> int:
    """One for each tile of rows, one more for each group that ends inside a tile, and the rows of no group."""
    return pl.cdiv(m, tiles.rows) + groups


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What a program of the grid (units x tiles of columns) computes.

    Attributes:
      group: whose matrix.
      owned: False past the last group: such units write the zeros of the rows that belong to none, without a step.
      row: of the result.
      safe_row: past the array the last row is loaded again, and its product never stored. (Only rows: an index that is
        clamped along contiguous memory would cost the wide loads.)
      end: of the group's rows.
      column: of the result.
      depth: `Tiles.depth`.
    """

    group: Array
    owned: Array
    row: Array
    safe_row: Array
    end: Array
    column: Array
    depth: int

    @classmethod
    def find(cls, sizes_ref: Any, shape: tuple[int, int], tiles: Tiles) -> "_Unit":
        (m, n), groups = shape, sizes_ref.shape[0]
        column_tiles = pl.cdiv(n, tiles.columns)
        # Neighbouring programs share their rows, then the matrix of their group.
        unit, column_tile = pl.program_id(0) // column_tiles, pl.program_id(0) % column_tiles
        index, sizes = _load_sizes(sizes_ref)
        heights = (sizes + (tiles.rows - 1)) // tiles.rows
        group = _sum((jnp.cumsum(heights, dtype=jnp.int32) <= unit).astype(jnp.int32))
        before = index < group
        group_start = _sum(jnp.where(before, sizes, 0))
        first = group_start + (unit - _sum(jnp.where(before, heights, 0))) * tiles.rows
        owned = group < groups
        row = first + jnp.arange(tiles.rows, dtype=jnp.int32)
        return cls(
            group=jnp.minimum(group, groups - 1),
            owned=owned,
            row=row,
            safe_row=jnp.minimum(row, m - 1),
            end=jnp.where(owned, group_start + _sum(jnp.where(index == group, sizes, 0)), m),
            column=column_tile * tiles.columns + jnp.arange(tiles.columns, dtype=jnp.int32),
            depth=tiles.depth,
        )

    def steps(self, k: int) -> Array:
        return self.owned.astype(jnp.int32) * pl.cdiv(k, self.depth)

    def rows(self, ref: Any, depth: Array) -> Array:
        return _load(ref, (self.safe_row[:, None], depth[None, :]), (depth[None, :], ref.shape[1]))

    def inside(self, n: int) -> Array:
        return (self.row[:, None] < self.end) & (self.column[None, :] < n)

    def store(self, ref: Any, value: Array) -> None:
        where = ref.at[self.row[:, None], self.column[None, :]]
        plt.store(where, value.astype(ref.dtype), mask=self.inside(ref.shape[1]))


def weights_gradient(
    rows: Float[Array, "m k"],
    grads: Float[Array, "m n"],
    group_sizes: Int[Array, " g"],
    *,
    dtype: DTypeLike,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "g k n"]:
    """Group g gives `rows[of g].T @ grads[of g]`; an empty group gives zero."""
    common = _check(interpret, rows, grads)
    k, n, groups = rows.shape[1], grads.shape[1], group_sizes.shape[0]
    tiles = tiles or _fit(_GRADIENT_TILES[common.itemsize], rows=k, columns=n, depth=-(-rows.shape[0] // groups))
    return pl.pallas_call(
        functools.partial(_gradient_kernel, tiles=tiles, common=common),
        out_shape=output_like((groups, k, n), dtype, rows),
        grid=(groups * pl.cdiv(k, tiles.rows) * pl.cdiv(n, tiles.columns),),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="grouped_matmul_weights_gradient",
    )(rows, grads, group_sizes)


def _gradient_kernel(rows_ref: Any, grads_ref: Any, sizes_ref: Any, out_ref: Any, *, tiles: Tiles, common: Any) -> None:
    (m, k), (_, n) = rows_ref.shape, grads_ref.shape
    row_tiles, column_tiles = pl.cdiv(k, tiles.rows), pl.cdiv(n, tiles.columns)
    program = pl.program_id(0)
    group = program // (row_tiles * column_tiles)
    row = program // column_tiles % row_tiles * tiles.rows + jnp.arange(tiles.rows, dtype=jnp.int32)
    column = program % column_tiles * tiles.columns + jnp.arange(tiles.columns, dtype=jnp.int32)

    index, sizes = _load_sizes(sizes_ref)
    start = _sum(jnp.where(index < group, sizes, 0))
    size = _sum(jnp.where(index == group, sizes, 0))

    def step(i, total):
        # The rows of other groups, and of none, must not enter the sum even as NaN: both sides are masked.
        depth = i * tiles.depth + jnp.arange(tiles.depth, dtype=jnp.int32)
        at = jnp.minimum(start + depth, m - 1)
        left = _load(rows_ref, (at[None, :], row[:, None]), (depth[None, :], size), (row[:, None], k))
        right = _load(grads_ref, (at[:, None], column[None, :]), (depth[:, None], size), (column[None, :], n))
        return total + jnp.dot(left.astype(common), right.astype(common), preferred_element_type=jnp.float32)

    steps = (size + (tiles.depth - 1)) // tiles.depth
    total = lax.fori_loop(0, steps, step, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))
    inside = (row[:, None] < k) & (column[None, :] < n)
    plt.store(out_ref.at[group, row[:, None], column[None, :]], total.astype(out_ref.dtype), mask=inside)


def _load_sizes(sizes_ref: Any) -> tuple[Array, Array]:
    """All group sizes and their indices, padded with empty groups to a power of two."""
    index = jnp.arange(_power_of_two(sizes_ref.shape[0]), dtype=jnp.int32)
    safe = jnp.minimum(index, sizes_ref.shape[0] - 1)
    return index, plt.load(sizes_ref.at[safe], mask=index < sizes_ref.shape[0], other=0)


def _sum(x: Array) -> Array:
    return jnp.sum(x, dtype=jnp.int32)  # also where 64-bit types are on


def _load(ref: Any, where: tuple[Array, ...], *limits: tuple[Array, int | Array]) -> Array:
    """Loads a tile; positions whose index is not below its limit give zero. Limits that always hold cost nothing."""
    masks = [index < limit for index, limit in limits if not isinstance(limit, int) or limit % index.size]
    if not masks:
        return plt.load(ref.at[where])
    return plt.load(ref.at[where], mask=functools.reduce(jnp.logical_and, masks), other=0)


def _check(interpret: bool, *arrays: Array) -> Any:
    """The dtype in which the products are taken; refuses what the kernels cannot do."""
    common = functools.reduce(jnp.promote_types, (array.dtype for array in arrays))
    if common not in _DTYPES:
        raise NotImplementedError(f"the Triton kernels take bfloat16, float16 and float32, got {common}")
    if interpret and jax.typeof(arrays[0]).manual_axis_type.varying:
        raise NotImplementedError("JAX interprets kernels under shard_map only with check_vma=False")
    return common


# By bytes of an element. What the compiler makes of them is in docs/kernels.md.
_ROWS_TILES = {2: Tiles(128, 128, 64, warps=8, stages=3), 4: Tiles(128, 64, 32, warps=4, stages=3)}
_GATED_TILES = {2: Tiles(128, 64, 64, warps=8, stages=3), 4: Tiles(64, 64, 32, warps=4, stages=3)}
_GRADIENT_TILES = {2: Tiles(128, 128, 64, warps=8, stages=3), 4: Tiles(64, 64, 32, warps=4, stages=3)}


def _fit(tiles: Tiles, *, rows: int, columns: int, depth: int) -> Tiles:
    """Shrinks tiles to the problem: small groups and narrow matrices should not be padded to a full tile."""
    return dataclasses.replace(
        tiles,
        rows=min(tiles.rows, max(16, _power_of_two(rows))),
        columns=min(tiles.columns, max(16, _power_of_two(columns))),
        depth=min(tiles.depth, max(16, _power_of_two(depth))),
    )


def _power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()
