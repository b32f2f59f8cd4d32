"""Products with packed experts as Pallas kernels on the Triton backend (NVIDIA, AMD): words are decoded in registers.

Three kernels. `_tile_kernel` serves prefill, plain and gated, and (transposed) the gradient of the rows; like the
grouped product's, its work units are (expert, tile of the expert's rows), found by every program from the group sizes.
`_row_kernel` serves the few rows of a decode step: one program takes one row, multiplies and sums without the tensor
cores, and, where the other member of the row's slot has a row too, takes that along, so that the words are read once
for both. All accumulate in float32. Slots that are not packed have a loop of their own, of no steps for the others.

Of quantised pairs a step takes inputs of one group only (of 6 bits: as many of each of its four runs): tensor cores
multiply levels, which every dtype holds exactly, and the sum is scaled. The transposed product scales each weight.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, DTypeLike, Float, Int

from pallas_kernels.dispatch import output_like
from pallas_kernels.grouped_matmul.gating import activate
from pallas_kernels.grouped_matmul.triton import Tiles
from pallas_kernels.packed_moe_matmul.bits import Slots, decode, resolve
from pallas_kernels.packed_moe_matmul.codes import QUARTERS, decode_run, planes_of

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def rows_times_experts(
    rows: Float[Array, "m k"],
    weights: Sequence[Slots],
    group_sizes: Int[Array, " e"],
    slot_of: Int[Array, " e"],
    pos_of: Int[Array, " e"],
    *,
    act: str | None,
    transpose: bool,
    dtype: DTypeLike,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """Row i of expert e gives `rows[i] @ matrix(e)` (or its transpose), or the gated product of two `weights`."""
    given = [rows, *(slots.dense for slots in weights if slots.dense is not None)]
    scales = [slots.scales for slots in weights if slots.scales is not None]
    for array in (*given, *scales):
        if array.dtype not in _DTYPES:
            raise NotImplementedError(f"the Triton kernels take bfloat16, float16 and float32, got {array.dtype}")
    if interpret and jax.typeof(rows).manual_axis_type.varying:
        raise NotImplementedError("JAX interprets kernels under shard_map only with check_vma=False")
    (m, depth), experts = rows.shape, group_sizes.shape[0]
    n = weights[0].inputs if transpose else weights[0].words.shape[2]
    groups = None if not scales else _Groups(weights[0])
    settings = {"act": act, "gated": len(weights) == 2, "groups": groups}
    if tiles is None and not transpose and m <= max(_FEW_ROWS, experts):
        found = _ROW_TILES[len(weights)] if groups is None else _ROW_TILES_OF_CODES[groups.bits]
        tiles = _fit(found, rows=16, columns=n, depth=depth, groups=groups)
        units = m
        kernel = functools.partial(_row_kernel, tiles=tiles, **settings)
        name = "packed_gated_gemv" if act else "packed_gemv"
    else:
        common = jnp.result_type(jnp.bfloat16, *given)
        found = (_TILES if groups is None else _TILES_OF_CODES)[common.itemsize, len(weights)]
        tiles = tiles or _fit(
            found, rows=-(-m // experts), columns=n, depth=depth, groups=None if transpose else groups
        )
        # One unit for each tile of rows, one more for each expert that ends inside a tile, and the rows of none.
        units = pl.cdiv(m, tiles.rows) + experts
        kernel = functools.partial(_tile_kernel, transpose=transpose, tiles=tiles, common=common, **settings)
        name = "packed_gated_gmm" if act else "packed_gmm_transposed" if transpose else "packed_gmm"
    if groups is not None:
        name = name.replace("packed", f"packed{groups.bits}")
    stacks = [slots.words if groups is None else groups.planes(slots.words) for slots in weights]
    return pl.pallas_call(
        kernel,
        out_shape=output_like((m, n), dtype, rows),
        grid=(units * pl.cdiv(n, tiles.columns),),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=name,
    )(rows, *stacks, *given[1:], *scales, group_sizes, slot_of, pos_of)


class _Groups:
    """How the groups of quantised matrices lie in their codes."""

    def __init__(self, slots: Slots):
        self.bits, self.splits = slots.bits, QUARTERS[slots.bits]
        self.number = slots.scales.shape[1]
        self.run = slots.inputs // self.number // self.splits
        self.depth = self.run & -self.run
        if self.depth < _LEAST:
            raise NotImplementedError(
                f"the Triton kernels take groups of a multiple of {_LEAST * self.splits} inputs where pairs have "
                f"{self.bits} bits a position, got {self.run * self.splits}"
            )

    def planes(self, codes: Array) -> Array:
        """Codes `[slots, groups, planes, run, n]`."""
        return codes.reshape(codes.shape[0], self.number, -1, self.run, codes.shape[2])

    def steps(self, depth: int) -> int:
        """How many steps of `depth` inputs of every run there are."""
        return self.number * (self.run // depth)

    def step(self, i: Array, depth: int) -> tuple[Array, Array]:
        """Group of a step, and the places of its inputs in the group's runs."""
        # (Pallas lowers no remainder by a constant for Triton.)
        parts = self.run // depth
        group = i // parts
        return group, (i - group * parts) * depth + jnp.arange(depth, dtype=jnp.int32)

    def input(self, group: Array, run: int, place: Array) -> Array:
        """Index of inputs; the inverse is `place`."""
        return (group * self.splits + run) * self.run + place

    def place(self, index: Array) -> tuple[Array, Array, Array]:
        """Group, run and place in the run of inputs."""
        whole = index // self.run
        group = whole // self.splits
        return group, whole - group * self.splits, index - whole * self.run


class _Refs:
    """The references of a kernel by what they are; and where the experts' rows lie, on registers."""

    def __init__(self, refs: Sequence[Any], gated: bool, groups: _Groups | None):
        self.rows, *stacks, sizes, slots, members, self.out = refs
        matrices = 2 if gated else 1
        # Words or codes, then dense stacks if there are any, then the scales of codes.
        self.words, stacks = stacks[:matrices], stacks[matrices:]
        self.scales = stacks[-matrices:] if groups else []
        self.dense = stacks[: len(stacks) - len(self.scales)]
        self.packed = self.words[0].shape[0]
        self.experts = sizes.shape[0]
        self.index = jnp.arange(_power_of_two(self.experts), dtype=jnp.int32)
        self.sizes, slots, members = map(self._per_expert, (sizes, slots, members))
        count = self.packed + (self.dense[0].shape[0] if self.dense else 0)
        self.slots, self.members, self.poison = resolve(slots, members, count)

    def _per_expert(self, ref: Any) -> Array:
        """One value for each expert, padded with zeros to a power of two."""
        safe = jnp.minimum(self.index, self.experts - 1)
        return plt.load(ref.at[safe], mask=self.index < self.experts, other=0)

    def start(self, expert: Array) -> Array:
        """Where the rows of an expert start."""
        return _sum(jnp.where(self.index < expert, self.sizes, 0))


def _tile_kernel(
    *refs: Any, act: str | None, gated: bool, groups: Any, transpose: bool, tiles: Tiles, common: Any
) -> None:
    at = _Refs(refs, gated, groups)
    packed = at.packed
    (m, k), (_, n) = at.rows.shape, at.out.shape
    column_tiles = pl.cdiv(n, tiles.columns)
    # Neighbouring programs share their rows, then the matrix of their expert.
    unit, column_tile = pl.program_id(0) // column_tiles, pl.program_id(0) % column_tiles

    heights = (at.sizes + (tiles.rows - 1)) // tiles.rows
    expert = _sum((jnp.cumsum(heights, dtype=jnp.int32) <= unit).astype(jnp.int32))
    own = at.index == expert
    first = at.start(expert) + (unit - _sum(jnp.where(at.index < expert, heights, 0))) * tiles.rows
    # Units past the last expert write the zeros of the rows that belong to none: no step, and the array as the end.
    owned = expert < at.experts
    # (Nor do traced sizes that exceed the array, which cannot be an error, make a program write past it.)
    end = jnp.minimum(jnp.where(owned, at.start(expert) + _pick(own, at.sizes), m), m)
    slot, member = _pick(own, at.slots), _pick(own, at.members)

    row = first + jnp.arange(tiles.rows, dtype=jnp.int32)
    column = column_tile * tiles.columns + jnp.arange(tiles.columns, dtype=jnp.int32)
    # Past the array the last row is loaded again, and its product never stored.
    safe_row = jnp.minimum(row, m - 1)

    def step(stacks, slot, read):
        def run(i, totals):
            depth = i * tiles.depth + jnp.arange(tiles.depth, dtype=jnp.int32)
            left = _load(at.rows, (safe_row[:, None], depth[None, :]), (depth[None, :], k)).astype(common)
            where = (column[None, :], depth[:, None]) if transpose else (depth[:, None], column[None, :])
            loaded = [_load(stack, (slot, *where), (depth[:, None], k), (column[None, :], n)) for stack in stacks]
            return tuple(
                total + jnp.dot(left, read(right), preferred_element_type=jnp.float32)
                for total, right in zip(totals, loaded)
            )

        return run

    packed_slot = jnp.minimum(slot, packed - 1)

    def step_of_codes(i, totals):
        group, place = groups.step(i, tiles.depth)
        lefts = [
            _load(at.rows, (safe_row[:, None], groups.input(group, run, place)[None, :])).astype(common)
            for run in range(groups.splits)
        ]
        made = []
        for total, codes, scales in zip(totals, at.words, at.scales):
            levels = _levels(groups, codes, (packed_slot, group), place, column, n)
            scale = _load(scales, (packed_slot, group, column), (column, n)).astype(jnp.float32)
            product = jnp.zeros_like(total)
            for run, left in enumerate(lefts):
                product += jnp.dot(left, levels(run, member, common), preferred_element_type=jnp.float32)
            made.append(total + product * scale[None, :])
        return tuple(made)

    def transposed_step_of_codes(i, totals):
        depth = i * tiles.depth + jnp.arange(tiles.depth, dtype=jnp.int32)
        left = _load(at.rows, (safe_row[:, None], depth[None, :]), (depth[None, :], k)).astype(common)
        # Past the last input the last one is loaded again, and its product never stored.
        group, run, place = groups.place(jnp.minimum(column, n - 1)[None, :])
        where, inside = (place, depth[:, None]), (depth[:, None], k)
        wanted = planes_of(run, groups.bits)
        planes = [_load(at.words[0], (packed_slot, group, plane, *where), inside) for plane in wanted]
        scale = _load(at.scales[0], (packed_slot, group, depth[:, None]), inside).astype(jnp.float32)
        weights = (decode_run(planes, run, member, jnp.float32) * scale).astype(common)
        return (totals[0] + jnp.dot(left, weights, preferred_element_type=jnp.float32),)

    steps = owned.astype(jnp.int32) * pl.cdiv(k, tiles.depth)
    if groups is None:
        packed_steps, packed_step = steps, step(at.words, packed_slot, lambda words: decode(words, member, common))
    elif transpose:
        packed_steps, packed_step = steps, transposed_step_of_codes
    else:
        packed_steps, packed_step = owned.astype(jnp.int32) * groups.steps(tiles.depth), step_of_codes
    zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    is_packed = (slot < packed).astype(jnp.int32)
    totals = lax.fori_loop(0, packed_steps * is_packed, packed_step, (zeros,) * len(at.words))
    if at.dense:
        dense_slot = jnp.maximum(slot - packed, 0)
        totals = lax.fori_loop(
            0, steps * (1 - is_packed), step(at.dense, dense_slot, lambda right: right.astype(common)), totals
        )
    made = _gate(totals, act) + _pick(own, at.poison)
    inside = (row[:, None] < end) & (column[None, :] < n)
    plt.store(at.out.at[row[:, None], column[None, :]], made.astype(at.out.dtype), mask=inside)


def _row_kernel(*refs: Any, act: str | None, gated: bool, groups: Any, tiles: Tiles) -> None:
    at = _Refs(refs, gated, groups)
    packed = at.packed
    (m, k), (_, n) = at.rows.shape, at.out.shape
    column_tiles = pl.cdiv(n, tiles.columns)
    row, column_tile = pl.program_id(0) // column_tiles, pl.program_id(0) % column_tiles
    column = column_tile * tiles.columns + jnp.arange(tiles.columns, dtype=jnp.int32)

    ends = jnp.cumsum(at.sizes, dtype=jnp.int32)
    expert = _sum(((ends <= row) & (at.index < at.experts)).astype(jnp.int32))
    own = at.index == expert
    owned = expert < at.experts
    slot, member = _pick(own, at.slots), _pick(own, at.members)
    # Row i of the first member takes row i of the second along. (Slots of more than one expert a member share nothing.)
    mates = (at.slots == slot) & (at.index < at.experts)
    other = mates & (at.members != member)
    rank = row - at.start(expert)
    other_row = at.start(_pick(other, at.index)) + rank
    one_each = (_count(other) == 1) & (_count(mates) == 2)
    shared = owned & (slot < packed) & one_each & (_pick(other, at.sizes) > rank) & (other_row < m)
    alone, both = owned & ~shared, shared & (member == 0)

    def step(stacks, slot, sources, readers):
        def run(i, totals):
            depth = i * tiles.depth + jnp.arange(tiles.depth, dtype=jnp.int32)
            lefts = [_load(at.rows, (source, depth), (depth, k)).astype(jnp.float32)[:, None] for source in sources]
            loaded = [
                _load(stack, (slot, depth[:, None], column[None, :]), (depth[:, None], k), (column[None, :], n))
                for stack in stacks
            ]
            products = [left * read(right) for left, read in zip(lefts, readers) for right in loaded]
            return tuple(map(jnp.add, totals, products))

        return run

    steps = packed_steps = pl.cdiv(k, tiles.depth)
    zeros = (jnp.zeros((tiles.depth, tiles.columns), jnp.float32),) * len(at.words)
    packed_slot = jnp.minimum(slot, packed - 1)

    def step_of_words(sources, members):
        def reader(pos):
            return lambda words: decode(words, pos, jnp.float32)

        return step(at.words, packed_slot, sources, [reader(pos) for pos in members])

    def step_of_codes(sources, members):
        def run(i, totals):
            group, place = groups.step(i, tiles.depth)
            levels = [_levels(groups, codes, (packed_slot, group), place, column, n) for codes in at.words]
            scales = [
                _load(scales, (packed_slot, group, column), (column, n)).astype(jnp.float32) for scales in at.scales
            ]
            made = []
            for source, pos in zip(sources, members):
                lefts = [
                    _load(at.rows, (source, groups.input(group, part, place))).astype(jnp.float32)[:, None]
                    for part in range(groups.splits)
                ]
                for of_matrix, scale in zip(levels, scales):
                    products = [left * of_matrix(part, pos, jnp.float32) for part, left in enumerate(lefts)]
                    made.append(functools.reduce(jnp.add, products) * scale[None, :])
            return tuple(map(jnp.add, totals, made))

        return run

    packed_step = step_of_words
    if groups is not None:
        packed_step, packed_steps = step_of_codes, groups.steps(tiles.depth)
    loops = [(packed_steps * (alone & (slot < packed)).astype(jnp.int32), packed_step([row], [member]))]
    if at.dense:
        dense_slot = jnp.maximum(slot - packed, 0)
        as_it_is = [lambda right: right.astype(jnp.float32)]
        own_steps = steps * (alone & (slot >= packed)).astype(jnp.int32)
        loops.append((own_steps, step(at.dense, dense_slot, [row], as_it_is)))
    totals = zeros
    for count, run in loops:
        totals = lax.fori_loop(0, count, run, totals)
    one = _gate([jnp.sum(total, axis=0) for total in totals], act) + _pick(own, at.poison)
    plt.store(at.out.at[row, column], one.astype(at.out.dtype), mask=~shared & (column < n))

    both_members = [jnp.asarray(pos, jnp.int32) for pos in (0, 1)]
    pair = lax.fori_loop(
        0, packed_steps * both.astype(jnp.int32), packed_step([row, other_row], both_members), zeros * 2
    )
    sums = [jnp.sum(total, axis=0) for total in pair]
    half = len(zeros)
    for made, target, poison in ((sums[:half], row, own), (sums[half:], other_row, other)):
        made = _gate(made, act) + _pick(poison, at.poison)
        plt.store(at.out.at[target, column], made.astype(at.out.dtype), mask=both & (column < n))


def _levels(groups: _Groups, codes: Any, where: tuple[Any, Any], place: Array, column: Array, n: int) -> Any:
    """Loads the planes of a group once; (run, member, dtype) -> coefficients times levels, [depth, columns]."""
    at = [(*where, plane, place[:, None], column[None, :]) for plane in range(codes.shape[2])]
    planes = [_load(codes, one, (column[None, :], n)) for one in at]

    def of_run(run, pos, dtype):
        return decode_run([planes[plane] for plane in planes_of(run, groups.bits)], run, pos, dtype)

    return of_run


def _gate(totals: Sequence[Array], act: str | None) -> Array:
    if act is None:
        return totals[0]
    # Pallas does not lower the error function for Triton.
    gate = totals[0] * _normal_cdf(totals[0]) if act == "gelu" else activate(totals[0], act)
    return gate * totals[1]


def _normal_cdf(z: Array) -> Array:
    """Phi(z) within 1e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26."""
    x = jnp.abs(z) * 0.5**0.5
    t = 1 / (1 + 0.3275911 * x)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * series * jnp.exp(-x * x)
    return jnp.where(z < 0, tail, 1 - tail)


def _pick(where: Array, values: Array) -> Array:
    """The value of the one place that `where` marks, or zero."""
    return jnp.sum(jnp.where(where, values, 0), dtype=values.dtype)


def _count(where: Array) -> Array:
    return _sum(where.astype(jnp.int32))


def _sum(x: Array) -> Array:
    return jnp.sum(x, dtype=jnp.int32)  # also where 64-bit types are on


def _load(ref: Any, where: tuple[Any, ...], *limits: tuple[Array, int]) -> Array:
    """Loads a tile; positions whose index is not below its limit give zero. Limits that always hold cost nothing."""
    masks = [index < limit for index, limit in limits if limit % index.size]
    if not masks:
        return plt.load(ref.at[where])
    return plt.load(ref.at[where], mask=functools.reduce(jnp.logical_and, masks), other=0)


# Up to this many rows, or one a expert, the products of rows one by one read less than tiles would.
_FEW_ROWS = 8
# By bytes of an element and number of matrices; what the compiler makes of them is in docs/kernels.md.
_TILES = {
    (2, 1): Tiles(128, 128, 64, warps=8, stages=3),
    (2, 2): Tiles(128, 64, 64, warps=8, stages=3),
    (4, 1): Tiles(128, 64, 32, warps=8, stages=3),
    (4, 2): Tiles(64, 64, 32, warps=4, stages=3),
}
_TILES_OF_CODES = {
    (2, 1): Tiles(128, 64, 64, warps=8, stages=3),
    (2, 2): Tiles(64, 32, 64, warps=8, stages=3),
    (4, 1): Tiles(64, 64, 32, warps=8, stages=3),
    (4, 2): Tiles(64, 64, 32, warps=8, stages=3),
}
_ROW_TILES = {1: Tiles(16, 64, 64, warps=4), 2: Tiles(16, 64, 32, warps=4)}
# By bits of a position.
_ROW_TILES_OF_CODES = {8: Tiles(16, 64, 32, warps=4), 6: Tiles(16, 64, 16, warps=4)}
# Inputs that a tensor core takes at a time.
_LEAST = 16


def _fit(tiles: Tiles, *, rows: int, columns: int, depth: int, groups: _Groups | None) -> Tiles:
    """Shrinks tiles to the problem: few rows and narrow matrices should not be padded to a full tile.

    Where pairs are quantised the depth is that of a run.
    """
    if groups is not None:
        depth = groups.depth
    return dataclasses.replace(
        tiles,
        rows=min(tiles.rows, max(16, _power_of_two(rows))),
        columns=min(tiles.columns, max(16, _power_of_two(columns))),
        depth=min(tiles.depth, max(16, _power_of_two(depth))),
    )


def _power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()
