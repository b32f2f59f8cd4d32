"""The forward pass of attention as a Pallas kernel on the Triton backend (NVIDIA, AMD).

One program takes a tile of rows over the keys that any of them sees, with an online softmax in base 2 (Dao, 2023,
arXiv:2307.08691), and stores the output and one log-sum-exp a row: nothing else is ever written. Tiles that all rows
see in full have a loop of their own, without a mask. `triton_backward` is its counterpart.
"""

import functools
import math
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
    store,
    upright,
    walk,
)
from pallas_kernels.flash_attention.xla import Ids

_HIDDEN = -1e30  # largest logit of a row that saw none yet: finite, so that no difference of infinities is taken


def forward(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s hkv d"],
    v: Float[Array, "b s hkv d"],
    ids: Ids,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h t"]]:
    """Output and log-sum-exp of every row; `ids` are segments of q, segments of k, positions of q."""
    check(interpret, q)
    problem = Problem.of(q, k, causal=causal, window=window, scale=scale, tiles=tiles or _TILES)
    batch, queries, heads, _ = q.shape
    return pl.pallas_call(
        functools.partial(_kernel, problem=problem),
        out_shape=(output_like(q.shape, q.dtype, q), output_like((batch, heads, queries), jnp.float32, q)),
        grid=(problem.batch * problem.kv_heads * problem.row_tiles,),
        compiler_params=plt.CompilerParams(num_warps=problem.tiles.warps, num_stages=problem.tiles.stages),
        interpret=interpret,
        name="flash_attention",
    )(q, k, v, ids, problem.seen_tiles(ids, axis=1))


def _kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, ids: Any, seen: Any, out_ref: Any, lse_ref: Any, *, problem: Problem
) -> None:
    batch, kv_head, tile = problem.place(problem.row_tiles)
    if problem.causal:
        tile = problem.row_tiles - 1 - tile  # the tiles that see most first
    rows = problem.rows(tile, kv_head)
    q, (place, own) = problem.load_rows(q_ref, batch, rows), problem.load_row_ids(ids, batch, rows)

    def step(j, state, masked):
        out, peak, total = state
        column = problem.columns(j)
        logits = dot(q, problem.load_keys(k_ref, batch, kv_head, column), 1) * (problem.scale * LOG2_E)
        if masked:
            other = problem.load_key_segments(ids, batch, column)
            logits = problem.hide(logits, upright(place), flat(column), upright(own), flat(other))
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        weights, shrink = jnp.exp2(logits - new_peak[:, None]), jnp.exp2(peak - new_peak)
        values = problem.load_keys(v_ref, batch, kv_head, column)
        out = out * shrink[:, None] + dot(weights.astype(values.dtype), values, 0)
        return out, new_peak, total * shrink + jnp.sum(weights, axis=1)

    none = jnp.zeros(problem.tiles.rows, jnp.float32)
    start = jnp.zeros(q.shape, jnp.float32), none + _HIDDEN, none
    out, peak, total = walk(problem.key_steps(tile, batch, seen), step, start)
    total = jnp.where(total == 0, 1.0, total)  # such a row saw nothing, and is zero
    problem.store_rows(out_ref, batch, rows, out / total[:, None])
    store(lse_ref, (batch, rows.head, rows.token), peak * math.log(2) + jnp.log(total), rows.real)


# By bytes of an element and head size; what the compiler makes of them is in docs/kernels.md.
_TILES = {
    (2, 64): Tiles(128, 64, warps=8, stages=3),
    (2, 128): Tiles(128, 64, warps=8, stages=3),
    (2, 256): Tiles(64, 64, warps=8, stages=2),
    (4, 64): Tiles(64, 32, warps=4, stages=2),
    (4, 128): Tiles(64, 32, warps=4, stages=2),
    (4, 256): Tiles(32, 32, warps=8, stages=2),
}
