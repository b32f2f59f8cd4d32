"""Two Pallas kernels on the Triton backend (NVIDIA, AMD).

The first takes a tile of rows, the heads of a group of several samples, over a piece of the prefix; pieces run side by
side, so that a few prompts fill a GPU. The second takes the heads of one group of one sample over its suffix, and
merges what the pieces gave (flash decoding). Both use an online softmax in base 2.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import output_like
from pallas_kernels.flash_attention.triton_tiles import LOG2_E, check, dot, load, store, upright

_HIDDEN = -1e30  # largest logit of a row that saw none yet: finite, so that no difference of infinities is taken
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
    rows = min(_ROWS, _power_of_two(samples * group))
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
    program, piece = _divided(pl.program_id(0), pieces)
    program, tile = _divided(program, tiles)
    batch, kv_head = _divided(program, kv_heads)
    row = tile * rows + jnp.arange(rows, dtype=jnp.int32)
    sample, member = lax.div(row, jnp.int32(group)), lax.rem(row, jnp.int32(group))
    real, head = sample < q_ref.shape[1], kv_head * group + member
    feature, inside = _features(q_ref.shape[3])
    where = (batch, sample[:, None], head[:, None], feature[None, :])
    q, length = load(q_ref, where, upright(real), inside), lengths[batch]

    def keys_at(ref, column):
        return load(ref, (batch, kv_head, column[:, None], feature[None, :]), upright(column < length), inside)

    steps = pl.cdiv(k_ref.shape[2], pieces * _COLUMNS)
    low = piece * steps
    high = jnp.minimum(low + steps, lax.div(length + (_COLUMNS - 1), jnp.int32(_COLUMNS)))
    out, peak, total = _attended(q, low, high, length, k_ref, v_ref, keys_at, scale, _nothing(q))
    where = (piece, batch, sample[:, None], head[:, None], feature[None, :])
    store(out_ref, where, out, upright(real), inside)
    store(peak_ref, (piece, batch, sample, head), peak, real)
    store(total_ref, (piece, batch, sample, head), total, real)


def _suffix_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, lengths: Any, partial_ref: Any, peaks_ref: Any, totals_ref: Any, out_ref: Any,
    *, samples: int, pieces: int, group: int, kv_heads: int, scale: float,
) -> None:  # fmt: skip
    program, kv_head = _divided(pl.program_id(0), kv_heads)
    batch, sample = _divided(program, samples)
    member = jnp.arange(_power_of_two(group), dtype=jnp.int32)
    real, head = member < group, kv_head * group + member
    feature, inside = _features(q_ref.shape[3])
    where = (batch, sample, head[:, None], feature[None, :])
    q, length = load(q_ref, where, upright(real), inside), lengths[batch, sample]

    def keys_at(ref, column):
        where = (batch, sample, kv_head, column[:, None], feature[None, :])
        return load(ref, where, upright(column < length), inside)

    high = lax.div(jnp.maximum(length, 0) + (_COLUMNS - 1), jnp.int32(_COLUMNS))
    state = _attended(q, jnp.int32(0), high, length, k_ref, v_ref, keys_at, scale, _nothing(q))

    def merge(piece, state):
        out, peak, total = state
        own = (piece, batch, sample, head)
        other_peak, other_total = load(peaks_ref, own, real), load(totals_ref, own, real)
        other = load(partial_ref, (piece, batch, sample, head[:, None], feature[None, :]), upright(real), inside)
        new_peak = jnp.maximum(peak, other_peak)
        shrink, other_shrink = jnp.exp2(peak - new_peak), jnp.exp2(other_peak - new_peak)
        out = out * shrink[:, None] + other * other_shrink[:, None]
        return out, new_peak, total * shrink + other_total * other_shrink

    out, _, total = lax.fori_loop(0, pieces, merge, state)
    store(out_ref, where, out / jnp.where(total == 0, 1.0, total)[:, None], upright(real), inside)


def _attended(q, low, high, length, k_ref, v_ref, keys_at, scale, state):
    """Unnormalised output, largest logit and sum of the weights of rows over the tiles low..high of keys."""

    def step(j, state):
        out, peak, total = state
        column = j * _COLUMNS + jnp.arange(_COLUMNS, dtype=jnp.int32)
        logits = dot(q, keys_at(k_ref, column), 1) * scale
        logits = jnp.where((column < length)[None, :], logits, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        weights, shrink = jnp.exp2(logits - new_peak[:, None]), jnp.exp2(peak - new_peak)
        values = keys_at(v_ref, column)
        out = out * shrink[:, None] + dot(weights.astype(values.dtype), values, 0)
        return out, new_peak, total * shrink + jnp.sum(weights, axis=1)

    return lax.fori_loop(low, high, step, state)


def _nothing(q: Array) -> tuple[Array, Array, Array]:
    none = jnp.zeros(q.shape[0], jnp.float32)
    return jnp.zeros(q.shape, jnp.float32), none + _HIDDEN, none


def _features(dim: int) -> tuple[Array, Array | None]:
    feature = jnp.arange(_power_of_two(dim), dtype=jnp.int32)
    return feature, None if feature.size == dim else (feature < dim)[None, :]


def _divided(index: jax.Array, by: int) -> tuple[Array, Array]:
    return lax.div(index, jnp.int32(by)), lax.rem(index, jnp.int32(by))


def _power_of_two(size: int) -> int:
    """That holds `size`, and a side of a product: at least 16."""
    return max(16, 1 << math.ceil(math.log2(size)))
