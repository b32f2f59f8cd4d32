"""Triangle multiplication as Pallas kernels on the Triton backend (NVIDIA, AMD): the backward pass.

a, b and t are made again by the forward kernels. `_output_kernel` goes back through the gate and the normalisation of
t, and puts dt in t's place; two plain products a channel give da and db; `_pairs_kernel` goes back through the gated
projections and the normalisation of z. Four channel-major arrays live at once at most. The gradients of the matrices
have kernels of their own, which make the gates again rather than have their gradients stored: partial sums, one for
each of a fixed number of programs, added up outside. No atomics.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int8

from pallas_kernels.dispatch import output_like
from pallas_kernels.triangle_multiplication.reference import Affine, Weights
from pallas_kernels.triangle_multiplication.triton import gated_projection, products, triangles
from pallas_kernels.triangle_multiplication.triton_tiles import (
    Place,
    Problem,
    Tiles,
    arange,
    check,
    dot,
    load_matrix,
    padded,
    sigmoid,
    store,
    within,
)


def backward(
    z: Float[Array, "b n n c"],
    mask: Bool[Array, "b n n"] | None,
    weights: Weights,
    d_out: Float[Array, "b n n c"],
    *,
    direction: str,
    eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "b n n c"], Weights]:
    """Gradients of z and of the weights; those of a, b and t are stored in z's dtype."""
    hidden = weights.w_out.shape[0]
    check(interpret, z, hidden)
    problem, cast = Problem.of(z, hidden, eps), weights.cast(z.dtype)
    pairs, d_out = z.reshape(problem.pairs), d_out.astype(z.dtype).reshape(problem.pairs)
    a, b, t = triangles(problem, pairs, mask, cast, direction, interpret)
    d_w_out, d_w_out_gate = _output_weights_gradients(problem, pairs, cast, d_out, t, interpret)
    d_t, d_x, d_ln_out = _output_gradients(problem, pairs, cast, d_out, t, interpret)
    if direction == "outgoing":
        d_a, d_b = products(problem, d_t, b, 1, 0, interpret), products(problem, d_t, a, 0, 0, interpret)
    else:
        d_a, d_b = products(problem, b, d_t, 1, 1, interpret), products(problem, a, d_t, 1, 0, interpret)
    given = (pairs, problem.mask(mask), cast, (d_a, d_b))
    d_w_proj, d_w_gate = _projection_gradients(problem, *given, interpret)
    dz, d_ln_in = _pairs_gradient(problem, *given, d_x, interpret)
    gradients = Weights(d_ln_in, d_w_proj, d_w_gate, d_ln_out, d_w_out, d_w_out_gate)
    return dz.reshape(z.shape), jax.tree.map(lambda gradient, w: gradient.astype(w.dtype), gradients, weights)


def _output_gradients(
    problem: Problem,
    pairs: Float[Array, "b nn c"],
    weights: Weights,
    d_out: Float[Array, "b nn c"],
    t: Float[Array, "b f nw"],
    interpret: bool,
) -> tuple[Float[Array, "b f nw"], Float[Array, "b nn c"], Affine | None]:
    """Gradients of t (in its memory), of x through the output gate, and of ln_out."""
    tiles = _OUTPUT_TILES[pairs.dtype.itemsize].fit(channels=problem.channels, positions=problem.n * problem.width)
    programs = problem.tile_count(tiles)
    given = (pairs, weights, d_out, t)
    partial = [output_like((programs, problem.hidden), jnp.float32, pairs)] * (0 if weights.ln_out is None else 2)
    d_t, d_x, *sums = pl.pallas_call(
        functools.partial(_output_kernel, problem=problem, tiles=tiles),
        out_shape=(output_like(t.shape, t.dtype, t), output_like(pairs.shape, pairs.dtype, pairs), *partial),
        grid=(programs,),
        input_output_aliases={len(jax.tree.leaves(given)) - 1: 0},
        compiler_params=tiles.params,
        interpret=interpret,
        name="triangle_output_dt",
    )(*given)
    return d_t, d_x, _pair(sums)


def _output_kernel(
    z_ref: Any,
    weights: Any,
    d_out_ref: Any,
    t_ref: Any,
    d_t_ref: Any,
    d_x_ref: Any,
    *d_ln_refs: Any,
    problem: Problem,
    tiles: Tiles,
) -> None:
    program = pl.program_id(0)
    at = problem.place(program, tiles)
    x = problem.load_x(z_ref, weights.ln_in, at).value.astype(problem.dtype)
    u = problem.load_t(t_ref, weights.ln_out, at).value.astype(problem.dtype)

    def step(i, sums):
        channel = i * tiles.channels + arange(tiles.channels)
        d_y, d_gate, w_out, w_out_gate = _back_to_output(problem, weights, channel, x, u, d_out_ref, at)
        return sums[0] + dot(w_out_gate, d_gate, 1, 0), sums[1] + dot(w_out, d_y, 1, 0)

    d_x, d_u = jnp.zeros(x.shape, jnp.float32), jnp.zeros(u.shape, jnp.float32)
    d_x, d_u = lax.fori_loop(0, pl.cdiv(problem.channels, tiles.channels), step, (d_x, d_u))
    problem.store_pairs(d_x_ref, at, d_x)
    # Loaded and normalised again rather than held in registers all along.
    t = problem.load_t(t_ref, weights.ln_out, at, again=True)
    hidden = arange(padded(problem.hidden))
    for ref, value in zip(d_ln_refs, (d_u * t.hat, d_u)):
        store(ref, (program, hidden), jnp.sum(value, axis=1), within(hidden, problem.hidden))
    problem.store_channels(d_t_ref, at, hidden, problem.normalise_gradient(d_u, t, weights.ln_out, problem.hidden))


def _back_to_output(
    problem: Problem, weights: Any, channel: Array, x: Array, u: Array, d_out_ref: Any, at: Place
) -> tuple[Array, Array, Array, Array]:
    """Of some channels: gradients of u w_out and of the output gate before its sigmoid; and both matrices' columns."""
    hidden, feature = arange(padded(problem.hidden)), arange(padded(problem.channels))
    w_out, w_out_gate = load_matrix(weights.w_out, hidden, channel), load_matrix(weights.w_out_gate, feature, channel)
    gate = sigmoid(dot(w_out_gate, x, 0, 0))
    d_y = problem.load_pairs(d_out_ref, at, channel).astype(jnp.float32) * gate
    d_gate = dot(w_out, u, 0, 0) * d_y * (1 - gate)
    return d_y.astype(problem.dtype), d_gate.astype(problem.dtype), w_out, w_out_gate


def _output_weights_gradients(
    problem: Problem,
    pairs: Float[Array, "b nn c"],
    weights: Weights,
    d_out: Float[Array, "b nn c"],
    t: Float[Array, "b f nw"],
    interpret: bool,
) -> list[Array]:
    """Gradients of w_out and w_out_gate."""
    hidden, channels = problem.hidden, problem.channels
    tiles = _WEIGHTS_TILES[pairs.dtype.itemsize].fit(channels=channels, positions=problem.n * problem.width)
    blocks = pl.cdiv(channels, tiles.channels)
    programs = min(_PROGRAMS // blocks, problem.tile_count(tiles))
    sums = pl.pallas_call(
        functools.partial(_output_weights_kernel, problem=problem, tiles=tiles, programs=programs),
        out_shape=[output_like((programs, rows, channels), jnp.float32, pairs) for rows in (hidden, channels)],
        grid=(programs * blocks,),
        compiler_params=tiles.params,
        interpret=interpret,
        name="triangle_output_dw",
    )(pairs, weights, d_out, t)
    return _added(sums)


def _output_weights_kernel(
    z_ref: Any,
    weights: Any,
    d_out_ref: Any,
    t_ref: Any,
    d_w_out_ref: Any,
    d_w_out_gate_ref: Any,
    *,
    problem: Problem,
    tiles: Tiles,
    programs: int,
) -> None:
    blocks = jnp.int32(pl.cdiv(problem.channels, tiles.channels))
    program, block = lax.div(pl.program_id(0), blocks), lax.rem(pl.program_id(0), blocks)
    hidden, feature = arange(padded(problem.hidden)), arange(padded(problem.channels))
    channel = block * tiles.channels + arange(tiles.channels)

    def step(i, sums):
        at = problem.place(program + i * programs, tiles)
        x = problem.load_x(z_ref, weights.ln_in, at).value.astype(problem.dtype)
        u = problem.load_t(t_ref, weights.ln_out, at).value.astype(problem.dtype)
        d_y, d_gate, *_ = _back_to_output(problem, weights, channel, x, u, d_out_ref, at)
        return sums[0] + dot(u, d_y, 1, 1), sums[1] + dot(x, d_gate, 1, 1)

    sums = tuple(jnp.zeros((rows.size, tiles.channels), jnp.float32) for rows in (hidden, feature))
    sums = lax.fori_loop(0, _steps(problem, tiles, program, programs), step, sums)
    for ref, value, rows in zip((d_w_out_ref, d_w_out_gate_ref), sums, (hidden, feature)):
        masks = within(rows, ref.shape[1], 0), within(channel, problem.channels, 1)
        store(ref, (program, rows[:, None], channel[None, :]), value, *masks)


def _pairs_gradient(
    problem: Problem,
    pairs: Float[Array, "b nn c"],
    mask: Int8[Array, "b nn"] | None,
    weights: Weights,
    d_halves: tuple[Float[Array, "b f nw"], Float[Array, "b f nw"]],
    d_x: Float[Array, "b nn c"],
    interpret: bool,
) -> tuple[Float[Array, "b nn c"], Affine | None]:
    """Gradients of z (in the memory of d_x, the output gate's part) and of ln_in."""
    tiles = _PAIRS_TILES[pairs.dtype.itemsize].fit(channels=problem.hidden, positions=problem.n * problem.width)
    programs = problem.tile_count(tiles)
    given = (pairs, mask, weights, d_halves, d_x)
    partial = [output_like((programs, problem.channels), jnp.float32, pairs)] * (0 if weights.ln_in is None else 2)
    dz, *sums = pl.pallas_call(
        functools.partial(_pairs_kernel, problem=problem, tiles=tiles),
        out_shape=(output_like(pairs.shape, pairs.dtype, pairs), *partial),
        grid=(programs,),
        input_output_aliases={len(jax.tree.leaves(given)) - 1: 0},
        compiler_params=tiles.params,
        interpret=interpret,
        name="triangle_project_dz",
    )(*given)
    return dz, _pair(sums)


def _pairs_kernel(
    z_ref: Any,
    mask_ref: Any,
    weights: Any,
    d_half_refs: Any,
    d_x_ref: Any,
    dz_ref: Any,
    *d_ln_refs: Any,
    problem: Problem,
    tiles: Tiles,
) -> None:
    program = pl.program_id(0)
    at = problem.place(program, tiles)
    x = problem.load_x(z_ref, weights.ln_in, at).value.astype(problem.dtype)
    keep = problem.keep(mask_ref, at)
    d_x = problem.load_pairs(d_x_ref, at).astype(jnp.float32)
    for half, d_ref in enumerate(d_half_refs):

        def step(i, d_x, half=half, d_ref=d_ref):
            channel = i * tiles.channels + arange(tiles.channels)
            d_proj, d_gate, w_proj, w_gate = _back_to_projection(problem, weights, half, channel, x, keep, d_ref, at)
            return d_x + dot(w_proj, d_proj, 1, 0) + dot(w_gate, d_gate, 1, 0)

        d_x = lax.fori_loop(0, pl.cdiv(problem.hidden, tiles.channels), step, d_x)
    # Loaded and normalised again rather than held in registers all along.
    z = problem.load_x(z_ref, weights.ln_in, at, again=True)
    channel = arange(padded(problem.channels))
    for ref, value in zip(d_ln_refs, (d_x * z.hat, d_x)):
        store(ref, (program, channel), jnp.sum(value, axis=1), within(channel, problem.channels))
    problem.store_pairs(dz_ref, at, problem.normalise_gradient(d_x, z, weights.ln_in, problem.channels))


def _back_to_projection(
    problem: Problem, weights: Any, half: int, channel: Array, x: Array, keep: Array | None, d_ref: Any, at: Place
) -> tuple[Array, Array, Array, Array]:
    """Gradients of projection and gate, made again, from that of their product; and their weights."""
    projection, gate, w_proj, w_gate = gated_projection(problem, weights, half, channel, x)
    d_pair = problem.load_channels(d_ref, at, channel).astype(jnp.float32)
    d_proj = (d_pair if keep is None else jnp.where(keep, d_pair, 0.0)) * gate
    d_gate = d_proj * projection * (1 - gate)
    return d_proj.astype(problem.dtype), d_gate.astype(problem.dtype), w_proj, w_gate


def _projection_gradients(
    problem: Problem,
    pairs: Float[Array, "b nn c"],
    mask: Int8[Array, "b nn"] | None,
    weights: Weights,
    d_halves: tuple[Float[Array, "b f nw"], Float[Array, "b f nw"]],
    interpret: bool,
) -> list[Float[Array, "c f2"]]:
    """Gradients of w_proj and w_gate."""
    tiles = _WEIGHTS_TILES[pairs.dtype.itemsize].fit(channels=problem.hidden, positions=problem.n * problem.width)
    blocks = pl.cdiv(problem.hidden, tiles.channels)
    programs = min(_PROGRAMS // blocks, problem.tile_count(tiles))
    partial = output_like((programs, problem.channels, problem.hidden), jnp.float32, pairs)
    halves = [
        _added(
            pl.pallas_call(
                functools.partial(_weights_kernel, half=half, problem=problem, tiles=tiles, programs=programs),
                out_shape=(partial, partial),
                grid=(programs * blocks,),
                compiler_params=tiles.params,
                interpret=interpret,
                name="triangle_project_dw",
            )(pairs, mask, weights, d_half)
        )
        for half, d_half in enumerate(d_halves)
    ]
    return [jnp.concatenate(parts, axis=1) for parts in zip(*halves)]


def _weights_kernel(
    z_ref: Any,
    mask_ref: Any,
    weights: Any,
    d_ref: Any,
    d_proj_ref: Any,
    d_gate_ref: Any,
    *,
    half: int,
    problem: Problem,
    tiles: Tiles,
    programs: int,
) -> None:
    blocks = jnp.int32(pl.cdiv(problem.hidden, tiles.channels))
    program, block = lax.div(pl.program_id(0), blocks), lax.rem(pl.program_id(0), blocks)
    channel, feature = block * tiles.channels + arange(tiles.channels), arange(padded(problem.channels))

    def step(i, sums):
        at = problem.place(program + i * programs, tiles)
        x = problem.load_x(z_ref, weights.ln_in, at).value.astype(problem.dtype)
        d_proj, d_gate, *_ = _back_to_projection(
            problem, weights, half, channel, x, problem.keep(mask_ref, at), d_ref, at
        )
        return sums[0] + dot(x, d_proj, 1, 1), sums[1] + dot(x, d_gate, 1, 1)

    zeros = jnp.zeros((feature.size, tiles.channels), jnp.float32)
    sums = lax.fori_loop(0, _steps(problem, tiles, program, programs), step, (zeros, zeros))
    masks = within(feature, problem.channels, 0), within(channel, problem.hidden, 1)
    for ref, value in zip((d_proj_ref, d_gate_ref), sums):
        store(ref, (program, feature[:, None], channel[None, :]), value, *masks)


def _added(partial: Sequence[Array]) -> list[Array]:
    """The sums over all programs."""
    return [jnp.sum(parts, axis=0) for parts in partial]


def _pair(partial: Sequence[Array]) -> Affine | None:
    """The gradients of scale and offset, where there are any."""
    if not partial:
        return None
    scale, offset = _added(partial)
    return scale, offset


def _steps(problem: Problem, tiles: Tiles, program: Array, programs: int) -> Array:
    """How many tiles a program takes of those it shares with others."""
    return lax.div(problem.tile_count(tiles) - program + (programs - 1), jnp.int32(programs))


_PROGRAMS = 128  # as many partial sums of a weight's gradient, about one for each processor of an H100

# By bytes of an element; what the compiler makes of them is in docs/kernels.md.
_OUTPUT_TILES = {2: Tiles(128, 64, warps=8, stages=1), 4: Tiles(32, 16, warps=8, stages=1)}
_PAIRS_TILES = {2: Tiles(128, 64, warps=8, stages=1), 4: Tiles(32, 16, warps=8, stages=1)}
_WEIGHTS_TILES = {2: Tiles(64, 32, warps=8, stages=2), 4: Tiles(32, 32, warps=8, stages=1)}
