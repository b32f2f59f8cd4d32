"""Canny's edges (Canny, 1986) as OpenCV draws them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int32, UInt8, UInt32

_TANGENT = 13573  # of 22.5 degrees, times 2^15
_LANES = 32
_LARGEST = 32767  # thresholds are cut here before they are squared


def canny(
    image: UInt8[Array | np.ndarray, "H W *channels"], low: ArrayLike, high: ArrayLike, *, l2_gradient: bool = False
) -> Bool[Array, "H W"]:
    """Edges by 3x3 Sobel gradients, thinning across the edge and hysteresis.

    Of several channels each pixel takes the gradient that is largest. Beyond the border the image repeats its edge.

    Args:
      image: `[H, W, 3]` or `[H, W]`.
      low: pixels whose gradient is above it continue an edge; may be traced, as may `high`. The smaller of both.
      high: pixels whose gradient is above it begin one.
      l2_gradient: the gradient's length instead of the sum of its parts' magnitudes.

    Raises:
      ValueError: another dtype or number of channels, no pixels, or a negative threshold on the host.
    """
    image = image if isinstance(image, jax.Array) else np.asarray(image)
    if image.dtype != jnp.uint8:
        raise ValueError(f"image: expected uint8, got {image.dtype}")
    if image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or 0 in image.shape:
        raise ValueError(f"image: expected [H, W, 3] or [H, W], got {image.shape}")
    for name, value in (("low", low), ("high", high)):
        if isinstance(value, int | float) and not value >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {value}")
    return _canny(jnp.asarray(image), jnp.float32(low), jnp.float32(high), l2_gradient)


@functools.partial(jax.jit, static_argnums=3)
def _canny(image: UInt8[Array, "H W *channels"], low: Array, high: Array, l2_gradient: bool) -> Bool[Array, "H W"]:
    low, high = jnp.minimum(low, high), jnp.maximum(low, high)
    if l2_gradient:
        low, high = (jnp.square(jnp.minimum(x, _LARGEST)) for x in (low, high))
    low, high = (jnp.floor(x).astype(jnp.int32) for x in (low, high))
    dx, dy, size = _gradient(image[..., None] if image.ndim == 2 else image, l2_gradient)
    thin = (size > low) & _is_ridge(dx, dy, size)
    return _connected(thin & (size > high), thin)


def _gradient(
    image: UInt8[Array, "H W C"], l2_gradient: bool
) -> tuple[Int32[Array, "H W"], Int32[Array, "H W"], Int32[Array, "H W"]]:
    """dx, dy and the size of the largest channel, the first of equals."""
    height, width, channels = image.shape
    wide = jnp.pad(image.astype(jnp.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    across = wide[:, 2:] - wide[:, :width]
    down = wide[:, :width] + 2 * wide[:, 1:-1] + wide[:, 2:]
    dxs = across[:height] + 2 * across[1:-1] + across[2:]
    dys = down[2:] - down[:height]
    sizes = dxs**2 + dys**2 if l2_gradient else jnp.abs(dxs) + jnp.abs(dys)
    dx, dy, size = dxs[..., 0], dys[..., 0], sizes[..., 0]
    for c in range(1, channels):
        better = sizes[..., c] > size
        dx, dy, size = (jnp.where(better, new[..., c], old) for new, old in ((dxs, dx), (dys, dy), (sizes, size)))
    return dx, dy, size


def _is_ridge(dx: Int32[Array, "H W"], dy: Int32[Array, "H W"], size: Int32[Array, "H W"]) -> Bool[Array, "H W"]:
    """Whether no neighbour along the gradient is larger; outside the image all are 0."""
    height, width = size.shape
    wide = jnp.pad(size, 1)

    def at(down: int, right: int) -> Int32[Array, "H W"]:
        return wide[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    flat = jnp.abs(dx) * _TANGENT
    y = jnp.abs(dy) << 15
    along = (size > at(0, -1)) & (size >= at(0, 1))
    upright = (size > at(-1, 0)) & (size >= at(1, 0))
    falling = (size > at(-1, -1)) & (size > at(1, 1))
    rising = (size > at(-1, 1)) & (size > at(1, -1))
    slanted = jnp.where((dx ^ dy) < 0, rising, falling)
    return jnp.where(y < flat, along, jnp.where(y > flat + (jnp.abs(dx) << 16), upright, slanted))


def _connected(seeds: Bool[Array, "H W"], allowed: Bool[Array, "H W"]) -> Bool[Array, "H W"]:
    """Allowed pixels that a path of allowed neighbours, eight ways, joins with a seed.

    Rows are packed, 32 pixels a word: the loop runs once for each pixel of the longest path.
    """
    field = _pack(allowed)

    def grow(state):
        marked, _ = state
        tall = jnp.pad(marked, ((1, 1), (1, 1)))
        rows = tall[:-2] | tall[1:-1] | tall[2:]
        here, before, after = rows[:, 1:-1], rows[:, :-2], rows[:, 2:]
        grown = field & (here | here << 1 | before >> _LANES - 1 | here >> 1 | after << _LANES - 1)
        return grown, jnp.any(grown != marked)

    marked, _ = jax.lax.while_loop(lambda state: state[1], grow, (_pack(seeds), jnp.bool(True)))
    return _unpack(marked, allowed.shape[1])


def _pack(pixels: Bool[Array, "H W"]) -> UInt32[Array, "H words"]:
    height, width = pixels.shape
    padded = jnp.pad(pixels, ((0, 0), (0, -width % _LANES))).reshape(height, -1, _LANES)
    return jnp.sum(padded.astype(jnp.uint32) << jnp.arange(_LANES, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def _unpack(words: UInt32[Array, "H words"], width: int) -> Bool[Array, "H W"]:
    bits = (words[..., None] >> jnp.arange(_LANES, dtype=jnp.uint32)) & 1
    return bits.reshape(len(words), -1)[:, :width].astype(bool)
