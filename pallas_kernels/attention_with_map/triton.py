"""The forward pass as a Pallas kernel on the Triton backend (NVIDIA, AMD).

One program takes a tile of queries through all heads, one after the other, each over all keys at once: no softmax is
ever rescaled, and the map is summed over heads in registers and written once.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.dispatch import output_like
from pallas_kernels.flash_attention.triton_decoding import divided
from pallas_kernels.flash_attention.triton_tiles import LOG2_E, Problem, Tiles, check, dot, flat

_KEYS = 128  # at most: a tile holds them all


def forward(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b t s"]]:
    """Output, and the head mean of the probabilities."""
    problem = problem_of(q, k, scale, _TILES, interpret)
    return pl.pallas_call(
        functools.partial(_kernel, problem=problem),
        out_shape=(output_like(q.shape, q.dtype, q), output_like((*q.shape[:2], k.shape[1]), jnp.float32, q)),
        grid=(problem.batch * problem.row_tiles,),
        compiler_params=plt.CompilerParams(num_warps=problem.tiles.warps, num_stages=problem.tiles.stages),
        interpret=interpret,
        name="attention_with_map",
    )(q, k, v)


def problem_of(
    q: Array, k: Array, scale: float, tiles: Mapping[tuple[int, int], Tiles] | Tiles, interpret: bool
) -> Problem:
    """The problem of a kernel whose tile holds all keys; refuses more than that."""
    check(interpret, q)
    if k.shape[1] > _KEYS:
        raise NotImplementedError(f"the Triton kernels take up to {_KEYS} keys, got {k.shape[1]}")
    return Problem.of(q, k, causal=False, window=None, scale=scale, tiles=tiles)


def probabilities(problem: Problem, q: Array, keys: Array, column: Array) -> tuple[Array, Array]:
    """Of a tile of rows to all keys, and their log-sum-exp in base 2."""
    logits = problem.hide(dot(q, keys, 1) * (problem.scale * LOG2_E), None, flat(column), None, None)
    peak = jnp.max(logits, axis=1)
    weights = jnp.exp2(logits - peak[:, None])
    total = jnp.sum(weights, axis=1)
    return weights / total[:, None], peak + jnp.log(total) * (1 / math.log(2))


def _kernel(q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, map_ref: Any, *, problem: Problem) -> None:
    batch, tile = divided(pl.program_id(0), problem.row_tiles)
    column = problem.columns(jnp.int32(0))

    def head(index, total):
        rows = problem.rows(tile, index)
        q, keys = problem.load_rows(q_ref, batch, rows), problem.load_keys(k_ref, batch, index, column)
        weights, _ = probabilities(problem, q, keys, column)
        values = problem.load_keys(v_ref, batch, index, column)
        problem.store_rows(out_ref, batch, rows, dot(weights.astype(values.dtype), values, 0))
        return total + weights

    none = jnp.zeros((problem.tiles.rows, column.size), jnp.float32)
    total = lax.fori_loop(jnp.int32(0), jnp.int32(problem.kv_heads), head, none)
    rows = problem.rows(tile, jnp.int32(0))
    problem.store_map(map_ref, batch, rows, column, total * (1 / problem.kv_heads))


# By bytes of an element and head size; what the compiler makes of them is in docs/kernels.md.
_TILES = {
    (2, 64): Tiles(64, _KEYS, warps=4, stages=2),
    (2, 128): Tiles(64, _KEYS, warps=8, stages=2),
    (2, 256): Tiles(64, _KEYS, warps=8, stages=1),
    (4, 64): Tiles(32, _KEYS, warps=4, stages=1),
    (4, 128): Tiles(32, _KEYS, warps=8, stages=1),
    (4, 256): Tiles(16, _KEYS, warps=8, stages=1),
}
