"""Pallas kernels on the Triton backend (NVIDIA, AMD): a program a tile, its 256 pixels times a few Gaussians at a time.

Transmittances of such a block are powers of 2: a running sum of logarithms, begun with that of the chunk before. The
backward kernel writes a gradient for each pair, which a third kernel adds up by Gaussian, pair after pair: no atomics,
so that results do not change from run to run.
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

from pallas_kernels.dispatch import output_like, zeros_alike
from pallas_kernels.splat_rasterize.lists import TILE, Lists, tiles_of
from pallas_kernels.splat_rasterize.reference import MAX_ALPHA, STOP, alpha

_CHUNK, _CHUNK_BACKWARD = 8, 4  # Gaussians
_WARPS = 4
_GAUSSIANS, _COLUMNS = 64, 16  # of a program that adds up: a lane for each, 9 columns of use
_OPEN = 2**30  # where a pixel stops that does not
_MAX_PAIRS = 2**27  # of which 9 numbers each are addressed by 32 bits


def forward(
    rows: Float[Array, "n 9"],
    depths: Float[Array, " n"],
    lists: Lists,
    *,
    width: int,
    height: int,
    interpret: bool = False,
) -> tuple[Float[Array, "h w 3"], Float[Array, "h w"], Int[Array, "h w"], Int[Array, " n"]]:
    """Image, transmittance, how many of its list each pixel went through, and the pixels of each Gaussian."""
    del depths
    _check(interpret, rows, lists)
    columns, lines = tiles_of(width, height)
    pairs = zeros_alike(lists.ids.shape, jnp.int32, rows)  # what no program comes to stays 0
    image, transmittance, stops, pairs = pl.pallas_call(
        functools.partial(_forward_kernel, columns=columns),
        out_shape=(
            output_like((height, width, 3), jnp.float32, rows),
            output_like((height, width), jnp.float32, rows),
            output_like((height, width), jnp.int32, rows),
            output_like(pairs.shape, jnp.int32, rows),
        ),
        grid=(columns * lines,),
        input_output_aliases={3: 3},
        compiler_params=plt.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="splat_rasterize",
    )(rows, lists.ids, lists.starts, pairs)
    counts = zeros_alike(rows.shape[:1], jnp.int32, rows).at[lists.ids].add(pairs)
    return image, transmittance, stops, counts


def backward(
    rows: Float[Array, "n 9"],
    depths: Float[Array, " n"],
    lists: Lists,
    transmittance: Float[Array, "h w"],
    stops: Int[Array, "h w"],
    d_image: Float[Array, "h w 3"],
    d_transmittance: Float[Array, "h w"],
    *,
    interpret: bool = False,
) -> Float[Array, "n 9"]:
    """The gradient of the rows."""
    del depths
    _check(interpret, rows, lists)
    columns, lines = tiles_of(transmittance.shape[1], transmittance.shape[0])
    pairs = zeros_alike((lists.ids.size, rows.shape[1]), jnp.float32, rows)
    pairs = pl.pallas_call(
        functools.partial(_backward_kernel, columns=columns),
        out_shape=output_like(pairs.shape, jnp.float32, rows),
        grid=(columns * lines,),
        input_output_aliases={7: 0},
        compiler_params=plt.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="splat_rasterize_backward",
    )(rows, lists.ids, lists.starts, transmittance, stops, d_image, d_transmittance, pairs)
    return pl.pallas_call(
        _sum_kernel,
        out_shape=output_like(rows.shape, jnp.float32, rows),
        grid=(pl.cdiv(rows.shape[0], _GAUSSIANS),),
        compiler_params=plt.CompilerParams(num_warps=4),
        interpret=interpret,
        name="splat_rasterize_sum",
    )(pairs, lists.places, lists.firsts, lists.counts)


def _forward_kernel(rows, ids, starts, _, image_ref, light_ref, stop_ref, pairs, *, columns):
    where, real, x, y = _pixels(image_ref.shape[:2], columns)
    start, end = starts[pl.program_id(0)], starts[pl.program_id(0) + 1]
    index = jnp.arange(_CHUNK, dtype=jnp.int32)

    def unfinished(state):
        first, go_on, *_ = state
        return (first < end) & (go_on > 0)

    def step(state):
        first, _, light, red, green, blue, stop = state
        entry = first + index
        (*geometry, r, g, b), inside = _load(rows, ids, entry, entry < end)
        alphas = alpha(x - geometry[0], y - geometry[1], *geometry[2:])
        passed = jnp.log2(1 - alphas)
        behind = light[None, :] + jnp.cumsum(passed, axis=0)
        last = jnp.min(jnp.where(behind < math.log2(STOP), index[:, None], _CHUNK), axis=0)
        kept = index[:, None] < jnp.where(stop == _OPEN, last, 0)[None, :]
        weight = jnp.where(kept, alphas * jnp.exp2(behind - passed), 0.0)
        red, green, blue = (z + jnp.sum(weight * c, axis=0) for z, c in ((red, r), (green, g), (blue, b)))
        plt.store(pairs.at[entry], jnp.sum(weight > 0, axis=1, dtype=jnp.int32), mask=inside)
        light += jnp.sum(jnp.where(kept, passed, 0.0), axis=0)
        stop = jnp.where((stop == _OPEN) & (last < _CHUNK), first - start + last, stop)
        go_on = jnp.max((stop == _OPEN).astype(jnp.int32))
        return first + _CHUNK, go_on, light, red, green, blue, stop

    zero = jnp.zeros(x.shape[1], jnp.float32)
    state = (start, jnp.int32(1), zero, zero, zero, zero, jnp.where(real, jnp.int32(_OPEN), 0))
    _, _, light, *image, stop = lax.while_loop(unfinished, step, state)
    for channel, value in enumerate(image):
        plt.store(image_ref.at[(*where, channel)], value, mask=real)
    plt.store(light_ref.at[where], jnp.exp2(light), mask=real)
    plt.store(stop_ref.at[where], jnp.minimum(stop, end - start), mask=real)


def _backward_kernel(rows, ids, starts, light_ref, stop_ref, d_image, d_light, _, pairs, *, columns):
    where, real, x, y = _pixels(light_ref.shape, columns)
    light = plt.load(light_ref.at[where], mask=real, other=1.0)
    stop = plt.load(stop_ref.at[where], mask=real, other=0)
    d_colors = [plt.load(d_image.at[(*where, i)], mask=real, other=0.0)[None, :] for i in range(3)]
    behind = light * plt.load(d_light.at[where], mask=real, other=0.0)
    start, length = starts[pl.program_id(0)], jnp.max(stop)
    chunks = lax.div(length + (_CHUNK_BACKWARD - 1), jnp.int32(_CHUNK_BACKWARD))

    def step(turn, state):
        light, behind = state
        entry = (chunks - 1 - turn) * _CHUNK_BACKWARD + jnp.arange(_CHUNK_BACKWARD, dtype=jnp.int32)
        (u, v, a, b, c, opacity, *colors), inside = _load(rows, ids, start + entry, entry < length)
        dx, dy = x - u, y - v
        alphas = jnp.where(entry[:, None] < stop[None, :], alpha(dx, dy, a, b, c, opacity), 0.0)
        passed = jnp.log2(1 - alphas)
        light -= jnp.sum(passed, axis=0)
        before = jnp.exp2(light[None, :] + (jnp.cumsum(passed, axis=0) - passed))
        weight = alphas * before
        color = sum(c * d for c, d in zip(colors, d_colors))
        part = jnp.sum(weight * color, axis=0)
        left = (behind + part)[None, :] - jnp.cumsum(weight * color, axis=0)
        d_power = jnp.where(alphas < MAX_ALPHA, alphas * (before * color - left / (1 - alphas)), 0.0)

        def total(z):
            return jnp.sum(z, axis=1)

        right, down, (a, b, c, opacity) = d_power * dx, d_power * dy, (z[:, 0] for z in (a, b, c, opacity))
        to_right, to_down = total(right), total(down)
        made = (
            a * to_right + b * to_down,
            b * to_right + c * to_down,
            -0.5 * total(right * dx),
            -total(right * dy),
            -0.5 * total(down * dy),
            total(d_power) / jnp.where(opacity > 0, opacity, 1.0),
            *(total(weight * d) for d in d_colors),
        )
        for column, value in enumerate(made):
            plt.store(pairs.at[start + entry, column], value, mask=inside)
        return light, behind + part

    lax.fori_loop(0, chunks, step, (jnp.log2(light), behind))


def _sum_kernel(pairs, places, firsts, counts, out):
    row = pl.program_id(0) * _GAUSSIANS + jnp.arange(_GAUSSIANS, dtype=jnp.int32)
    column = jnp.arange(_COLUMNS, dtype=jnp.int32)
    first, count = (plt.load(ref.at[row], mask=row < out.shape[0], other=0) for ref in (firsts, counts))
    used = (column < out.shape[1])[None, :]

    def add(i, total):
        own = i < count
        place = plt.load(places.at[first + i], mask=own, other=0)
        return total + plt.load(pairs.at[place[:, None], column[None, :]], mask=own[:, None] & used, other=0.0)

    total = lax.fori_loop(0, jnp.max(count), add, jnp.zeros((_GAUSSIANS, _COLUMNS), jnp.float32))
    plt.store(out.at[row[:, None], column[None, :]], total, mask=(row < out.shape[0])[:, None] & used)


def _pixels(shape: tuple[int, ...], columns: int) -> tuple[tuple[Array, Array], Array, Array, Array]:
    """Rows and columns of a program's pixels, which of them the image has, and their centres [1, 256]."""
    lane = jnp.arange(TILE * TILE, dtype=jnp.int32)
    program, wide = pl.program_id(0), jnp.int32(columns)
    y, x = (lax.div(program, wide) * TILE + lane // TILE, lax.rem(program, wide) * TILE + lane % TILE)
    inside = (y < shape[0]) & (x < shape[1])
    return (y, x), inside, x.astype(jnp.float32)[None, :] + 0.5, y.astype(jnp.float32)[None, :] + 0.5


def _load(rows: Any, ids: Any, entry: Array, inside: Array) -> tuple[list[Array], Array]:
    """The 9 columns of a chunk's rows, [U, 1] each, zeros outside."""
    place = plt.load(ids.at[entry], mask=inside, other=0)
    values = [plt.load(rows.at[place, i], mask=inside, other=0.0)[:, None] for i in range(rows.shape[1])]
    return values, inside


def _check(interpret: bool, rows: Array, lists: Lists) -> None:
    if interpret and jax.typeof(rows).manual_axis_type.varying:
        raise NotImplementedError("JAX interprets kernels under shard_map only with check_vma=False")
    if lists.ids.size > _MAX_PAIRS:
        raise NotImplementedError(f"the Triton kernels take up to {_MAX_PAIRS} pairs, got max_pairs={lists.ids.size}")
