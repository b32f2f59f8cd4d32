"""What the Triton kernels of attention with a pair bias share: where tiles lie, how they are loaded, the logits.

Programs go through batch, head, row and tile, the last fastest: those that run at one time share the keys of a few rows
and the bias of one head, which a GPU's second-level cache holds.

Letters: B batch, S rows, N queries and keys, H heads, D head size, R and C queries and keys of a tile.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.evo_attention.reference import Options
from pallas_kernels.flash_attention.triton_tiles import LOG2_E, Tiles, flat, load, store, upright

MAX_DIM = 128  # of a head: accumulators are kept whole in registers


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is static of a call, and what follows from it within a kernel."""

    batch: int
    rows: int
    length: int
    heads: int
    dim: int
    scale: float
    tiles: Tiles

    @classmethod
    def of(cls, q: Array, options: Options, tiles: dict[tuple[int, int], Tiles]) -> "Problem":
        """Of q `[B,S,N,H,D]`; `tiles` by (bytes of an element, padded head size)."""
        batch, rows, length, heads, dim = q.shape
        if dim > MAX_DIM:
            raise NotImplementedError(f"the Triton kernels take heads of up to {MAX_DIM}, got {dim}")
        chosen = tiles[q.dtype.itemsize, max(32, pl.next_power_of_2(dim))]
        chosen = dataclasses.replace(
            chosen,
            rows=options.block_q or _fit(chosen.rows, length),
            columns=options.block_k or _fit(chosen.columns, length),
        )
        return cls(batch, rows, length, heads, dim, options.scale, chosen)

    @property
    def query_tiles(self) -> int:
        """Tiles of queries."""
        return pl.cdiv(self.length, self.tiles.rows)

    @property
    def key_tiles(self) -> int:
        """Tiles of keys."""
        return pl.cdiv(self.length, self.tiles.columns)

    def grid(self, tiles: int) -> tuple[int]:
        """Programs, for `tiles` of every row and head."""
        return (self.batch * self.heads * self.rows * tiles,)

    def place(self, tiles: int) -> tuple["Place", Array]:
        """Row and head of this program, and which of `tiles` is its."""
        rest, tile = _divide(pl.program_id(0), tiles)
        rest, row = _divide(rest, self.rows)
        batch, head = _divide(rest, self.heads)
        return Place(self, batch, row, head), tile

    def place_of_pair(self) -> tuple[Array, "Place", Array, Array]:
        """Part, head, and tiles of queries and keys of this program; every part has all pairs of tiles."""
        rest, key_tile = _divide(pl.program_id(0), self.key_tiles)
        rest, query_tile = _divide(rest, self.query_tiles)
        rest, head = _divide(rest, self.heads)
        part, batch = _divide(rest, self.batch)
        return part, Place(self, batch, jnp.int32(0), head), query_tile, key_tile

    def queries(self, tile: Array) -> Array:
        """Indices of a tile's queries."""
        return tile * self.tiles.rows + jnp.arange(self.tiles.rows, dtype=jnp.int32)

    def keys(self, tile: Array) -> Array:
        """Indices of a tile's keys."""
        return tile * self.tiles.columns + jnp.arange(self.tiles.columns, dtype=jnp.int32)

    def walk(self, size: int, step: Callable[..., Any], carry: Any) -> Any:
        """Runs `step(tile, carry, ragged)` over all tiles of `size`; the last alone may be `ragged`: reach beyond."""
        whole = self.length // size
        carry = lax.fori_loop(jnp.int32(0), jnp.int32(whole), lambda tile, carry: step(tile, carry, False), carry)
        return step(jnp.int32(whole), carry, True) if self.length % size else carry


@dataclasses.dataclass(frozen=True)
class Place:
    """One row and head. Indices are those of a tile; where it is `ragged`, what lies beyond the end is not touched."""

    problem: Problem
    batch: Array
    row: Array
    head: Array

    def load(self, ref: Any, index: Array, ragged: bool) -> Array:
        """[n, padded D] of a `[B,S,N,H,D]` array; zeros beyond."""
        where, feature_inside = self._features(index)
        return load(ref, where, upright(self._inside(index, ragged)), feature_inside)

    def store(self, ref: Any, index: Array, ragged: bool, value: Array) -> None:
        """Writes what `load` would read."""
        where, feature_inside = self._features(index)
        store(ref, where, value, upright(self._inside(index, ragged)), feature_inside)

    def load_numbers(self, ref: Any, index: Array, ragged: bool) -> Array:
        """[n] of a `[B,S,H,N]` array; zeros beyond."""
        return load(ref, (self.batch, self.row, self.head, index), self._inside(index, ragged))

    def store_numbers(self, ref: Any, index: Array, ragged: bool, value: Array) -> None:
        """Writes what `load_numbers` would read."""
        store(ref, (self.batch, self.row, self.head, index), value, self._inside(index, ragged))

    def load_offsets(self, lse_ref: Any, index: Array, ragged: bool) -> Array:
        """[n]: the log-sum-exp in base 2; infinity beyond and where nothing is seen, so that weights are zero."""
        lse = self.load_numbers(lse_ref, index, ragged)
        nothing = lse == -jnp.inf
        inside = self._inside(index, ragged)
        return jnp.where(nothing if inside is None else nothing | ~inside, jnp.inf, lse * LOG2_E)

    def load_mask(self, mask_ref: Any, index: Array, ragged: bool) -> Array | None:
        """[n], to be added to the logits of keys: -inf beyond; None where nothing is to be added."""
        inside = self._inside(index, ragged)
        if mask_ref is None:
            return None if inside is None else jnp.where(inside, 0.0, -jnp.inf)
        mask = load(mask_ref, (self.batch, self.row, index), inside)
        return mask if inside is None else jnp.where(inside, mask, -jnp.inf)

    def load_bias(self, ref: Any, query: Array, key: Array, *ragged: bool) -> Array | None:
        """[queries, keys] of a `[B,H,N,N]` array; zeros beyond; None where there is none."""
        if ref is None:
            return None
        where = self.batch, self.head, query[:, None], key[None, :]
        return load(ref, where, *self._inside_both(query, key, *ragged)).astype(jnp.float32)

    def store_bias(self, ref: Any, part: Array, query: Array, key: Array, *ragged: bool, value: Array) -> None:
        """Writes what `load_bias` would read, to `part` of a `[P,B,H,N,N]` array."""
        where = part, self.batch, self.head, query[:, None], key[None, :]
        store(ref, where, value, *self._inside_both(query, key, *ragged))

    def _features(self, index: Array) -> tuple[tuple[Any, ...], Array | None]:
        dim = self.problem.dim
        feature = jnp.arange(max(16, pl.next_power_of_2(dim)), dtype=jnp.int32)[None, :]
        where = self.batch, self.row, index[:, None], self.head, feature
        return where, None if feature.size == dim else feature < dim

    def _inside_both(self, query: Array, key: Array, query_ragged: bool, key_ragged: bool) -> tuple[Array | None, ...]:
        return upright(self._inside(query, query_ragged)), flat(self._inside(key, key_ragged))

    def _inside(self, index: Array, ragged: bool) -> Array | None:
        return index < self.problem.length if ragged else None


def logits_of(products: Array, scale: float, bias: Array | None, mask: Array | None) -> Array:
    """Products of q and k, scaled, plus bias and mask where there are any."""
    logits = products * scale
    for added in (bias, mask):
        logits = logits if added is None else logits + added
    return logits


def _fit(tile: int, length: int) -> int:
    """The tile, halved as often as that saves an eighth of the work, down to 64: what a warp group multiplies."""
    tile = min(tile, max(16, pl.next_power_of_2(length)))
    while tile > 64 and -(-length // tile) * tile - -(-length // (tile // 2)) * (tile // 2) > length // 8:
        tile //= 2
    return tile


def _divide(value: Array, by: int) -> tuple[Array, Array]:
    return lax.div(value, jnp.int32(by)), lax.rem(value, jnp.int32(by))
