"""The backward pass of attention as Pallas kernels on the Triton backend (NVIDIA, AMD).

Both recompute the weights tile by tile from the log-sum-exp. The first walks as the forward pass does and gives dq, and
for the other the product of output and cotangent of a row; the second takes a tile of keys over the rows that see
it, those of all heads of the group, and gives dk and dv. One program takes a whole sum, in a fixed order: no atomics.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.dispatch import output_like
from pallas_kernels.flash_attention.triton_tiles import (
    LOG2_E,
    Problem,
    Tiles,
    check,
    dot,
    flat,
    load,
    store,
    upright,
    walk,
)
from pallas_kernels.flash_attention.xla import Ids


def backward(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s hkv d"],
    v: Float[Array, "b s hkv d"],
    ids: Ids,
    out: Float[Array, "b t h d"],
    lse: Float[Array, "b h t"],
    d_out: Float[Array, "b t h d"],
    *,
    causal: bool,
    window: int | None,
    scale: float,
    tiles: tuple[Tiles | None, Tiles | None] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b s hkv d"], Float[Array, "b s hkv d"]]:
    """Gradients of q, k and v, from what `triton.forward` gave; `tiles` for dq, and for dk and dv."""
    check(interpret, q)
    rows_tiles, keys_tiles = tiles or (None, None)
    problem = Problem.of(q, k, causal=causal, window=window, scale=scale, tiles=rows_tiles or _ROWS_TILES)
    dq, delta = pl.pallas_call(
        functools.partial(_rows_kernel, problem=problem),
        out_shape=(output_like(q.shape, q.dtype, q), output_like(lse.shape, jnp.float32, q)),
        grid=(problem.batch * problem.kv_heads * problem.row_tiles,),
        compiler_params=plt.CompilerParams(num_warps=problem.tiles.warps, num_stages=problem.tiles.stages),
        interpret=interpret,
        name="flash_attention_dq",
    )(q, k, v, ids, problem.seen_tiles(ids, axis=1), out, lse, d_out)
    given = (q, k, v, ids, lse, delta, d_out)
    rules = {"causal": causal, "window": window, "interpret": interpret}
    return dq, *key_gradients(*given, scale=scale, tiles=keys_tiles, **rules)


def key_gradients(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s hkv d"],
    v: Float[Array, "b s hkv d"],
    ids: Ids,
    lse: Float[Array, "b h t"],
    delta: Float[Array, "b h t"],
    d_out: Float[Array, "b t h d"],
    *,
    causal: bool,
    window: int | None,
    scale: float,
    d_map: Float[Array, "b t s"] | None = None,
    tiles: Mapping[tuple[int, int], Tiles] | Tiles | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b s hkv d"], Float[Array, "b s hkv d"]]:
    """Gradients of k and v; `delta` is the mean of a row's gradients of its weights, weighted by them.

    `d_map` is the cotangent of the mean over heads of the weights, where there is one.
    """
    problem = Problem.of(q, k, causal=causal, window=window, scale=scale, tiles=tiles or _KEYS_TILES)
    return pl.pallas_call(
        functools.partial(_keys_kernel, problem=problem),
        out_shape=(output_like(k.shape, k.dtype, q), output_like(k.shape, k.dtype, q)),
        grid=(problem.batch * problem.kv_heads * problem.key_tiles,),
        compiler_params=plt.CompilerParams(num_warps=problem.tiles.warps, num_stages=problem.tiles.stages),
        interpret=interpret,
        name="flash_attention_dkv",
    )(q, k, v, ids, problem.seen_tiles(ids, axis=2), lse, delta, d_out, d_map)


def _rows_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    ids: Any,
    seen: Any,
    out_ref: Any,
    lse_ref: Any,
    d_out_ref: Any,
    dq_ref: Any,
    delta_ref: Any,
    *,
    problem: Problem,
) -> None:
    batch, kv_head, tile = problem.place(problem.row_tiles)
    if problem.causal:
        tile = problem.row_tiles - 1 - tile  # the tiles that see most first
    rows = problem.rows(tile, kv_head)
    where = (batch, rows.head, rows.token)
    q, (place, own) = problem.load_rows(q_ref, batch, rows), problem.load_row_ids(ids, batch, rows)
    out, d_out = problem.load_rows(out_ref, batch, rows), problem.load_rows(d_out_ref, batch, rows)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=1)
    store(delta_ref, where, delta, rows.real)
    offset = load(lse_ref, where, rows.real) * LOG2_E

    def step(j, dq, masked):
        column = problem.columns(j)
        keys = problem.load_keys(k_ref, batch, kv_head, column)
        logits = dot(q, keys, 1) * (problem.scale * LOG2_E)
        if masked:
            other = problem.load_key_segments(ids, batch, column)
            logits = problem.hide(logits, upright(place), flat(column), upright(own), flat(other))
        weights = jnp.exp2(logits - offset[:, None])
        d_weights = dot(d_out, problem.load_keys(v_ref, batch, kv_head, column), 1)
        return dq + dot((weights * (d_weights - delta[:, None])).astype(keys.dtype), keys, 0)

    dq = walk(problem.key_steps(tile, batch, seen), step, jnp.zeros(q.shape, jnp.float32))
    problem.store_rows(dq_ref, batch, rows, dq * problem.scale)


def _keys_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    ids: Any,
    seen: Any,
    lse_ref: Any,
    delta_ref: Any,
    d_out_ref: Any,
    d_map_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    problem: Problem,
) -> None:
    batch, kv_head, tile = problem.place(problem.key_tiles)
    column = problem.columns(tile)
    keys, values = (problem.load_keys(ref, batch, kv_head, column) for ref in (k_ref, v_ref))
    other = problem.load_key_segments(ids, batch, column)

    def step(i, state, masked):
        # Transposed, [keys, rows]: the weights are then at hand as the left factor of both sums.
        dk, dv = state
        rows = problem.rows(i, kv_head)
        where = (batch, rows.head, rows.token)
        q, d_out = problem.load_rows(q_ref, batch, rows), problem.load_rows(d_out_ref, batch, rows)
        offset, delta = load(lse_ref, where, rows.real) * LOG2_E, load(delta_ref, where, rows.real)
        logits = dot(keys, q, 1) * (problem.scale * LOG2_E)
        if masked:
            place, own = problem.load_row_ids(ids, batch, rows)
            logits = problem.hide(logits, flat(place), upright(column), flat(own), upright(other))
        weights = jnp.exp2(logits - offset[None, :])
        dv += dot(weights.astype(q.dtype), d_out, 0)
        d_weights = dot(values, d_out, 1)
        if d_map_ref is not None:
            d_map = problem.load_map(d_map_ref, batch, rows, column)
            d_weights += d_map.T * (1 / (problem.kv_heads * problem.group))
        dk += dot((weights * (d_weights - delta[None, :])).astype(q.dtype), q, 0)
        return dk, dv

    zeros = jnp.zeros(keys.shape, jnp.float32)
    dk, dv = walk(problem.row_steps(tile, batch, seen), step, (zeros, zeros))
    problem.store_keys(dk_ref, batch, kv_head, column, dk * problem.scale)
    problem.store_keys(dv_ref, batch, kv_head, column, dv)


# By bytes of an element and head size; what the compiler makes of them is in docs/kernels.md.
_ROWS_TILES = {
    (2, 64): Tiles(128, 64, warps=8, stages=2),
    (2, 128): Tiles(128, 32, warps=8, stages=2),
    (2, 256): Tiles(64, 32, warps=8, stages=2),
    (4, 64): Tiles(64, 32, warps=4, stages=2),
    (4, 128): Tiles(32, 32, warps=8, stages=2),
    (4, 256): Tiles(32, 16, warps=8, stages=1),
}
_KEYS_TILES = {
    (2, 64): Tiles(64, 128, warps=8, stages=2),
    (2, 128): Tiles(32, 128, warps=8, stages=2),
    (2, 256): Tiles(16, 64, warps=8, stages=2),
    (4, 64): Tiles(32, 32, warps=4, stages=2),
    (4, 128): Tiles(32, 32, warps=8, stages=2),
    (4, 256): Tiles(16, 32, warps=8, stages=1),
}
