"""What the Triton kernels of attention share: how rows, keys and tiles lie, which tiles a tile sees, the mask.

The query heads of a key/value head are rows of one tile: row r of a tile is token r // G, head r % G of the group. Keys
are then read once for the whole group, their gradients are summed over it in registers, and a decode step's single
token still fills a tile with G rows.

Letters: B batch, T queries, S keys, H and Hkv heads, G = H / Hkv, D head size, R and C rows and columns of a tile.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int

from pallas_kernels.flash_attention.xla import Ids
from pallas_kernels.tiles import check_tiles

LOG2_E = math.log2(math.e)
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_MAX_DIM = 256  # of a head: accumulators are kept whole in registers

Step = tuple[Array, Array, bool]
"""First tile, last + 1, and whether some of them are seen in part only: they need a mask."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a tile of logits, and how a program is run.

    Attributes:
      rows: queries, those of all heads of a group counted.
      columns: keys.
      warps: warps a program.
      stages: tiles in flight in the software pipeline.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2

    def __post_init__(self):
        check_tiles(self)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a tile: token[R], query head[R], and real[R], False past the last row."""

    token: Array
    head: Array
    real: Array | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is static of a call, and what follows from it within a kernel."""

    batch: int
    queries: int
    keys: int
    kv_heads: int
    group: int
    dim: int
    causal: bool
    window: int | None
    scale: float
    tiles: Tiles

    @classmethod
    def of(
        cls,
        q: Array,
        k: Array,
        *,
        causal: bool,
        window: int | None,
        scale: float,
        tiles: Mapping[tuple[int, int], Tiles] | Tiles,
    ) -> "Problem":
        """Of arrays q `[B,T,H,D]` and k `[B,S,Hkv,D]`; `tiles` by (bytes of an element, padded head size)."""
        (batch, queries, heads, dim), (_, keys, kv_heads, _) = q.shape, k.shape
        group = heads // kv_heads
        if not isinstance(tiles, Tiles):
            tiles = tiles[q.dtype.itemsize, max(64, _power_of_two(dim))]
        tiles = dataclasses.replace(
            tiles,
            rows=min(tiles.rows, max(16, _power_of_two(queries * group))),
            columns=min(tiles.columns, max(16, _power_of_two(keys))),
        )
        return cls(batch, queries, keys, kv_heads, group, dim, causal, window, scale, tiles)

    @property
    def row_tiles(self) -> int:
        """Tiles of the rows of one key/value head."""
        return pl.cdiv(self.queries * self.group, self.tiles.rows)

    @property
    def key_tiles(self) -> int:
        """Tiles of the keys."""
        return pl.cdiv(self.keys, self.tiles.columns)

    def place(self, tiles: int) -> tuple[Array, Array, Array]:
        """Batch row, key/value head and tile (of `tiles` a head) of this program; neighbours share a head."""
        program = pl.program_id(0)
        pair = lax.div(program, jnp.int32(tiles))
        heads = jnp.int32(self.kv_heads)
        return lax.div(pair, heads), lax.rem(pair, heads), lax.rem(program, jnp.int32(tiles))

    def rows(self, tile: Array, kv_head: Array) -> Rows:
        """Where the rows of a tile are; past the last one tokens lie outside the array."""
        row = tile * self.tiles.rows + jnp.arange(self.tiles.rows, dtype=jnp.int32)
        group, count = jnp.int32(self.group), self.queries * self.group
        real = row < count if count % self.tiles.rows else None
        return Rows(lax.div(row, group), kv_head * self.group + lax.rem(row, group), real)

    def columns(self, tile: Array) -> Array:
        """Key indices of a tile."""
        return tile * self.tiles.columns + jnp.arange(self.tiles.columns, dtype=jnp.int32)

    def load_rows(self, ref: Any, batch: Array, rows: Rows) -> Array:
        """[R, padded D] of a `[B,T,H,D]` array; zeros outside."""
        feature = self._features()
        where = (batch, rows.token[:, None], rows.head[:, None], feature[None, :])
        return load(ref, where, upright(rows.real), self._inside(feature))

    def store_rows(self, ref: Any, batch: Array, rows: Rows, value: Array) -> None:
        """Writes what `load_rows` would read."""
        feature = self._features()
        where = (batch, rows.token[:, None], rows.head[:, None], feature[None, :])
        store(ref, where, value, upright(rows.real), self._inside(feature))

    def load_keys(self, ref: Any, batch: Array, kv_head: Array, column: Array) -> Array:
        """[C, padded D] of a `[B,S,Hkv,D]` array; zeros outside."""
        feature = self._features()
        where = (batch, column[:, None], kv_head, feature[None, :])
        return load(ref, where, upright(self._real(column)), self._inside(feature))

    def store_keys(self, ref: Any, batch: Array, kv_head: Array, column: Array, value: Array) -> None:
        """Writes what `load_keys` would read."""
        feature = self._features()
        where = (batch, column[:, None], kv_head, feature[None, :])
        store(ref, where, value, upright(self._real(column)), self._inside(feature))

    def load_map(self, ref: Any, batch: Array, rows: Rows, column: Array) -> Array:
        """[R, C] of a `[B,T,S]` array; zeros outside."""
        where = (batch, rows.token[:, None], column[None, :])
        return load(ref, where, upright(rows.real), flat(self._real(column)))

    def store_map(self, ref: Any, batch: Array, rows: Rows, column: Array, value: Array) -> None:
        """Writes what `load_map` would read."""
        where = (batch, rows.token[:, None], column[None, :])
        store(ref, where, value, upright(rows.real), flat(self._real(column)))

    def _features(self) -> Array:
        return jnp.arange(max(16, _power_of_two(self.dim)), dtype=jnp.int32)

    def _inside(self, feature: Array) -> Array | None:
        return None if feature.size == self.dim else (feature < self.dim)[None, :]

    def _real(self, column: Array) -> Array | None:
        return column < self.keys if self.keys % column.size else None

    def key_steps(self, tile: Array, batch: Array, seen: Any) -> list[Step]:
        """Ranges of key tiles that a tile of rows sees.

        `seen` is the reference of `seen_tiles(axis=1)`, or None where indices alone decide.
        """
        if seen is not None:
            return [(seen[batch, tile, 0], seen[batch, tile, 1], True)]
        rows, columns, group = self.tiles.rows, self.tiles.columns, self.group
        first = tile * rows // group
        last = jnp.minimum((tile * rows + (rows - 1)) // group, self.queries - 1)
        low = full_low = jnp.int32(0)
        high, full_high = jnp.int32(self.key_tiles), jnp.int32(self.keys // columns)
        if self.causal:
            high = jnp.minimum(last // columns + 1, high)
            full_high = jnp.minimum((first + 1) // columns, full_high)
        if self.window is not None:
            low = jnp.maximum(first + (1 - self.window), 0) // columns
            full_low = jnp.maximum(last + (columns - self.window), 0) // columns
        return _steps(
            (low, full_low, full_high, high), self.window is not None, self.causal or self.keys % columns != 0
        )

    def row_steps(self, tile: Array, batch: Array, seen: Any) -> list[Step]:
        """Ranges of row tiles that see a tile of keys; `seen` is that of `seen_tiles(axis=2)`.

        Padding has no part in the masks: rows past the end have no gradient, and keys past the end are not stored.
        """
        if seen is not None:
            return [(seen[batch, tile, 0], seen[batch, tile, 1], True)]
        rows, columns, group = self.tiles.rows, self.tiles.columns, self.group
        first, last = tile * columns, tile * columns + (columns - 1)
        low = full_low = jnp.int32(0)
        high = full_high = jnp.int32(self.row_tiles)
        if self.causal:
            low = first * group // rows
            full_low = (last * group + (rows - 1)) // rows
        if self.window is not None:
            window = min(self.window, self.queries)  # no more can matter, and the products stay within 32 bits
            high = jnp.minimum(((last + window) * group + (rows - 1)) // rows, high)
            full_high = jnp.minimum((first + window) * group // rows, full_high)
        return _steps((low, full_low, full_high, high), self.causal, self.window is not None)

    def load_row_ids(self, ids: Any, batch: Array, rows: Rows) -> tuple[Array, Array | None]:
        """Position and segment of every row, from the references of the ids."""
        q_segments, _, q_positions = ids
        where = (batch, rows.token)
        place = rows.token if q_positions is None else load(q_positions, where, rows.real).astype(jnp.int32)
        return place, None if q_segments is None else load(q_segments, where, rows.real)

    def load_key_segments(self, ids: Any, batch: Array, column: Array) -> Array | None:
        """Segment of every key."""
        return None if ids[1] is None else load(ids[1], (batch, column), self._real(column))

    def hide(self, logits: Array, place: Any, column: Any, own: Any, other: Any) -> Array:
        """Logits, minus infinity where the row at `place` (of segment `own`) does not see the key (of `other`).

        The ids lie along the axes of the logits: one as [n, 1], the other as [1, m].
        """
        tests = []
        if self.causal:
            tests.append(column <= place)
        if self.window is not None:
            tests.append(column > place - self.window)
        if self.keys % self.tiles.columns:
            tests.append(column < self.keys)
        if own is not None and other is not None:
            tests += [own == other, own != 0]
        return jnp.where(functools.reduce(jnp.logical_and, tests), logits, -jnp.inf) if tests else logits

    def seen_tiles(self, ids: Ids, *, axis: int) -> Int[Array, "b n 2"] | None:
        """First and last + 1 tile of keys that a tile of rows sees (axis 1), or of rows that see a tile of keys (2).

        None where indices alone decide, and the kernel knows by itself. Ids can only widen a range needlessly where
        those of a tile are not neighbours.
        """
        q_segments, kv_segments, q_positions = ids
        if q_segments is None and q_positions is None:
            return None
        token = jnp.arange(self.row_tiles * self.tiles.rows, dtype=jnp.int32) // self.group

        def of_rows(x):
            return x[:, jnp.minimum(token, self.queries - 1)].reshape(x.shape[0], self.row_tiles, self.tiles.rows)

        index = jnp.arange(self.queries, dtype=jnp.int32)[None]
        place = of_rows(index if q_positions is None else q_positions.astype(jnp.int32))
        first, last = (x[:, :, None] for x in _extent(place, place >= 0))
        start = jnp.arange(self.key_tiles, dtype=jnp.int32)[None, None] * self.tiles.columns
        seen = jnp.ones((self.batch, self.row_tiles, self.key_tiles), bool)
        if self.causal:
            seen &= start <= last
        if self.window is not None:
            seen &= start + (self.tiles.columns - 1) > first - self.window
        if q_segments is not None and kv_segments is not None:
            own = of_rows(q_segments)
            padding = -self.keys % self.tiles.columns
            other = jnp.pad(kv_segments, ((0, 0), (0, padding))).reshape(self.batch, self.key_tiles, -1)
            (own_low, own_high), (low, high) = _extent(own, own != 0), _extent(other, other != 0)
            seen &= (own_low[:, :, None] <= high[:, None]) & (own_high[:, :, None] >= low[:, None])
        other_axis = 3 - axis
        index = lax.broadcasted_iota(jnp.int32, seen.shape, other_axis)
        first = jnp.min(jnp.where(seen, index, seen.shape[other_axis]), axis=other_axis)
        last = jnp.max(jnp.where(seen, index + 1, 0), axis=other_axis)
        return jnp.stack([first, last], axis=-1)


def _steps(ends: tuple[Array, Array, Array, Array], before: bool, after: bool) -> list[Step]:
    """Tiles seen in part, in full, and in part again; without those in part where there are none."""
    low, full_low, full_high, high = ends
    full_low = jnp.clip(full_low, low, jnp.maximum(low, high))
    full_high = jnp.clip(full_high, full_low, jnp.maximum(full_low, high))
    steps = [(low, full_low, True)] if before else []
    steps.append((full_low, full_high, False))
    return [*steps, (full_high, high, True)] if after else steps


def walk(steps: list[Step], step: Callable[..., Any], carry: Any) -> Any:
    """Runs `step(index, carry, masked=...)` over the tiles of all ranges."""
    for low, high, masked in steps:
        carry = lax.fori_loop(low, high, functools.partial(step, masked=masked), carry)
    return carry


def _extent(x: Array, counted: Array) -> tuple[Array, Array]:
    """Smallest and largest of the counted ones along the last axis; the wrong way round where there is none."""
    limits = jnp.iinfo(x.dtype)
    return (
        jnp.min(jnp.where(counted, x, limits.max), axis=-1),
        jnp.max(jnp.where(counted, x, limits.min), axis=-1),
    )


def dot(a: Array, b: Array, contract_b: int) -> Array:
    """a[M,K] times b[K,N] (`contract_b` 0) or b[N,K] (1), float32."""
    return lax.dot_general(a, b, (((1,), (contract_b,)), ((), ())), preferred_element_type=jnp.float32)


def upright(x: Array | None) -> Array | None:
    """[n] -> [n, 1]."""
    return None if x is None else x[:, None]


def flat(x: Array | None) -> Array | None:
    """[n] -> [1, n]."""
    return None if x is None else x[None, :]


def load(ref: Any, where: tuple[Any, ...], *masks: Array | None) -> Array:
    """Loads a tile, zeros where a mask is False."""
    mask = _all(masks)
    return plt.load(ref.at[where]) if mask is None else plt.load(ref.at[where], mask=mask, other=0)


def store(ref: Any, where: tuple[Any, ...], value: Array, *masks: Array | None) -> None:
    """Stores a tile in the array's dtype, except where a mask is False."""
    plt.store(ref.at[where], value.astype(ref.dtype), mask=_all(masks))


def check(interpret: bool, q: Array) -> None:
    """Refuses what the kernels cannot do."""
    if q.dtype not in _DTYPES:
        raise NotImplementedError(f"the Triton kernels take bfloat16, float16 and float32, got {q.dtype}")
    if q.shape[-1] > _MAX_DIM:
        raise NotImplementedError(f"the Triton kernels take heads of up to {_MAX_DIM}, got {q.shape[-1]}")
    if interpret and jax.typeof(q).manual_axis_type.varying:
        raise NotImplementedError("JAX interprets kernels under shard_map only with check_vma=False")


def _all(masks: tuple[Array | None, ...]) -> Array | None:
    given = [mask for mask in masks if mask is not None]
    return functools.reduce(jnp.logical_and, given) if given else None


def _power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()
