"""Which Gaussians each 16 x 16 tile of the image is made of, front to back, in arrays of static sizes."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.dispatch import zeros_alike
from pallas_kernels.splat_rasterize import ordering

TILE = 16
_MANY = 2**31 - 1
_ROUNDING = 2.0**-20  # of a few operations, relative


class Lists(NamedTuple):
    """A pair is a tile and a Gaussian that may be seen in it. There is room for P of them, N Gaussians and T tiles.

    Attributes:
      ids: the Gaussians of the pairs, tile after tile, [P].
      starts: the first pair of each tile, and the end of the last, [T + 1].
      places: where among `ids` the pairs of the first Gaussian are, then those of the second: front to back, [P].
      firsts: the first of `places` of each Gaussian, [N].
      counts: how many it has, [N].
    """

    ids: Int[Array, " p"]
    starts: Int[Array, " t+1"]
    places: Int[Array, " p"]
    firsts: Int[Array, " n"]
    counts: Int[Array, " n"]


def tiles_of(width: int, height: int) -> tuple[int, int]:
    """Columns and rows of tiles."""
    return -(-width // TILE), -(-height // TILE)


def build(
    rows: Float[Array, "n 9"], depths: Float[Array, " n"], *, width: int, height: int, max_pairs: int
) -> tuple[Lists, Int[Array, ""]]:
    """The lists, and how many pairs there are (2**31 - 1 above 2**30). What is above `max_pairs` is cut off."""
    columns, lines = tiles_of(width, height)
    tiles = columns * lines
    left, top, right, bottom = _boxes(rows, width, height)
    counts = (right - left) * (bottom - top)
    # Sums of 32 bits that would overflow are not taken: then there are no pairs, but a number that says so.
    many = jnp.sum(counts.astype(jnp.float32)) > 2.0**30
    counts = jnp.where(many, 0, counts)

    order = ordering.stable_order(_keys(depths, counts > 0), 32)
    ends = jnp.cumsum(counts[order])
    firsts = ends - counts[order]

    # Those without a pair come last, so that each of the others marks where its pairs begin.
    marked = jnp.where(counts[order] > 0, firsts, max_pairs)
    marks = zeros_alike((max_pairs,), jnp.int32, rows).at[marked].add(1, mode="drop")
    # One gather a number: together they would be a table of pairs, and neighbours read the same rows anyway.
    numbers = order, firsts, (top * columns + left)[order], (right - left)[order]
    turn = jnp.cumsum(marks) - 1
    ids, first, corner, wide = (x.at[turn].get(mode="clip") for x in numbers)
    pair = jnp.arange(max_pairs, dtype=jnp.int32)
    line = lax.div(pair - first, jnp.maximum(wide, 1))
    tile = corner + line * (columns - wide) + (pair - first)
    tile = jnp.where(pair < ends[-1], tile, tiles)

    by_tile = ordering.stable_order(tile.astype(jnp.uint32), tiles.bit_length())
    ids, tile = (x.at[by_tile].get(mode="promise_in_bounds") for x in (ids, tile))
    lists = Lists(
        ids=ids,
        starts=jnp.searchsorted(tile, jnp.arange(tiles + 1, dtype=jnp.int32)).astype(jnp.int32),
        places=ordering.inverse(by_tile),
        firsts=jnp.zeros_like(firsts).at[order].set(firsts, unique_indices=True),
        counts=counts,
    )
    return lists, jnp.where(many, _MANY, ends[-1])


def _keys(depths: Float[Array, " n"], seen: Bool[Array, " n"]) -> UInt32[Array, " n"]:
    """Unsigned numbers in the order of the depths; what is not seen comes last."""
    bits = lax.bitcast_convert_type(jnp.where(depths == 0, 0.0, depths), jnp.int32)  # one zero, not two
    keys = lax.bitcast_convert_type(bits ^ ((bits >> 31) | jnp.int32(-(2**31))), jnp.uint32)
    return jnp.where(seen, keys, jnp.uint32(2**32 - 1))


def _boxes(rows: Float[Array, "n 9"], width: int, height: int) -> tuple[Int[Array, " n"], ...]:
    """First columns and rows of tiles, and last + 1, that have a pixel in which a Gaussian's alpha is 1/255 or more.

    Each box is a little larger than its ellipse, so that rounding hides no pixel; where the conic is not that of an
    ellipse, it is the whole image.
    """
    u, v, a, b, c, opacity = (rows[:, i] for i in range(6))
    level = 2 * jnp.log(jnp.maximum(255 * opacity, 1.0)) + 1e-5
    determinant = a * c * (1 - _ROUNDING) - b * b
    ellipse = (determinant > 0) & (a > 0)
    ends = []
    for middle, other, size in ((u, c, width), (v, a, height)):
        half = jnp.sqrt(level * jnp.where(ellipse, other / jnp.where(ellipse, determinant, 1.0), jnp.inf))
        half = half + (1e-3 + _ROUNDING * (jnp.abs(middle) + half))
        first = jnp.clip(jnp.ceil(middle - half - 0.5), 0, size).astype(jnp.int32)
        last = jnp.clip(jnp.floor(middle + half - 0.5), -1, size - 1).astype(jnp.int32)
        some = (first <= last) & (opacity >= 1 / 255)
        ends.append((first // TILE, jnp.where(some, last // TILE + 1, first // TILE)))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom
