"""Mixed-precision quantisation (MPQ, section 3.2 of the paper): minimum and maximum per channel and segment of rows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

BITS = (2, 4, 8)
RULES = ("balanced", "official")
AUTO_ROWS, MOST_SEGMENTS = 4096, 1000
"""Ours: rows of a segment where their number is not given; the official number of segments is the largest."""


def auto_segments(n: int) -> int:
    """About one segment for 4096 rows, at most 1000."""
    return max(1, min(math.ceil(n / AUTO_ROWS), MOST_SEGMENTS))


def segment_bounds(n: int, segments: int, bits: int, *, rule: str = "balanced") -> Int[np.ndarray, " s1"]:
    """Where the segments of consecutive rows begin, and `n`: strictly rising from 0.

    Args:
      n: rows.
      segments: how many are wanted; there are fewer where some would be empty.
      bits: of a code; a segment begins where a byte does, so that 4 bits make even lengths and 2 bits multiples of 4.
      rule: "balanced": lengths at most one such unit apart; "official": those of the paper's code, which are one length
        rounded up (2 and 4 bits) or evenly spaced positions rounded down (8 bits).
    """
    if n < 1 or segments < 1:
        raise ValueError(f"n, segments: expected at least 1, got {n} and {segments}")
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {RULES}, got {rule!r}")
    unit = 8 // _checked_bits(bits)
    if rule == "official" and bits < 8:
        length = math.ceil(math.ceil(n / min(segments, n)) / unit) * unit
        return np.append(np.arange(0, n, length), n)
    if rule == "official":
        return np.linspace(0, n, min(segments, n) + 1).astype(np.int64)
    units = -(-n // unit)
    count = min(segments, units)
    bounds = np.arange(count + 1) * units // count * unit  # the last is the longest, so that its tail may be missing
    bounds[-1] = n
    return bounds


def quantize_matrix(
    x: Float[Array | np.ndarray, "n c"], bounds: Int[np.ndarray, " s1"], bits: int
) -> tuple[UInt8[np.ndarray, "n c"], Float[np.ndarray, "s c"], Float[np.ndarray, "s c"]]:
    """Codes of 0 to 2^bits - 1 for the rows of each segment, by its channels' minimum and maximum.

    Returns:
      codes, and the minimum and scale they stand for: x is about minimum + code scale, at most half a scale away; a
      channel that is constant in a segment has scale 1.

    Raises:
      ValueError: bounds that do not rise from 0 to n; other bits; a segment whose range no float32 holds.
    """
    count, channels = x.shape
    largest = 2 ** _checked_bits(bits) - 1
    index, place = _layout(_checked_bounds(bounds, count))
    if channels == 0:
        empty = np.zeros((len(bounds) - 1, 0), np.float32)
        return np.zeros((count, 0), np.uint8), empty, empty
    codes, minimum, scale = _quantized(_bucketed(np.asarray(x, np.float32)), index, np.float32(largest))
    codes = np.asarray(codes).reshape(-1, channels)[place]
    minimum, scale = (np.asarray(table)[: len(bounds) - 1] for table in (minimum, scale))
    if not np.isfinite(scale).all():
        raise ValueError("x: the values of a segment span more than float32 holds")
    return codes, minimum, scale


def dequantize_matrix(
    codes: UInt8[Array | np.ndarray, "n c"],
    minimum: Float[Array | np.ndarray, "s c"],
    scale: Float[Array | np.ndarray, "s c"],
    bounds: Int[np.ndarray, " s1"],
) -> Float[np.ndarray, "n c"]:
    """The values that codes stand for, minimum + code scale, float32."""
    bounds = _checked_bounds(bounds, codes.shape[0])
    if np.shape(minimum) != (len(bounds) - 1, codes.shape[1]) or np.shape(scale) != np.shape(minimum):
        shapes = f"{np.shape(minimum)} and {np.shape(scale)}"
        raise ValueError(f"minimum, scale: expected shape {(len(bounds) - 1, codes.shape[1])}, got {shapes}")
    lengths = np.diff(bounds)
    values = np.asarray(codes).astype(np.float32)
    values *= np.repeat(np.asarray(scale, np.float32), lengths, axis=0)
    values += np.repeat(np.asarray(minimum, np.float32), lengths, axis=0)
    return values


def pack_codes(codes: UInt8[Array | np.ndarray, "n c"], bits: int) -> UInt8[np.ndarray, "p c"]:
    """Codes of consecutive rows in one byte, the first in the top bits; the tail is filled with 0."""
    codes, unit = np.asarray(codes), 8 // _checked_bits(bits)
    if unit == 1:
        return codes
    packed = np.zeros((-(-len(codes) // unit), codes.shape[1]), np.uint8)
    for i in range(unit):
        part = codes[i::unit]
        packed[: len(part)] |= part << np.uint8(8 - bits * (i + 1))
    return packed


def unpack_codes(packed: UInt8[Array | np.ndarray, "p c"], bits: int, n: int) -> UInt8[np.ndarray, "n c"]:
    """The first `n` rows of codes of `pack_codes`."""
    packed, unit = np.asarray(packed), 8 // _checked_bits(bits)
    if len(packed) != -(-n // unit):
        raise ValueError(f"packed: expected {-(-n // unit)} rows for {n} codes of {bits} bits, got {len(packed)}")
    if unit == 1:
        return packed
    codes = np.empty((n, packed.shape[1]), np.uint8)
    for i in range(unit):
        part = codes[i::unit]
        part[:] = packed[: len(part)] >> np.uint8(8 - bits * (i + 1)) & np.uint8(2**bits - 1)
    return codes


@jax.jit
def _quantized(
    x: Float[Array, "n c"], index: Int[Array, "s l"], largest: Float[Array, ""]
) -> tuple[UInt8[Array, "s l c"], Float[Array, "s c"], Float[Array, "s c"]]:
    rows = x[index]  # `largest` is traced: XLA would turn a division by a constant into a product
    minimum = rows.min(axis=1)
    scale = (rows.max(axis=1) - minimum) / largest
    scale = jnp.where(scale == 0, 1.0, scale)
    codes = jnp.round((rows - minimum[:, None]) / scale[:, None])
    return jnp.clip(codes, 0, largest).astype(jnp.uint8), minimum, scale


def _layout(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Segments as the rows of a table, each filled up by its last row; and where in the table each row went.

    Both sides of the table are rounded up, so that scenes of nearly the same size share a compiled program.
    """
    lengths = np.diff(bounds)
    width, height = _bucket(int(lengths.max())), _bucket(len(lengths))
    index = np.minimum(bounds[:-1, None] + np.arange(width), bounds[1:, None] - 1)
    index = np.pad(index, ((0, height - len(lengths)), (0, 0)))
    starts = np.arange(len(lengths)) * width - bounds[:-1]
    return index.astype(np.int32), np.arange(bounds[-1]) + np.repeat(starts, lengths)


def _bucketed(x: np.ndarray) -> np.ndarray:
    rows = _bucket(len(x))
    return x if rows == len(x) else np.concatenate([x, np.zeros((rows - len(x), x.shape[1]), x.dtype)])


def _bucket(n: int) -> int:
    """`n` rounded up to a multiple of an eighth to a quarter of the power of two below it."""
    step = 1 << max(n.bit_length() - 4, 0)
    return -(-n // step) * step


def _checked_bits(bits: int) -> int:
    if bits not in BITS:
        raise ValueError(f"bits: expected one of {BITS}, got {bits!r}")
    return bits


def _checked_bounds(bounds: np.ndarray, count: int) -> np.ndarray:
    bounds = np.asarray(bounds)
    if bounds.ndim != 1 or len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != count or not (np.diff(bounds) > 0).all():
        raise ValueError(f"bounds: expected whole numbers that rise strictly from 0 to {count}, got {bounds}")
    return bounds
