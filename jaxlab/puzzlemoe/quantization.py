"""A merged pair in 3.36 bits a weight: quantised magnitudes, one trit for both masks (arXiv:2511.04805, appendix).

A position takes two signs, a trit (only i, only j, both), and a level; levels are symmetric around no zero point, as
magnitudes are not negative. Five trits make a byte (3^5 = 243), so that a position of a pair has
2 + 1.6 + bits + 16 / group_size bits, and a weight half of that.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Integer, UInt8

from jaxlab.puzzlemoe.merging import ArrayLike, MergedPair, check_pos, reconstruct

_TRITS = 5
_ONLY_I, _ONLY_J, _BOTH = 0, 1, 2


@struct.dataclass
class QuantizedPair:
    """A merged pair with quantised magnitudes, positions in C order.

    Attributes:
        planes: `[bits + 2, ceil(positions / 8)]` uint8: the bits of the levels, highest first, then signs of i and j;
            the first position is the highest bit of a byte.
        trits: `[ceil(positions / 5)]` uint8: masks, the first position counts 81.
        scales: bfloat16 steps between levels, the shape of the weights with groups in place of the input axis.
        shape: of the weights.
        axis: their input axis, along which groups run.
        group_size: weights that share a scale (the last group may have fewer).
    """

    planes: Any
    trits: Any
    scales: Any
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    axis: int = struct.field(pytree_node=False)
    group_size: int = struct.field(pytree_node=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays."""
        return sum(leaf.nbytes for leaf in (self.planes, self.trits, self.scales))


def quantize_pair(pair: MergedPair, *, bits: int = 3, group_size: int = 128, axis: int = -2) -> QuantizedPair:
    """Quantises the magnitudes of a pair; masks and signs stay as they are.

    A group's scale is its largest magnitude over 2^bits - 1, rounded to bfloat16.

    Args:
        pair: of `dual_mask_merge`, magnitudes finite.
        bits: of a magnitude, 1..8.
        group_size: weights along the input axis that share a scale.
        axis: input axis of the weights: -2 in this library, -1 in Hugging Face's files.

    Raises:
        ValueError: `bits`, `group_size` or `axis` out of range.
    """
    mag = jnp.asarray(pair.mag)
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be in 1..8, got {bits}")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if not -mag.ndim <= axis < mag.ndim:
        raise ValueError(f"axis {axis} is not one of weights of shape {mag.shape}")
    return _quantize(pair, bits, group_size, axis)


@functools.partial(jax.jit, static_argnames=("bits", "group_size", "axis"))
def _quantize(pair: MergedPair, bits: int, group_size: int, axis: int) -> QuantizedPair:
    top, mag = 2**bits - 1, jnp.asarray(pair.mag)
    mask_i, mask_j = jnp.asarray(pair.mask_i), jnp.asarray(pair.mask_j)
    # A position that neither uses has no trit of its own: it is a zero of both.
    m = jnp.where(mask_i | mask_j, mag, 0).astype(jnp.float32)
    scales = (_group_max(m, group_size, axis) / top).astype(jnp.bfloat16)
    step = _spread(scales, m.shape[axis], group_size, axis)
    level = jnp.clip(jnp.round(m / jnp.where(step > 0, step, 1.0)), 0, top).astype(jnp.uint8)
    planes = [level >> bit & 1 for bit in reversed(range(bits))]
    planes = jnp.stack([jnp.packbits(jnp.ravel(p)) for p in (*planes, pair.sign_i, pair.sign_j)])
    trit = jnp.where(mask_i == mask_j, _BOTH, jnp.where(mask_i, _ONLY_I, _ONLY_J))
    return QuantizedPair(planes, _pack_trits(trit.reshape(-1)), scales, mag.shape, axis, group_size)


def dequantize_pair(q: QuantizedPair, pos: int | Integer[ArrayLike, ""]) -> Float[Array, "..."]:
    """The weights of one member of a quantised pair, bfloat16; `pos` as in `reconstruct`.

    Raises:
        ValueError: a concrete `pos` that is neither 0 nor 1.
    """
    check_pos(pos)
    return _dequantize(q, pos)


@jax.jit
def _dequantize(q: QuantizedPair, pos: Array) -> Array:
    size = math.prod(q.shape)
    *planes, sign_i, sign_j = (jnp.unpackbits(plane, count=size).reshape(q.shape) for plane in q.planes)
    level = sum(plane.astype(jnp.float32) * 2**bit for bit, plane in enumerate(reversed(planes)))
    mag = (level * _spread(q.scales, q.shape[q.axis], q.group_size, q.axis)).astype(jnp.bfloat16)
    trit = _unpack_trits(q.trits, size).reshape(q.shape)
    return reconstruct(MergedPair(mag, trit != _ONLY_J, trit != _ONLY_I, _as_bool(sign_i), _as_bool(sign_j)), pos)


def _as_bool(bits: Array) -> Bool[Array, "..."]:
    return bits.astype(bool)


def _group_max(m: Array, group_size: int, axis: int) -> Array:
    m = jnp.moveaxis(m, axis, 0)
    padded = jnp.pad(m, [(0, -len(m) % group_size), *[(0, 0)] * (m.ndim - 1)])
    return jnp.moveaxis(jnp.max(padded.reshape(-1, group_size, *m.shape[1:]), axis=1, initial=0.0), 0, axis)


def _spread(scales: Array, size: int, group_size: int, axis: int) -> Float[Array, "..."]:
    """The scale of every position."""
    return jnp.repeat(scales.astype(jnp.float32), group_size, axis=axis).take(jnp.arange(size), axis=axis)


def _pack_trits(trits: Int[Array, " n"]) -> UInt8[Array, " m"]:
    rows = jnp.pad(trits, (0, -trits.size % _TRITS)).reshape(-1, _TRITS)
    return jnp.sum(rows * 3 ** jnp.arange(_TRITS)[::-1], axis=1).astype(jnp.uint8)


def _unpack_trits(packed: UInt8[Array, " m"], count: int) -> Int[Array, " n"]:
    digits = packed.astype(jnp.int32)[:, None] // 3 ** jnp.arange(_TRITS)[::-1] % 3
    return digits.reshape(-1)[:count]
