"""The forward pass of attention with a pair bias as a Pallas kernel on the Triton backend (NVIDIA, AMD).

One program takes a tile of queries of one row and head over all keys, with an online softmax (Milakov and Gimelshein,
2018, arXiv:1805.02867), and stores the output and one log-sum-exp a query. The last tile of keys has code of its own
where it reaches beyond the end, so that the others take no mask.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.dispatch import output_like
from pallas_kernels.evo_attention.reference import Options
from pallas_kernels.evo_attention.triton_tiles import Problem, logits_of
from pallas_kernels.flash_attention.triton_tiles import LOG2_E, Tiles, check, dot, flat


def forward(
    q: Float[Array, "b s n h d"],
    k: Float[Array, "b s n h d"],
    v: Float[Array, "b s n h d"],
    mask: Float[Array, "b s n"] | None,
    bias: Float[Array, "b h n n"] | None,
    *,
    options: Options,
    tiles: dict[tuple[int, int], Tiles] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b s n h d"], Float[Array, "b s h n"]]:
    """Output and log-sum-exp of every row."""
    check(interpret, q)
    problem = Problem.of(q, options, tiles or _TILES)
    batch, rows, length, heads, _ = q.shape
    return pl.pallas_call(
        functools.partial(_kernel, problem=problem),
        out_shape=(output_like(q.shape, q.dtype, q), output_like((batch, rows, heads, length), jnp.float32, q)),
        grid=problem.grid(problem.query_tiles),
        compiler_params=plt.CompilerParams(num_warps=problem.tiles.warps, num_stages=problem.tiles.stages),
        interpret=interpret,
        name="evo_attention",
    )(q, k, v, mask, bias)


def _kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, mask_ref: Any, bias_ref: Any, out_ref: Any, lse_ref: Any, *, problem: Problem
) -> None:
    place, tile = problem.place(problem.query_tiles)
    query, past = problem.queries(tile), problem.length % problem.tiles.rows != 0
    q = place.load(q_ref, query, past)

    def step(j, state, ragged):
        out, peak, total = state
        key = problem.keys(j)
        bias = place.load_bias(bias_ref, query, key, past, ragged)
        mask = flat(place.load_mask(mask_ref, key, ragged))
        logits = logits_of(dot(q, place.load(k_ref, key, ragged), 1), problem.scale, bias, mask)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        offset = jnp.where(new_peak == -jnp.inf, 0.0, new_peak) * LOG2_E
        weights, shrink = jnp.exp2(logits * LOG2_E - offset[:, None]), jnp.exp2(peak * LOG2_E - offset)
        values = place.load(v_ref, key, ragged)
        out = out * shrink[:, None] + dot(weights.astype(values.dtype), values, 0)
        return out, new_peak, total * shrink + jnp.sum(weights, axis=1)

    none = jnp.zeros(problem.tiles.rows, jnp.float32)
    start = jnp.zeros(q.shape, jnp.float32), none - jnp.inf, none
    out, peak, total = problem.walk(problem.tiles.columns, step, start)
    # A row that sees nothing has a peak of -inf, and is zero.
    place.store_numbers(lse_ref, query, past, peak + jnp.log(jnp.where(total == 0, 1.0, total)))
    place.store(out_ref, query, past, out / jnp.where(total == 0, 1.0, total)[:, None])


# By bytes of an element and head size; what the compiler makes of them is in docs/kernels.md.
_TILES = {
    (2, 32): Tiles(128, 64, warps=8, stages=3),
    (2, 64): Tiles(128, 64, warps=8, stages=3),
    (2, 128): Tiles(64, 64, warps=4, stages=2),
    (4, 32): Tiles(128, 32, warps=8, stages=2),
    (4, 64): Tiles(64, 32, warps=4, stages=2),
    (4, 128): Tiles(64, 32, warps=8, stages=2),
}
