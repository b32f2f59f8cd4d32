"""Two Pallas kernels on the Triton backend (NVIDIA, AMD).

In the first a program takes the query heads of one group of one row over a part of the row's own tokens; the parts of a
row are equal, and how many there are depends on shapes alone, so that a few rows fill a GPU and results do not change
from run to run. Addresses of keys come from the table, tile by tile. The second merges the parts (flash decoding).
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import output_like
from pallas_kernels.flash_attention.triton_decoding import (
    attended,
    divided,
    features,
    merged,
    normalised,
    nothing,
    side,
)
from pallas_kernels.flash_attention.triton_tiles import LOG2_E, check, load, store, upright

_ROWS = 32  # query heads of a tile, at most
_COLUMNS = {2: 64, 4: 32}  # keys of a tile, by the bytes of an operand of the products
_PROGRAMS = 1024  # to fill a GPU with
_SPLITS, _SPLIT = 32, 256  # parts of a row at most, and tokens of a part at least
_WARPS, _STAGES = 4, 3


def forward(
    q: Float[Array, "b h d"],
    k_pages: Float[Array, "l hkv p page d"],
    v_pages: Float[Array, "l hkv p page d"],
    page_table: Int[Array, "b n"],
    lengths: Int[Array, " b"],
    layer: Int[Array, ""],
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "b h d"]:
    """See `paged_attention`."""
    check(interpret, q)
    check(interpret, k_pages)
    (batch, heads, _), kv_heads, page = q.shape, k_pages.shape[1], k_pages.shape[3]
    group = heads // kv_heads
    rows = min(_ROWS, side(group))
    tiles = pl.cdiv(group, rows)
    programs = batch * kv_heads * tiles
    splits = max(1, min(_SPLITS, pl.cdiv(_PROGRAMS, programs), page_table.shape[1] * page // _SPLIT))
    settings = {
        "compiler_params": plt.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        "interpret": interpret,
    }
    columns = _COLUMNS[jnp.promote_types(q.dtype, k_pages.dtype).itemsize]
    rules = {
        "rows": rows, "columns": columns, "tiles": tiles, "group": group, "kv_heads": kv_heads, "splits": splits
    }  # fmt: skip
    whole = output_like(q.shape, q.dtype, q)
    statistic = output_like((splits, batch, heads), jnp.float32, q)
    made = pl.pallas_call(
        functools.partial(_part_kernel, scale=scale * LOG2_E, **rules),
        out_shape=whole if splits == 1 else (output_like((splits, *q.shape), jnp.float32, q), statistic, statistic),
        grid=(programs * splits,),
        name="paged_attention",
        **settings,
    )(q, k_pages, v_pages, page_table, lengths, layer.reshape(1))
    if splits == 1:
        return made
    return pl.pallas_call(
        functools.partial(_merge_kernel, **rules),
        out_shape=whole,
        grid=(programs,),
        name="paged_attention_merge",
        **settings,
    )(*made, lengths)


def _part_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, table: Any, lengths: Any, layer: Any, out_ref: Any, *statistics: Any,
    rows: int, columns: int, tiles: int, group: int, kv_heads: int, splits: int, scale: float,
) -> None:  # fmt: skip
    program, split = divided(pl.program_id(0), splits)
    batch, kv_head, head, real = _rows(program, rows, tiles, group, kv_heads)
    feature, inside = features(q_ref.shape[2])
    where = (batch, head[:, None], feature[None, :])
    q = load(q_ref, where, upright(real), inside).astype(jnp.promote_types(q_ref.dtype, k_ref.dtype))
    length, layer = lengths[batch], layer[0]
    _, _, pages, page, _ = k_ref.shape

    def place(column):
        seen = column < length
        index, slot = divided(column, page)
        index = jnp.clip(load(table, (batch, index), seen), 0, pages - 1)
        return (layer, kv_head, index[:, None], slot[:, None], feature[None, :]), upright(seen), inside

    steps, part = _steps(length, columns, splits)
    low = split * part
    high = jnp.minimum(low + part, steps)
    state = attended(q, k_ref, v_ref, place, low, high, length, columns=columns, scale=scale)
    if splits == 1:
        store(out_ref, where, normalised(state), upright(real), inside)
        return

    @pl.when(low < high)
    def _():
        out, *others = state
        store(out_ref, (split, *where), out, upright(real), inside)
        for ref, value in zip(statistics, others):
            store(ref, (split, batch, head), value, real)


def _merge_kernel(
    parts: Any, peaks: Any, totals: Any, lengths: Any, out_ref: Any, *,
    rows: int, columns: int, tiles: int, group: int, kv_heads: int, splits: int,
) -> None:  # fmt: skip
    batch, _, head, real = _rows(pl.program_id(0), rows, tiles, group, kv_heads)
    feature, inside = features(out_ref.shape[2])
    where = (batch, head[:, None], feature[None, :])

    def merge(split, state):
        out = load(parts, (split, *where), upright(real), inside)
        peak, total = (load(ref, (split, batch, head), real) for ref in (peaks, totals))
        return merged(state, (out, peak, total))

    steps, part = _steps(lengths[batch], columns, splits)
    used = lax.div(steps + part - 1, jnp.maximum(part, 1))
    state = lax.fori_loop(0, used, merge, nothing(jnp.zeros((rows, feature.size), jnp.float32)))
    store(out_ref, where, normalised(state), upright(real), inside)


def _rows(program: Any, rows: int, tiles: int, group: int, kv_heads: int) -> tuple[Any, Any, Array, Array]:
    """Row of the batch, key/value head, query heads of a tile, and which of these are real."""
    program, tile = divided(program, tiles)
    batch, kv_head = divided(program, kv_heads)
    member = tile * rows + jnp.arange(rows, dtype=jnp.int32)
    return batch, kv_head, kv_head * group + member, member < group


def _steps(length: Array, columns: int, splits: int) -> tuple[Array, Array]:
    """Tiles of keys of a row, and of each of its parts."""
    steps = lax.div(length + (columns - 1), jnp.int32(columns))
    return steps, lax.div(steps + (splits - 1), jnp.int32(splits))
