"""Batches of tiles with lists of similar length, in chunks of Gaussians, until no pixel of a batch is open.

The alphas of a chunk are one block in the cache. What is serial (the transmittance, and where a pixel stops) is
unrolled over it and stays in registers, in the order of the reference: other roundings would stop some pixels at other
Gaussians, which can be seen.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import zeros_alike
from pallas_kernels.splat_rasterize import ordering
from pallas_kernels.splat_rasterize.lists import TILE, Lists, tiles_of
from pallas_kernels.splat_rasterize.reference import MAX_ALPHA, STOP, alpha

_BATCH, _CHUNK = 8, 32  # tiles, Gaussians
_PIXELS = TILE * TILE
_X, _Y = (offset.reshape(-1) - 7.5 for offset in np.mgrid[:TILE, :TILE][::-1])
_MONOMIALS = np.stack([_X**0, _X, _Y, _X * _X, _X * _Y, _Y * _Y], axis=1).astype(np.float32)


def forward(
    rows: Float[Array, "n 9"], depths: Float[Array, " n"], lists: Lists, *, width: int, height: int
) -> tuple[Float[Array, "h w 3"], Float[Array, "h w"], Int[Array, "h w"], Int[Array, " n"]]:
    """Image, transmittance, how many of its list each pixel went through, and the pixels of each Gaussian."""
    del depths
    lengths = lists.starts[1:] - lists.starts[:-1]
    order = _by_length(lengths, lists.ids.size)

    def batch(counts, tiles):
        x, y = _pixels(tiles, width)
        start, length = lists.starts.at[tiles].get(mode="clip"), lengths.at[tiles].get(mode="fill", fill_value=0)

        def unfinished(state):
            chunk, light, *_ = state
            return jnp.any((light > 0) & (length > chunk * _CHUNK)[:, None])

        def step(state):
            chunk, light, image, stop, counts = state
            ids, values = _chunk(rows, lists, start, length, chunk)
            alphas = lax.optimization_barrier(_alphas(values, x, y))
            entry = chunk * _CHUNK + jnp.arange(_CHUNK, dtype=jnp.int32)
            for i in range(_CHUNK):
                after = light * (1 - alphas[:, i])
                stays = after >= STOP
                weight = jnp.where(stays, alphas[:, i] * light, 0.0)
                image = image + weight[:, None] * values[:, i, 6:, None]
                stop = jnp.where(stays | (light < 0), stop, entry[i])
                light = jnp.where(stays, after, -jnp.abs(light))
            seen = (alphas > 0) & (entry[:, None] < stop[:, None])
            counts = counts.at[ids].add(jnp.sum(seen, axis=2, dtype=jnp.int32), mode="drop")
            return chunk + 1, light, image, stop, counts

        real = (x < width) & (y < height)
        light, stop = jnp.where(real, jnp.float32(1), -1), jnp.where(real, jnp.int32(2**30), 0)
        state = (jnp.int32(0), light, zeros_alike((tiles.size, 3, _PIXELS), jnp.float32, rows), stop, counts)
        _, light, image, stop, counts = lax.while_loop(unfinished, step, state)
        return counts, (image, jnp.abs(light), jnp.minimum(stop, length[:, None]))

    counts, (image, light, stop) = lax.scan(
        batch, zeros_alike(rows.shape[:1], jnp.int32, rows), order.reshape(-1, _BATCH)
    )
    image, light, stop = (_from_tiles(x.reshape(-1, *x.shape[2:]), order, width, height) for x in (image, light, stop))
    return image, light[..., 0], stop[..., 0], counts


def backward(
    rows: Float[Array, "n 9"],
    depths: Float[Array, " n"],
    lists: Lists,
    transmittance: Float[Array, "h w"],
    stops: Int[Array, "h w"],
    d_image: Float[Array, "h w 3"],
    d_transmittance: Float[Array, "h w"],
) -> Float[Array, "n 9"]:
    """The gradient of the rows: every list back to front, the transmittance recovered by division."""
    del depths
    width = transmittance.shape[1]
    d_light = transmittance * d_transmittance
    light, behind, stop = (_to_tiles(x[..., None])[:, 0] for x in (transmittance, d_light, stops))
    d_image = _to_tiles(d_image)
    order = _by_length(jnp.max(stop, axis=1), lists.ids.size)

    def batch(grads, tiles):
        x, y = _pixels(tiles, width)
        start, until = lists.starts.at[tiles].get(mode="clip"), stop.at[tiles].get(mode="fill", fill_value=0)
        own = [x.at[tiles].get(mode="clip") for x in (light, behind)]
        d_colors, length = d_image.at[tiles].get(mode="clip"), jnp.max(until, axis=1)

        def step(turn, state):
            chunk = chunks - 1 - turn
            light, behind, grads = state
            ids, values = _chunk(rows, lists, start, length, chunk)
            entry = chunk * _CHUNK + jnp.arange(_CHUNK, dtype=jnp.int32)
            alphas = jnp.where(entry[:, None] < until[:, None], _alphas(values, x, y), 0.0)
            red, green, blue = (values[:, :, 6 + i, None] * d_colors[:, None, i] for i in range(3))
            colors = (red + green + blue).swapaxes(0, 1)
            alphas, colors = lax.optimization_barrier((alphas.swapaxes(0, 1), colors))

            def back(i, state):
                light, behind, weights, d_powers = state
                i = _CHUNK - 1 - i
                value, color = alphas[i], colors[i]
                light = light / (1 - value)
                d_power = jnp.where(value < MAX_ALPHA, value * (light * color - behind / (1 - value)), 0.0)
                weight = value * light
                return light, behind + weight * color, weights.at[i].set(weight), d_powers.at[i].set(d_power)

            nothing = zeros_alike(alphas.shape, jnp.float32, rows)
            light, behind, weights, d_powers = lax.fori_loop(0, _CHUNK, back, (light, behind, nothing, nothing))
            moments = (d_powers.reshape(-1, _PIXELS) @ _MONOMIALS).reshape(*d_powers.shape[:2], -1).swapaxes(0, 1)
            made = _gradients(values, moments, x[:, 0] + 7.5, y[:, 0] + 7.5)
            made = jnp.concatenate([made, jnp.einsum("ubp,bcp->buc", weights, d_colors)], axis=2)
            return light, behind, grads.at[ids].add(made, mode="drop")

        chunks = (jnp.max(length) + (_CHUNK - 1)) // _CHUNK
        return lax.fori_loop(0, chunks, step, (*own, grads))[2], None

    return lax.scan(batch, zeros_alike(rows.shape, jnp.float32, rows), order.reshape(-1, _BATCH))[0]


def _gradients(values, moments, x, y):
    """Of centre, conic and opacity, [B, U, 6], from the moments of the gradient of the exponent about (x, y)."""
    u, v, a, b, c, opacity = (values[..., i] for i in range(6))
    one, right, down, xx, xy, yy = (moments[..., i] for i in range(6))
    u, v = u - x[:, None], v - y[:, None]
    xx = xx - 2 * u * right + u * u * one
    xy = xy - u * down - v * right + u * v * one
    yy = yy - 2 * v * down + v * v * one
    right, down = right - u * one, down - v * one
    d_opacity = one / jnp.where(opacity > 0, opacity, 1.0)
    return jnp.stack([a * right + b * down, b * right + c * down, -0.5 * xx, -xy, -0.5 * yy, d_opacity], axis=-1)


def _by_length(lengths, most):
    """Tiles in batches, long lists first; the last batch is filled up with tiles that are none."""
    order = ordering.stable_order((most - lengths).astype(jnp.uint32), most.bit_length())
    return jnp.pad(order, (0, -order.size % _BATCH), constant_values=lengths.size)


def _pixels(tiles, width):
    """The centres of the pixels of tiles, [B, 256] each."""
    columns = tiles_of(width, 1)[0]
    inside = jnp.arange(_PIXELS, dtype=jnp.int32)
    x = (tiles % columns * TILE)[:, None] + inside % TILE
    y = (tiles // columns * TILE)[:, None] + inside // TILE
    return x.astype(jnp.float32) + 0.5, y.astype(jnp.float32) + 0.5


def _chunk(rows, lists, start, length, chunk):
    """The ids [B, U] of a chunk of each list and their rows [B, U, 9]; N and zeros past its end."""
    entry = chunk * _CHUNK + jnp.arange(_CHUNK, dtype=jnp.int32)
    ids = lists.ids.at[start[:, None] + entry].get(mode="clip")
    ids = jnp.where(entry < length[:, None], ids, rows.shape[0])
    return ids, rows.at[ids].get(mode="fill", fill_value=0.0)


def _alphas(values, x, y):
    """[B, U, 256] of the rows [B, U, 9] of a chunk."""
    u, v, *rest = (values[:, :, i, None] for i in range(6))
    return alpha(x[:, None] - u, y[:, None] - v, *rest)


def _from_tiles(x, order, width, height):
    """[tiles in some order, (C,) 256] -> [H, W, (C)]."""
    columns, lines = tiles_of(width, height)
    place = jnp.zeros(columns * lines, jnp.int32).at[order].set(jnp.arange(order.size, dtype=jnp.int32), mode="drop")
    x = x[place].reshape(lines, columns, -1, TILE, TILE).transpose(0, 3, 1, 4, 2)
    return x.reshape(lines * TILE, columns * TILE, -1)[:height, :width]


def _to_tiles(x):
    """[H, W, C] -> [T, C, 256], zeros outside."""
    columns, lines = tiles_of(x.shape[1], x.shape[0])
    x = jnp.pad(x, ((0, lines * TILE - x.shape[0]), (0, columns * TILE - x.shape[1]), (0, 0)))
    x = x.reshape(lines, TILE, columns, TILE, -1).transpose(0, 2, 4, 1, 3)
    return x.reshape(lines * columns, -1, _PIXELS)
