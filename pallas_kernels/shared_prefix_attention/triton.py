"""Two Pallas kernels on the Triton backend (NVIDIA, AMD).

The first takes a tile of rows, the heads of a group of several samples, over a piece of the prefix; pieces run side by
side, so that a few prompts fill a GPU. The second takes the heads of one group of one sample over its suffix, and
merges what the pieces gave (flash decoding). Both use an online softmax in base 2.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import output_like
from pallas_kernels.flash_attention.triton_decoding import attended, divided, features, merged, normalised, side
from pallas_kernels.flash_attention.triton_tiles import LOG2_E, check, load, store, upright

_ROWS, _COLUMNS = 64, 64
_PIECE, _PIECES = 512, 16  # keys of a piece at least, and pieces at most
_WARPS, _STAGES = 4, 2


def forward(
    q: Float[Array, "b n h d"],
    prefix_k: Float[Array, "b p hkv d"],
    prefix_v: Float[Array, "b p hkv d"],
    prefix_lengths: Int[Array, " b"],
    suffix_k: Float[Array, "b n s hkv d"],
    suffix_v: Float[Array, "b n s hkv d"],
    suffix_lengths: Int[Array, "b n"],
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "b n h d"]:
    """See `shared_prefix_attention`."""
    check(interpret, q)
    (batch, samples, heads, _), (_, keys, kv_heads, _) = q.shape, prefix_k.shape
    group = heads // kv_heads
    # Heads before tokens: where the caller's arrays lie so, and ours of them are views, nothing is copied.
    prefix_k, prefix_v = (x.transpose(0, 2, 1, 3) for x in (prefix_k, prefix_v))
    suffix_k, suffix_v = (x.transpose(0, 1, 3, 2, 4) for x in (suffix_k, suffix_v))
    pieces = min(_PIECES, pl.cdiv(keys, _PIECE))
    rows = min(_ROWS, side(samples * group))
    tiles = pl.cdiv(samples * group, rows)
    settings = {
        "compiler_params": plt.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        "interpret": interpret,
    }
    rules = {"group": group, "kv_heads": kv_heads, "scale": scale * LOG2_E}
    partial, peaks, totals = pl.pallas_call(
        functools.partial(_prefix_kernel, rows=rows, tiles=tiles, pieces=pieces, **rules),
        out_shape=(
            output_like((pieces, *q.shape), jnp.float32, q),
            output_like((pieces, batch, samples, heads), jnp.float32, q),
            output_like((pieces, batch, samples, heads), jnp.float32, q),
        ),
        grid=(batch * kv_heads * tiles * pieces,),
        name="shared_prefix_attention_prefix",
        **settings,
    )(q, prefix_k, prefix_v, prefix_lengths)
    return pl.pallas_call(
        functools.partial(_suffix_kernel, samples=samples, pieces=pieces, **rules),
        out_shape=output_like(q.shape, q.dtype, q),
        grid=(batch * samples * kv_heads,),
        name="shared_prefix_attention_suffix",
        **settings,
    )(q, suffix_k, suffix_v, suffix_lengths, partial, peaks, totals)


def _prefix_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, lengths: Any, out_ref: Any, peak_ref: Any, total_ref: Any, *,
    rows: int, tiles: int, pieces: int, group: int, kv_heads: int, scale: float,
) -> None:  # fmt: skip
    program, piece = divided(pl.program_id(0), pieces)
    program, tile = divided(program, tiles)
    batch, kv_head = divided(program, kv_heads)
    row = tile * rows + jnp.arange(rows, dtype=jnp.int32)
    sample, member = lax.div(row, jnp.int32(group)), lax.rem(row, jnp.int32(group))
    real, head = sample < q_ref.shape[1], kv_head * group + member
    feature, inside = features(q_ref.shape[3])
    where = (batch, sample[:, None], head[:, None], feature[None, :])
    q, length = load(q_ref, where, upright(real), inside), lengths[batch]

    def place(column):
        return (batch, kv_head, column[:, None], feature[None, :]), upright(column < length), inside

    steps = pl.cdiv(k_ref.shape[2], pieces * _COLUMNS)
    low = piece * steps
    high = jnp.minimum(low + steps, lax.div(length + (_COLUMNS - 1), jnp.int32(_COLUMNS)))
    out, peak, total = attended(q, k_ref, v_ref, place, low, high, length, columns=_COLUMNS, scale=scale)
    where = (piece, batch, sample[:, None], head[:, None], feature[None, :])
    store(out_ref, where, out, upright(real), inside)
    store(peak_ref, (piece, batch, sample, head), peak, real)
    store(total_ref, (piece, batch, sample, head), total, real)


def _suffix_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, lengths: Any, partial_ref: Any, peaks_ref: Any, totals_ref: Any, out_ref: Any,
    *, samples: int, pieces: int, group: int, kv_heads: int, scale: float,
) -> None:  # fmt: skip
    program, kv_head = divided(pl.program_id(0), kv_heads)
    batch, sample = divided(program, samples)
    member = jnp.arange(side(group), dtype=jnp.int32)
    real, head = member < group, kv_head * group + member
    feature, inside = features(q_ref.shape[3])
    where = (batch, sample, head[:, None], feature[None, :])
    q, length = load(q_ref, where, upright(real), inside), lengths[batch, sample]

    def place(column):
        return (batch, sample, kv_head, column[:, None], feature[None, :]), upright(column < length), inside

    high = lax.div(jnp.maximum(length, 0) + (_COLUMNS - 1), jnp.int32(_COLUMNS))
    state = attended(q, k_ref, v_ref, place, jnp.int32(0), high, length, columns=_COLUMNS, scale=scale)

    def merge(piece, state):
        own = (piece, batch, sample, head)
        out = load(partial_ref, (piece, batch, sample, head[:, None], feature[None, :]), upright(real), inside)
        return merged(state, (out, load(peaks_ref, own, real), load(totals_ref, own, real)))

    store(out_ref, where, normalised(lax.fori_loop(0, pieces, merge, state)), upright(real), inside)
