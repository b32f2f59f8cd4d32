"""The backward pass as Pallas kernels on the Triton backend (NVIDIA, AMD).

The first makes the probabilities of a head again and gives dq, and for the second the log-sum-exp of every row and the
mean of its weights' gradients; the second is the one of `flash_attention`, to which the map's cotangent, the same for
all heads, is handed.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.attention_with_map.triton import probabilities, problem_of
from pallas_kernels.dispatch import output_like
from pallas_kernels.flash_attention.triton_backward import key_gradients
from pallas_kernels.flash_attention.triton_tiles import Problem, Tiles, dot, store

_WIDE_DIM = 128  # of a float32 head: a tile of all keys twice as wide does not fit in registers


def backward(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    d_out: Float[Array, "b t h d"],
    d_map: Float[Array, "b t s"],
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b s h d"], Float[Array, "b s h d"]]:
    """Gradients of q, k and v."""
    if q.dtype.itemsize > 2 and q.shape[-1] > _WIDE_DIM:
        raise NotImplementedError(f"gradients by Triton take {q.dtype} heads of up to {_WIDE_DIM}, got {q.shape[-1]}")
    problem = problem_of(q, k, scale, _ROWS_TILES, interpret)
    a_row = output_like((problem.batch, problem.kv_heads, problem.queries), jnp.float32, q)
    dq, lse, delta = pl.pallas_call(
        functools.partial(_rows_kernel, problem=problem),
        out_shape=(output_like(q.shape, q.dtype, q), a_row, a_row),
        grid=(problem.batch * problem.kv_heads * problem.row_tiles,),
        compiler_params=plt.CompilerParams(num_warps=problem.tiles.warps, num_stages=problem.tiles.stages),
        interpret=interpret,
        name="attention_with_map_dq",
    )(q, k, v, d_out, d_map)
    rules = {"causal": False, "window": None, "scale": scale, "tiles": _KEYS_TILES, "interpret": interpret}
    return dq, *key_gradients(q, k, v, (None, None, None), lse, delta, d_out, d_map=d_map, **rules)


def _rows_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    d_out_ref: Any,
    d_map_ref: Any,
    dq_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    *,
    problem: Problem,
) -> None:
    batch, head, tile = problem.place(problem.row_tiles)
    rows, column = problem.rows(tile, head), problem.columns(jnp.int32(0))
    keys = problem.load_keys(k_ref, batch, head, column)
    weights, lse = probabilities(problem, problem.load_rows(q_ref, batch, rows), keys, column)
    d_out = problem.load_rows(d_out_ref, batch, rows)
    d_weights = dot(d_out, problem.load_keys(v_ref, batch, head, column), 1)
    d_weights += problem.load_map(d_map_ref, batch, rows, column) * (1 / problem.kv_heads)
    delta = jnp.sum(weights * d_weights, axis=1)
    dq = dot((weights * (d_weights - delta[:, None])).astype(keys.dtype), keys, 0)
    problem.store_rows(dq_ref, batch, rows, dq * problem.scale)
    store(lse_ref, (batch, rows.head, rows.token), lse * math.log(2), rows.real)
    store(delta_ref, (batch, rows.head, rows.token), delta, rows.real)


# By bytes of an element and head size; what the compiler makes of them is in docs/kernels.md.
_ROWS_TILES = {
    (2, 64): Tiles(64, 128, warps=8, stages=1),
    (2, 128): Tiles(64, 128, warps=8, stages=1),
    (2, 256): Tiles(64, 128, warps=8, stages=1),
    (4, 64): Tiles(32, 128, warps=8, stages=1),
    (4, 128): Tiles(16, 128, warps=8, stages=1),
}
_KEYS_TILES = {
    (2, 64): Tiles(32, 128, warps=8, stages=2),
    (2, 128): Tiles(64, 64, warps=8, stages=2),
    (2, 256): Tiles(16, 64, warps=8, stages=2),
    (4, 64): Tiles(32, 32, warps=4, stages=2),
    (4, 128): Tiles(32, 32, warps=8, stages=2),
}
