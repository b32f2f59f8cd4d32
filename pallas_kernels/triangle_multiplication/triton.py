"""Triangle multiplication as Pallas kernels on the Triton backend (NVIDIA, AMD): the forward pass.

Three kernels, three stored arrays. `project` normalises z and writes a and b channel-major; `products` multiplies them,
one plain product a channel; `_output_kernel` normalises t over its channels, which a tile holds in full, and gates the
result by z, normalised again. `triton_backward` is their counterpart.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import output_like
from pallas_kernels.triangle_multiplication.reference import Weights
from pallas_kernels.triangle_multiplication.triton_tiles import (
    Problem,
    Tiles,
    arange,
    check,
    dot,
    load,
    load_matrix,
    padded,
    sigmoid,
    store,
    within,
)


def forward(
    z: Float[Array, "b n n c"],
    mask: Bool[Array, "b n n"] | None,
    weights: Weights,
    *,
    direction: str,
    eps: float,
    interpret: bool = False,
) -> Float[Array, "b n n c"]:
    """The multiplication; a, b and t are stored in z's dtype."""
    hidden = weights.w_out.shape[0]
    check(interpret, z, hidden)
    problem, weights = Problem.of(z, hidden, eps), weights.cast(z.dtype)
    pairs = z.reshape(problem.pairs)
    t = triangles(problem, pairs, mask, weights, direction, interpret)[2]
    tiles = _OUTPUT_TILES[z.dtype.itemsize].fit(channels=128, positions=problem.n * problem.width)
    out = pl.pallas_call(
        functools.partial(_output_kernel, problem=problem, tiles=tiles),
        out_shape=output_like(problem.pairs, z.dtype, z),
        grid=(problem.tile_count(tiles),),
        compiler_params=tiles.params,
        interpret=interpret,
        name="triangle_output",
    )(pairs, weights, t)
    return out.reshape(z.shape)


def triangles(
    problem: Problem,
    pairs: Float[Array, "b nn c"],
    mask: Bool[Array, "b n n"] | None,
    weights: Weights,
    direction: str,
    interpret: bool,
) -> tuple[Float[Array, "b f nw"], Float[Array, "b f nw"], Float[Array, "b f nw"]]:
    """a, b and t, channel-major; `pairs` is z."""
    mask = problem.mask(mask)
    tiles = _PROJECT_TILES[pairs.dtype.itemsize].fit(channels=problem.hidden, positions=problem.n * problem.width)
    a, b = pl.pallas_call(
        functools.partial(_project_kernel, problem=problem, tiles=tiles),
        out_shape=(output_like(problem.grids, pairs.dtype, pairs),) * 2,
        grid=(problem.tile_count(tiles),),
        compiler_params=tiles.params,
        interpret=interpret,
        name="triangle_project",
    )(pairs, mask, weights)
    # Outgoing: t[i,j] = sum of a[i,k] b[j,k]; incoming: of a[k,i] b[k,j].
    axis = 1 if direction == "outgoing" else 0
    return a, b, products(problem, a, b, axis, axis, interpret)


def products(
    problem: Problem,
    left: Float[Array, "b f nw"],
    right: Float[Array, "b f nw"],
    axis_left: int,
    axis_right: int,
    interpret: bool,
) -> Float[Array, "b f nw"]:
    """Channel by channel the product of two `[N,W]` matrices over an axis of each; left's other axis comes first."""
    n, width = problem.n, problem.width
    tiles = _PRODUCT_TILES[left.dtype.itemsize].fit(channels=n, positions=width, depth=n)
    matrices = (problem.batch * problem.hidden, n, width)
    out = pl.pallas_call(
        functools.partial(_product_kernel, axes=(axis_left, axis_right), tiles=tiles),
        out_shape=output_like(matrices, left.dtype, left),
        grid=(matrices[0] * pl.cdiv(n, tiles.channels) * pl.cdiv(width, tiles.positions),),
        compiler_params=tiles.params,
        interpret=interpret,
        name=f"triangle_product_{'nt'[axis_left == 0]}{'nt'[axis_right == 1]}",
    )(left.reshape(matrices), right.reshape(matrices))
    return out.reshape(left.shape)


def gated_projection(
    problem: Problem, weights: Weights, half: int, channel: Array, x: Array
) -> tuple[Array, Array, Array, Array]:
    """Of some channels of a (half 0) or b (1): projection and gate `[channels, P]`, and the two matrices' columns."""
    feature, hidden = arange(padded(problem.channels)), problem.hidden
    w_proj, w_gate = (
        load_matrix(ref, feature, channel, columns=hidden, first=half * hidden)
        for ref in (weights.w_proj, weights.w_gate)
    )
    return dot(w_proj, x, 0, 0), sigmoid(dot(w_gate, x, 0, 0)), w_proj, w_gate


def _project_kernel(
    z_ref: Any, mask_ref: Any, weights: Any, a_ref: Any, b_ref: Any, *, problem: Problem, tiles: Tiles
) -> None:
    at = problem.place(pl.program_id(0), tiles)
    x = problem.load_x(z_ref, weights.ln_in, at).value.astype(problem.dtype)
    keep = problem.keep(mask_ref, at)
    for half, out_ref in enumerate((a_ref, b_ref)):

        def step(i, _, half=half, out_ref=out_ref):
            channel = i * tiles.channels + arange(tiles.channels)
            projection, gate, *_ = gated_projection(problem, weights, half, channel, x)
            pair = projection * gate
            pair = pair if keep is None else jnp.where(keep, pair, 0.0)
            problem.store_channels(out_ref, at, channel, pair)

        lax.fori_loop(0, pl.cdiv(problem.hidden, tiles.channels), step, None)


def _product_kernel(left_ref: Any, right_ref: Any, out_ref: Any, *, axes: tuple[int, int], tiles: Tiles) -> None:
    _, n, width = out_ref.shape
    row_tiles, column_tiles = pl.cdiv(n, tiles.channels), pl.cdiv(width, tiles.positions)
    # Neighbouring programs share a channel, then its rows.
    program, size = pl.program_id(0), jnp.int32(row_tiles * column_tiles)
    matrix, tile = lax.div(program, size), lax.rem(program, size)
    row = lax.div(tile, jnp.int32(column_tiles)) * tiles.channels + arange(tiles.channels)
    column = lax.rem(tile, jnp.int32(column_tiles)) * tiles.positions + arange(tiles.positions)

    def side(ref, free, depth, axis):
        """A tile [free, depth] (axis 1) or [depth, free] (axis 0) of a side contracted over its `axis`."""
        first, last = (free, depth) if axis else (depth, free)
        return load(ref, (matrix, first[:, None], last[None, :]), within(first, n, 0), within(last, width, 1))

    def step(i, total):
        depth = i * tiles.depth + arange(tiles.depth)
        left, right = side(left_ref, row, depth, axes[0]), side(right_ref, column, depth, axes[1])
        return total + dot(left, right, *axes)

    total = jnp.zeros((tiles.channels, tiles.positions), jnp.float32)
    total = lax.fori_loop(0, pl.cdiv(n, tiles.depth), step, total)
    store(out_ref, (matrix, row[:, None], column[None, :]), total, within(row, n, 0), within(column, width, 1))


def _output_kernel(z_ref: Any, weights: Any, t_ref: Any, out_ref: Any, *, problem: Problem, tiles: Tiles) -> None:
    at = problem.place(pl.program_id(0), tiles)
    hidden, feature = arange(padded(problem.hidden)), arange(padded(problem.channels))
    u = problem.load_t(t_ref, weights.ln_out, at).value.astype(problem.dtype)
    out = dot(load_matrix(weights.w_out, hidden, feature), u, 0, 0)
    x = problem.load_x(z_ref, weights.ln_in, at).value.astype(problem.dtype)
    gate = sigmoid(dot(load_matrix(weights.w_out_gate, feature, feature), x, 0, 0))
    problem.store_pairs(out_ref, at, out * gate)


# By bytes of an element; what the compiler makes of them is in docs/kernels.md.
_PROJECT_TILES = {2: Tiles(64, 64, warps=8, stages=1), 4: Tiles(64, 32, warps=8, stages=1)}
_PRODUCT_TILES = {2: Tiles(128, 128, 64, warps=8, stages=3), 4: Tiles(128, 64, 32, warps=8, stages=3)}
_OUTPUT_TILES = {2: Tiles(128, 64, warps=8, stages=1), 4: Tiles(128, 32, warps=8, stages=1)}
