"""The backward pass of attention with a pair bias as Pallas kernels on the Triton backend (NVIDIA, AMD).

All three recompute the weights tile by tile from the log-sum-exp. One takes a tile of keys over all queries and gives
dk and dv (and what a head adds to the mask's gradient), one a tile of queries over all keys and gives dq. The third
takes a tile of the bias over all rows and adds up its gradient in registers: no atomics, one order, the same bits every
time, and never an [S,H,N,N] array, at the cost of two more products. Of a single row the second has that gradient at
hand. With few tiles the rows are divided among several programs, whose sums XLA adds.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.dispatch import output_like
from pallas_kernels.evo_attention.reference import Options
from pallas_kernels.evo_attention.triton_tiles import Problem, logits_of
from pallas_kernels.flash_attention.triton_tiles import LOG2_E, Tiles, check, dot, flat, upright

_PROGRAMS = 512  # that the bias's gradient is divided into at least, if there are rows enough
_FEWEST_ROWS = 8  # of one of them


def backward(
    q: Float[Array, "b s n h d"],
    k: Float[Array, "b s n h d"],
    v: Float[Array, "b s n h d"],
    mask: Float[Array, "b s n"] | None,
    bias: Float[Array, "b h n n"] | None,
    lse: Float[Array, "b s h n"],
    delta: Float[Array, "b s h n"],
    d_out: Float[Array, "b s n h d"],
    *,
    options: Options,
    mask_gradient: bool,
    bias_gradient: bool,
    tiles: tuple[dict[tuple[int, int], Tiles], ...] | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Gradients of q, k, v, mask and bias (the last two None unless asked for); `tiles` for keys, queries and bias."""
    check(interpret, q)
    by_keys, by_queries, by_bias = (
        Problem.of(q, options, chosen) for chosen in tiles or (_KEYS_TILES, _QUERIES_TILES, _BIAS_TILES)
    )
    arrays = q, k, v, mask, bias, lse, delta, d_out
    like_q, numbers = output_like(q.shape, q.dtype, q), output_like(lse.shape, jnp.float32, q)
    dk, dv, d_mask = _call(
        _keys_kernel,
        by_keys,
        by_keys.grid(by_keys.key_tiles),
        (like_q, like_q, numbers if mask_gradient else None),
        "evo_attention_dkv",
        interpret,
    )(*arrays)
    single = bias is not None and bias_gradient and q.shape[1] == 1
    dq, d_bias = _call(
        _queries_kernel,
        by_queries,
        by_queries.grid(by_queries.query_tiles),
        (like_q, output_like((1, *bias.shape), bias.dtype, q) if single else None),
        "evo_attention_dq",
        interpret,
    )(*arrays)
    if single:
        d_bias = d_bias[0]
    elif bias is not None and bias_gradient:
        d_bias = _bias_gradient(by_bias, arrays, interpret)
    return dq, dk, dv, jnp.sum(d_mask, axis=2) if mask_gradient else None, d_bias


def _bias_gradient(problem, arrays, interpret):
    q, bias = arrays[0], arrays[4]
    pairs = problem.batch * problem.heads * problem.query_tiles * problem.key_tiles
    parts = max(1, min(-(-_PROGRAMS // pairs), problem.rows // _FEWEST_ROWS))
    dtype = bias.dtype if parts == 1 else jnp.float32
    sums = _call(
        functools.partial(_bias_kernel, parts=parts),
        problem,
        (parts * pairs,),
        output_like((parts, *bias.shape), dtype, q),
        "evo_attention_dbias",
        interpret,
    )(*arrays)
    return sums[0] if parts == 1 else jnp.sum(sums, axis=0).astype(bias.dtype)


def _call(kernel, problem, grid, out_shape, name, interpret):
    return pl.pallas_call(
        functools.partial(kernel, problem=problem),
        out_shape=out_shape,
        grid=grid,
        compiler_params=plt.CompilerParams(num_warps=problem.tiles.warps, num_stages=problem.tiles.stages),
        interpret=interpret,
        name=name,
    )


def _keys_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    mask_ref: Any,
    bias_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    d_out_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    d_mask_ref: Any,
    *,
    problem: Problem,
) -> None:
    place, tile = problem.place(problem.key_tiles)
    key, past = problem.keys(tile), problem.length % problem.tiles.columns != 0
    keys, values = place.load(k_ref, key, past), place.load(v_ref, key, past)
    mask = upright(place.load_mask(mask_ref, key, past))

    def step(i, state, ragged):
        # Transposed, [keys, queries]: the weights are then at hand as the left factor of both sums.
        dk, dv, d_mask = state
        query = problem.queries(i)
        q, d_out = place.load(q_ref, query, ragged), place.load(d_out_ref, query, ragged)
        bias = place.load_bias(bias_ref, query, key, ragged, past)
        bias = None if bias is None else bias.T  # loaded along its rows, 16 bytes at a time, then turned
        logits = logits_of(dot(keys, q, 1), problem.scale, bias, mask)
        weights = jnp.exp2(logits * LOG2_E - place.load_offsets(lse_ref, query, ragged)[None, :])
        dv += dot(weights.astype(q.dtype), d_out, 0)
        d_weights = dot(values, d_out, 1)
        d_logits = weights * (d_weights - place.load_numbers(delta_ref, query, ragged)[None, :])
        dk += dot(d_logits.astype(q.dtype), q, 0)
        return dk, dv, None if d_mask is None else d_mask + jnp.sum(d_logits, axis=1)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    sums = None if d_mask_ref is None else jnp.zeros(key.shape, jnp.float32)
    dk, dv, sums = problem.walk(problem.tiles.rows, step, (zeros, zeros, sums))
    place.store(dk_ref, key, past, dk * problem.scale)
    place.store(dv_ref, key, past, dv)
    if sums is not None:
        place.store_numbers(d_mask_ref, key, past, sums)


def _queries_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    mask_ref: Any,
    bias_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    d_out_ref: Any,
    dq_ref: Any,
    d_bias_ref: Any,
    *,
    problem: Problem,
) -> None:
    place, tile = problem.place(problem.query_tiles)
    query, past = problem.queries(tile), problem.length % problem.tiles.rows != 0
    q, d_out = place.load(q_ref, query, past), place.load(d_out_ref, query, past)
    offset, delta = place.load_offsets(lse_ref, query, past), place.load_numbers(delta_ref, query, past)

    def step(j, dq, ragged):
        key = problem.keys(j)
        keys, values = place.load(k_ref, key, ragged), place.load(v_ref, key, ragged)
        bias = place.load_bias(bias_ref, query, key, past, ragged)
        mask = flat(place.load_mask(mask_ref, key, ragged))
        logits = logits_of(dot(q, keys, 1), problem.scale, bias, mask)
        weights = jnp.exp2(logits * LOG2_E - offset[:, None])
        d_logits = weights * (dot(d_out, values, 1) - delta[:, None])
        if d_bias_ref is not None:
            place.store_bias(d_bias_ref, jnp.int32(0), query, key, past, ragged, value=d_logits)
        return dq + dot(d_logits.astype(keys.dtype), keys, 0)

    dq = problem.walk(problem.tiles.columns, step, jnp.zeros(q.shape, jnp.float32))
    place.store(dq_ref, query, past, dq * problem.scale)


def _bias_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    mask_ref: Any,
    bias_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    d_out_ref: Any,
    d_bias_ref: Any,
    *,
    problem: Problem,
    parts: int,
) -> None:
    part, place, i, j = problem.place_of_pair()
    query, key = problem.queries(i), problem.keys(j)
    past = tuple(problem.length % tile != 0 for tile in (problem.tiles.rows, problem.tiles.columns))
    bias = place.load_bias(bias_ref, query, key, *past)

    def step(row, total):
        at = dataclasses.replace(place, row=row)
        q, d_out = at.load(q_ref, query, past[0]), at.load(d_out_ref, query, past[0])
        keys, values = at.load(k_ref, key, past[1]), at.load(v_ref, key, past[1])
        logits = logits_of(dot(q, keys, 1), problem.scale, bias, flat(at.load_mask(mask_ref, key, past[1])))
        weights = jnp.exp2(logits * LOG2_E - at.load_offsets(lse_ref, query, past[0])[:, None])
        return total + weights * (dot(d_out, values, 1) - at.load_numbers(delta_ref, query, past[0])[:, None])

    first, last = (lax.div((part + more) * problem.rows, jnp.int32(parts)) for more in (0, 1))
    total = lax.fori_loop(first, last, step, jnp.zeros((query.size, key.size), jnp.float32))
    place.store_bias(d_bias_ref, part, query, key, *past, value=total)


# By bytes of an element and head size; what the compiler makes of them is in docs/kernels.md.
_KEYS_TILES = {
    (2, 32): Tiles(64, 64, warps=4, stages=3),
    (2, 64): Tiles(64, 64, warps=4, stages=2),
    (2, 128): Tiles(64, 64, warps=4, stages=2),
    (4, 32): Tiles(32, 64, warps=8, stages=2),
    (4, 64): Tiles(32, 64, warps=8, stages=2),
    (4, 128): Tiles(16, 64, warps=8, stages=2),
}
_QUERIES_TILES = {
    (2, 32): Tiles(64, 64, warps=4, stages=3),
    (2, 64): Tiles(64, 64, warps=4, stages=2),
    (2, 128): Tiles(64, 64, warps=4, stages=2),
    (4, 32): Tiles(128, 32, warps=8, stages=2),
    (4, 64): Tiles(64, 32, warps=8, stages=2),
    (4, 128): Tiles(64, 16, warps=8, stages=2),
}
_BIAS_TILES = {
    (2, 32): Tiles(64, 64, warps=4, stages=3),
    (2, 64): Tiles(64, 64, warps=4, stages=2),
    (2, 128): Tiles(64, 128, warps=8, stages=2),
    (4, 32): Tiles(64, 64, warps=8, stages=2),
    (4, 64): Tiles(64, 64, warps=8, stages=2),
    (4, 128): Tiles(64, 32, warps=8, stages=2),
}
