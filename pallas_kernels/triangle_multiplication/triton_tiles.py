"""What the Triton kernels of triangle multiplication share: how pairs and channels lie, normalisations, gates.

a, b, t and their gradients are channel-major, `[B,F,N*W]`: the product over k is then one matrix product a channel.
Rows of N are padded with zeros to W, a multiple of 16 bytes, so that copies stay wide whatever N is. The pair
representation itself stays as it came, `[B,N*N,C]`. Kernels hold both as `[channels, P]`, for P positions of the padded
grid.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int8

from pallas_kernels.tiles import check_tiles

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_MAX_CHANNELS = 128  # a tile holds all channels of its positions in registers


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a tile, and how a program is run.

    Attributes:
      channels: hidden channels (rows of a channel's product).
      positions: pairs (columns of a channel's product).
      depth: how much of a contracted k one step takes; only products have one.
      warps: warps a program.
      stages: tiles in flight in the software pipeline.
    """

    channels: int
    positions: int
    depth: int = 16
    warps: int = 8
    stages: int = 2

    def __post_init__(self):
        check_tiles(self)

    def fit(self, *, channels: int, positions: int, depth: int = 16) -> "Tiles":
        """No larger than the problem."""
        sizes = {"channels": channels, "positions": positions, "depth": depth}
        return dataclasses.replace(self, **{name: min(getattr(self, name), padded(n)) for name, n in sizes.items()})

    @property
    def params(self) -> plt.CompilerParams:
        """For `pallas_call`."""
        return plt.CompilerParams(num_warps=self.warps, num_stages=self.stages)


class Place(NamedTuple):
    """The positions of a tile: index[P] in a padded grid, pair[P] in z, and which of them are pairs (None: all)."""

    batch: Array
    index: Array
    pair: Array
    real: Array | None


class Normalised(NamedTuple):
    """A normalised tile `[channels, P]`, float32: before scale and offset, after them; and rstd[P].

    Without a normalisation, all three are what there is to hand on: the input twice, and no rstd.
    """

    hat: Array
    value: Array
    rstd: Array | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is static of a call, and what follows from it within a kernel."""

    batch: int
    n: int
    channels: int
    hidden: int
    width: int
    eps: float
    dtype: Any

    @classmethod
    def of(cls, z: Array, hidden: int, eps: float) -> "Problem":
        """Of an array z `[B,N,N,C]`."""
        batch, n, _, channels = z.shape
        unit = 16 // z.dtype.itemsize
        return cls(batch, n, channels, hidden, -(-n // unit) * unit, eps, z.dtype)

    @property
    def pairs(self) -> tuple[int, int, int]:
        """Shape of the pair representation."""
        return self.batch, self.n * self.n, self.channels

    @property
    def grids(self) -> tuple[int, int, int]:
        """Shape of a channel-major array."""
        return self.batch, self.hidden, self.n * self.width

    def tile_count(self, tiles: Tiles) -> int:
        """Tiles of positions of the whole batch."""
        return self.batch * pl.cdiv(self.n * self.width, tiles.positions)

    def place(self, tile: Array, tiles: Tiles) -> Place:
        """Where the positions of a tile are."""
        count = jnp.int32(pl.cdiv(self.n * self.width, tiles.positions))
        index = lax.rem(tile, count) * tiles.positions + arange(tiles.positions)
        if self.width == self.n:
            real = index < self.n * self.n if self.n * self.n % tiles.positions else None
            return Place(lax.div(tile, count), index, index, real)
        row = lax.div(index, jnp.int32(self.width))
        column = index - row * self.width
        return Place(lax.div(tile, count), index, row * self.n + column, (column < self.n) & (row < self.n))

    def load_pairs(self, ref: Any, at: Place, channel: Array | None = None, again: bool = False) -> Array:
        """[channels, P] of a `[B,N*N,C]` array, all channels if none are named; zeros where there is no pair."""
        channel = arange(padded(self.channels)) if channel is None else channel
        where = (at.batch, at.pair[None, :], channel[:, None])
        return load(
            ref, where, flat(at.real), within(channel, self.channels, 0), policy="evict_first" if again else None
        )

    def store_pairs(self, ref: Any, at: Place, value: Array) -> None:
        """Writes what `load_pairs` would read."""
        channel = arange(padded(self.channels))
        where = (at.batch, at.pair[None, :], channel[:, None])
        store(ref, where, value, flat(at.real), within(channel, self.channels, 0))

    def load_channels(self, ref: Any, at: Place, channel: Array, again: bool = False) -> Array:
        """[channels, P] of a `[B,F,N*W]` array; zeros outside."""
        where = (at.batch, channel[:, None], at.index[None, :])
        return load(ref, where, *self._within(at, channel), policy="evict_first" if again else None)

    def store_channels(self, ref: Any, at: Place, channel: Array, value: Array) -> None:
        """Writes what `load_channels` would read."""
        store(ref, (at.batch, channel[:, None], at.index[None, :]), value, *self._within(at, channel))

    def _within(self, at: Place, channel: Array) -> tuple[Array | None, Array | None]:
        size = self.n * self.width
        inside = (at.index < size)[None, :] if size % at.index.size else None
        return inside, within(channel, self.hidden, 0)

    def mask(self, mask: Bool[Array, "b n n"] | None) -> Int8[Array, "b nn"] | None:
        """The mask as kernels read it, in bytes."""
        return None if mask is None else mask.reshape(self.pairs[:2]).astype(jnp.int8)

    def keep(self, mask_ref: Any, at: Place) -> Array | None:
        """[1, P]: which positions are valid pairs; None when all."""
        if mask_ref is None:
            return flat(at.real)
        return flat(load(mask_ref, (at.batch, at.pair), at.real) != 0)

    def load_x(self, ref: Any, affine: Any, at: Place, again: bool = False) -> Normalised:
        """A tile of z, normalised; one loaded `again` is not what the compiler kept of the first time."""
        return self.normalise(self.load_pairs(ref, at, again=again), affine, self.channels)

    def load_t(self, ref: Any, affine: Any, at: Place, again: bool = False) -> Normalised:
        """A tile of t, normalised."""
        return self.normalise(self.load_channels(ref, at, arange(padded(self.hidden)), again), affine, self.hidden)

    def normalise(self, x: Array, affine: Any, count: int) -> Normalised:
        """Over the first `count` channels of `[channels, P]`; the rest stays zero."""
        x = x.astype(jnp.float32)
        if affine is None:
            return Normalised(x, x, None)
        channel = arange(x.shape[0])
        inside = within(channel, count, 0)
        centred = x - jnp.sum(x, axis=0)[None, :] / count
        centred = centred if inside is None else jnp.where(inside, centred, 0.0)
        rstd = lax.rsqrt(jnp.sum(centred * centred, axis=0) / count + self.eps)
        hat = centred * rstd[None, :]
        scale, offset = (load(ref, (channel[:, None],), inside).astype(jnp.float32) for ref in affine)
        return Normalised(hat, hat * scale + offset, rstd)

    def normalise_gradient(self, d_value: Array, normalised: Normalised, affine: Any, count: int) -> Array:
        """The gradient of the input of `normalise`."""
        if affine is None or normalised.rstd is None:
            return d_value
        channel = arange(d_value.shape[0])
        d_hat = d_value * load(affine[0], (channel[:, None],), within(channel, count, 0)).astype(jnp.float32)
        mean = jnp.sum(d_hat, axis=0) / count
        along = jnp.sum(d_hat * normalised.hat, axis=0) / count
        return (d_hat - mean[None, :] - normalised.hat * along[None, :]) * normalised.rstd[None, :]


def dot(a: Float[Array, "_ _"], b: Float[Array, "_ _"], axis_a: int, axis_b: int) -> Float[Array, "_ _"]:
    """The product over one axis of each, float32; the other axis of a comes first."""
    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def arange(size: int) -> Array:
    """0 .. size - 1."""
    return jnp.arange(size, dtype=jnp.int32)


def within(index: Array, limit: int, axis: int | None = None) -> Array | None:
    """Whether an index, along an axis of a tile of two if one is given, is below its limit; None where it always is."""
    if limit % index.size == 0:
        return None
    inside = index < limit
    return inside if axis is None else jnp.expand_dims(inside, 1 - axis)


def load_matrix(ref: Any, row: Array, column: Array, *, columns: int | None = None, first: int = 0) -> Array:
    """A tile of a matrix, zeros outside of it; or of its `columns` columns from the `first` on."""
    masks = within(row, ref.shape[0], 0), within(column, ref.shape[1] if columns is None else columns, 1)
    return load(ref, (row[:, None], first + column[None, :]), *masks)


def sigmoid(x: Array) -> Array:
    """The logistic function."""
    return 1 / (1 + jnp.exp(-x))


def flat(x: Array | None) -> Array | None:
    """[n] -> [1, n]."""
    return None if x is None else x[None, :]


def load(ref: Any, where: tuple[Any, ...], *masks: Array | None, policy: str | None = None) -> Array:
    """Loads a tile, zeros where a mask is False."""
    mask = _all(masks)
    other = None if mask is None else 0
    return plt.load(ref.at[where], mask=mask, other=other, eviction_policy=policy)


def store(ref: Any, where: tuple[Any, ...], value: Array, *masks: Array | None) -> None:
    """Stores a tile in the array's dtype, except where a mask is False."""
    plt.store(ref.at[where], value.astype(ref.dtype), mask=_all(masks))


def check(interpret: bool, z: Array, hidden: int) -> None:
    """Refuses what the kernels cannot do."""
    if z.dtype not in _DTYPES:
        raise NotImplementedError(f"the Triton kernels take bfloat16, float16 and float32, got {z.dtype}")
    if max(z.shape[-1], hidden) > _MAX_CHANNELS:
        raise NotImplementedError(
            f"the Triton kernels take up to {_MAX_CHANNELS} channels, got {z.shape[-1]} and {hidden}"
        )
    if interpret and jax.typeof(z).manual_axis_type.varying:
        raise NotImplementedError("JAX interprets kernels under shard_map only with check_vma=False")


def _all(masks: tuple[Array | None, ...]) -> Array | None:
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    made = given[0]
    for mask in given[1:]:
        made &= mask
    return made


def padded(size: int) -> int:
    """The smallest power of two that is not below a size, at least 16."""
    return 1 << max(size - 1, 15).bit_length()
