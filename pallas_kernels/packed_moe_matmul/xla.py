"""Products with packed experts in plain XLA: what a CPU, and any platform without a kernel, really uses.

A loop over the experts that have rows, and inside it one over blocks of the expert's matrix, which are decoded to
float32 as they are needed: a block stays in the cache, and is all that is ever decoded at one time. Rows are taken in
tiles of a few fixed heights, the lowest that holds the expert's rows, so that the product of one row does not cost as
much as that of a hundred. (Measured against decoding whole matrices, blocks of columns, multiplying and summing.)

Of quantised pairs a block is a part of a group, whose levels are multiplied and the product scaled, or several groups
with scaled weights; of 6 bits, which hold four runs of a group's inputs, one run at a time.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int

from pallas_kernels.dispatch import zeros_alike
from pallas_kernels.grouped_matmul.gating import activate
from pallas_kernels.packed_moe_matmul.bits import Slots, decode, resolve
from pallas_kernels.packed_moe_matmul.codes import QUARTERS, decode_run, planes_of

# Heights of the tiles of rows; an expert with more rows than the last takes several of that.
_HEIGHTS = (2, 8, 32, 128)
# Elements of a decoded block for tiles of at most as many rows: few rows wait for memory, many for the multiplier.
_BLOCKS = ((8, 2**18), (128, 2**20))
# The same of codes, for tiles of any height.
_BLOCK_OF_CODES = 2**19


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
) -> Float[Array, "m n"]:
    """Row i of expert e gives `rows[i] @ matrix(e)` (or its transpose), or the gated product of two `weights`."""
    m, n = rows.shape[0], weights[0].inputs if transpose else weights[0].words.shape[2]
    precise = jnp.promote_types(rows.dtype, jnp.float32)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    slot_of, pos_of, poison = resolve(slot_of, pos_of, weights[0].number)
    # Bits, because XLA's CPU compiler widens a whole bfloat16 array to update a slice of it.
    row_bits = _bits(rows)

    def of_height(height):
        def one_tile(at, expert, first, end, out):
            tile = _floats(lax.dynamic_slice_in_dim(row_bits, at, height), rows.dtype)
            made = [_multiply(tile, slots, slot_of[expert], pos_of[expert], precise, transpose) for slots in weights]
            made = made[0] if act is None else activate(made[0], act) * made[1]
            made = _bits((made + poison[expert].astype(precise)).astype(dtype))
            row = at + jnp.arange(height, dtype=jnp.int32)[:, None]
            before = lax.dynamic_slice_in_dim(out, at, height)
            own = (row >= first) & (row < end)
            return lax.dynamic_update_slice_in_dim(out, jnp.where(own, made, before), at, 0)

        def tiles(expert, out):
            end = ends[expert]
            start = end - group_sizes[expert]

            def step(state):
                # A tile that would hang over the end of the array is moved back.
                first, out = state
                return first + height, one_tile(jnp.minimum(first, m - height), expert, first, end, out)

            if height == heights[-1] < m:
                return lax.while_loop(lambda state: state[0] < end, step, (start, out))[1]
            return step((start, out))[1]

        return tiles

    heights = [height for height in _HEIGHTS if height < m]
    heights = heights if m > _HEIGHTS[-1] else [*heights, m]
    branches = [of_height(height) for height in heights]
    # Experts without rows come last and are not visited.
    order = jnp.argsort(group_sizes == 0, stable=True)
    active = jnp.sum(group_sizes > 0, dtype=jnp.int32)
    limits = jnp.array(heights[:-1], jnp.int32)

    def visit(state):
        visited, out = state
        expert = order[visited]
        lowest = jnp.sum(group_sizes[expert] > limits, dtype=jnp.int32)
        return visited + 1, lax.switch(lowest, branches, expert, out)

    start = (zeros_alike((), jnp.int32, rows), _bits(zeros_alike((m, n), dtype, rows)))
    return _floats(lax.while_loop(lambda state: state[0] < active, visit, start)[1], jnp.dtype(dtype))


def _multiply(tile: Array, slots: Slots, slot: Array, pos: Array, precise: DTypeLike, transpose: bool) -> Array:
    """Tile times the matrix, or its transpose, of one member of a slot."""
    plain = _transposed_product if transpose else _product
    if slots.scales is None:
        return plain(tile, slots, slot, pos, precise)
    quantised = _transposed_product_of_codes if transpose else _product_of_codes
    if slots.dense is None:
        return quantised(tile, slots, slot, pos, precise)
    packed = slots.words.shape[0]
    # A slot that is not packed is read as one of an array that is.
    return lax.cond(
        slot < packed,
        lambda: quantised(tile, slots, jnp.minimum(slot, packed - 1), pos, precise),
        lambda: plain(tile, Slots(slots.dense), jnp.maximum(slot - packed, 0), pos, precise),
    )


def _product(tile: Array, slots: Slots, slot: Array, pos: Array, precise: DTypeLike) -> Array:
    """Tile [r, k] @ matrix [k, n], block after block of the matrix's rows."""
    k, n = slots.words.shape[1:]
    depth, blocks = _split(k, n, tile.shape[0])

    def step(i, total):
        at = jnp.minimum(i * depth, k - depth)
        part = lax.dynamic_slice_in_dim(tile, at, depth, 1).astype(precise)
        if blocks * depth > k:  # the last block was moved back over what is already summed
            part = jnp.where(at + jnp.arange(depth) >= i * depth, part, 0)
        return total + part @ _block(slots, slot, pos, at, depth, precise)

    return lax.fori_loop(0, blocks, step, zeros_alike((tile.shape[0], n), precise, tile))


def _transposed_product(tile: Array, slots: Slots, slot: Array, pos: Array, precise: DTypeLike) -> Array:
    """Tile [r, n] @ matrix.T [n, k], block after block of the result's columns."""
    k, n = slots.words.shape[1:]
    depth, blocks = _split(k, n, tile.shape[0])
    tile = tile.astype(precise)

    def step(i, out):
        at = jnp.minimum(i * depth, k - depth)
        block = _block(slots, slot, pos, at, depth, precise)
        part = lax.dot_general(tile, block, (((1,), (1,)), ((), ())))
        return lax.dynamic_update_slice_in_dim(out, part, at, 1)

    return lax.fori_loop(0, blocks, step, zeros_alike((tile.shape[0], k), precise, tile))


def _block(slots: Slots, slot: Array, pos: Array, at: Array, depth: int, precise: DTypeLike) -> Array:
    """Rows at..at + depth of one slot's matrix, decoded: [depth, n]."""
    packed, _, n = slots.words.shape

    def cut(stack, index):
        # 32 bits also where the loop counts in 64.
        return lax.dynamic_slice(stack, (index, at.astype(jnp.int32), jnp.int32(0)), (1, depth, n))[0]

    if slots.dense is None:
        part = cut(slots.words, slot)
        return decode(part, pos, precise) if part.dtype == jnp.uint16 else part.astype(precise)
    return lax.cond(
        slot < packed,
        lambda: decode(cut(slots.words, slot), pos, precise),
        lambda: cut(slots.dense, slot - packed).astype(precise),
    )


def _product_of_codes(tile: Array, slots: Slots, slot: Array, pos: Array, precise: DTypeLike) -> Array:
    """Tile [r, k] @ matrix [k, n] of codes."""
    blocks = _CodeBlocks(slots, slot, pos, precise)
    inputs = tile.reshape(tile.shape[0], *blocks.shape)
    several, _, depth = blocks.size

    def step(i, total):
        group, run, first = blocks.start(i)
        part = lax.dynamic_slice(inputs, (0, group, run, first), (tile.shape[0], *blocks.size))
        part = part.reshape(tile.shape[0], several * depth).astype(precise)
        levels, scale = blocks.levels(i), blocks.scale(i)
        if several == 1:
            return total + part @ levels[0] * scale[0]
        return total + part @ (levels * scale).reshape(several * depth, -1)

    start = zeros_alike((tile.shape[0], slots.words.shape[2]), precise, tile)
    return lax.fori_loop(0, blocks.count, step, start)


def _transposed_product_of_codes(tile: Array, slots: Slots, slot: Array, pos: Array, precise: DTypeLike) -> Array:
    """Tile [r, n] @ matrix.T [n, k] of codes."""
    blocks = _CodeBlocks(slots, slot, pos, precise)
    several, _, depth = blocks.size
    tile = tile.astype(precise)

    def step(i, out):
        weights = (blocks.levels(i) * blocks.scale(i)).reshape(several * depth, -1)
        part = lax.dot_general(tile, weights, (((1,), (1,)), ((), ()))).reshape(-1, *blocks.size)
        return lax.dynamic_update_slice(out, part, (0, *blocks.start(i)))

    out = lax.fori_loop(0, blocks.count, step, zeros_alike((tile.shape[0], *blocks.shape), precise, tile))
    return out.reshape(tile.shape[0], -1)


class _CodeBlocks:
    """One member's matrix of codes in blocks of equal size: a run of several groups, or a part of a run of one."""

    def __init__(self, slots: Slots, slot: Array, pos: Array, precise: DTypeLike):
        self._slot, self._pos, self._precise, self._bits = slot, pos, precise, slots.bits
        number, groups, n = slots.scales.shape
        splits = QUARTERS[slots.bits]
        run = slots.inputs // groups // splits
        self.shape = (groups, splits, run)
        limit = _BLOCK_OF_CODES // n
        several = _divisor(groups, limit // run)
        self.size = (several, 1, run if several > 1 else _divisor(run, limit))
        self._codes = slots.words.reshape(number, groups, -1, run, n)
        self._scales = slots.scales
        self._parts = run // self.size[2]
        self.count = groups // several * splits * self._parts

    def start(self, i: Array) -> tuple[Array, Array, Array]:
        """The first group, the run, and the first input in the run."""
        i = i.astype(jnp.int32)  # also where the loop counts in 64 bits
        whole, part = i // self._parts, i % self._parts
        return whole // self.shape[1] * self.size[0], whole % self.shape[1], part * self.size[2]

    def levels(self, i: Array) -> Array:
        """Coefficient times level of block i, [groups, depth, n]."""
        (group, run, first), (several, _, depth) = self.start(i), self.size
        size = (1, several, 1, depth, self._codes.shape[4])
        planes = [
            lax.dynamic_slice(self._codes, (self._slot, group, plane, first, 0), size)[0, :, 0]
            for plane in planes_of(run, self._bits)
        ]
        return decode_run(planes, run, self._pos, self._precise)

    def scale(self, i: Array) -> Array:
        """Of the groups of block i, [groups, 1, n]."""
        size = (1, self.size[0], self._scales.shape[2])
        scale = lax.dynamic_slice(self._scales, (self._slot, self.start(i)[0], 0), size)[0, :, None]
        return scale.astype(self._precise)


def _divisor(size: int, limit: int) -> int:
    """The largest divisor of `size` that is not above the limit, or 1."""
    return max(part for part in range(1, size + 1) if size % part == 0 and part <= max(limit, 1))


def _split(k: int, n: int, rows: int) -> tuple[int, int]:
    """Height of a block and how many there are: about equal, and not above the size that suits the rows."""
    limit = next(size for most, size in _BLOCKS if rows <= most)
    blocks = -(-k * n // limit)
    depth = min(k, -(-k // (8 * blocks)) * 8)
    return depth, -(-k // depth)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _floats(x: Array, dtype: DTypeLike) -> Array:
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)
