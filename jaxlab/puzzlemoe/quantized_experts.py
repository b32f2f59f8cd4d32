"""Packed experts below 16 bits a position, in a form that runs: pair code, level, a scale for each group (ours).

The paper quantises magnitudes for storage only (appendix), at 3.35 bits a weight of an original expert. Signs and masks
of a pair are one of eight combinations, three bits: with levels of 5 or 3 bits a position takes 8 or 6, a weight 4.06
or 3.06 with its share of the scale, and the kernels of the words multiply it.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8, UInt16

from jaxlab.puzzlemoe.compression import MATRICES, PackedExperts
from pallas_kernels.packed_moe_matmul import pack_codes, unpack, unpack_codes

ArrayLike = Array | np.ndarray

BITS = (16, 8, 6)
"""Bits of a position: words, and the two quantised forms."""
GROUP_SIZE = 128

# Scales that are tried: so many 32nds less than the one at which the group's largest magnitude is the highest level.
_CLIPPINGS = 16
_ANY_MAGNITUDE, _MEMBER_0 = 0x0FFF, 0x2000


def quantize_experts(packed: PackedExperts, *, bits: int = 8, group_size: int = GROUP_SIZE) -> PackedExperts:
    """The same experts with magnitudes in 5 or 3 bits; signs and masks stay, and so do experts kept in bfloat16.

    Of 16 scales of a group, bfloat16, the one with the smallest squared error over the weights of both members is
    taken: the largest magnitude over the highest level, or one that clips. One group is quantised at a time.

    Args:
        packed: of `compress_experts`, of one layer or stacked by layer.
        bits: of a position, 8 or 6; the highest level is `2^(bits - 3) - 1`.
        group_size: inputs that share a scale; if it does not divide a matrix's inputs, their greatest common divisor.

    Raises:
        ValueError: another number of bits, groups that are no multiple of 4 inputs, experts that are quantised already.
    """
    if bits not in BITS[1:]:
        raise ValueError(f"bits must be 8 or 6, got {bits}")
    if packed.scale_gate is not None:
        raise ValueError(f"packed is quantised already, to {packed.bits} bits a position")
    changed = {}
    for name in MATRICES:
        words = getattr(packed, name)
        size = group_of(words.shape[-2], group_size)
        changed[name], changed[f"scale_{name}"] = _quantize(words, bits, size)
    return dataclasses.replace(packed, **changed)


def group_of(inputs: int, group_size: int) -> int:
    """Inputs that share a scale in a matrix of so many.

    Raises:
        ValueError: that is no multiple of 4.
    """
    size = math.gcd(inputs, group_size) if group_size > 0 else group_size
    if size < 4 or size % 4:
        raise ValueError(
            f"groups must be of a multiple of 4 inputs, got {size}: group_size {group_size}, {inputs} inputs"
        )
    return size


def common_group(packed: PackedExperts) -> int:
    """A `group_size` that gives quantised experts the groups which they have."""
    d, f = packed.down.shape[-1], packed.gate.shape[-1]
    return math.lcm(d // packed.scale_gate.shape[-2], f // packed.scale_down.shape[-2])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(
    words: UInt16[Array, "*stack k n"], bits: int, group_size: int
) -> tuple[UInt8[Array, "*stack r n"], Float[Array, "*stack g n"]]:
    *stack, k, n = words.shape
    codes, scales = jax.lax.map(
        functools.partial(_quantize_group, bits=bits), words.reshape(-1, group_size, n)
    )  # fmt: skip
    return codes.reshape(*stack, k * bits // 8, n), scales.reshape(*stack, k // group_size, n)


def _quantize_group(words: UInt16[Array, "k n"], bits: int) -> tuple[UInt8[Array, "r n"], Float[Array, " n"]]:
    signs, masks = ([(words >> (top - pos) & 1).astype(jnp.int32) for pos in (0, 1)] for top in (15, 13))
    first, second = (mask * (1 - 2 * sign) for mask, sign in zip(masks, signs))
    used = masks[0] + masks[1]
    magnitude = unpack(words & _ANY_MAGNITUDE | _MEMBER_0, 0, jnp.float32)
    magnitude = jnp.where(used > 0, magnitude, 0)
    top = 2 ** (bits - 3) - 1
    largest = jnp.max(magnitude, axis=0)

    def levels(scale):
        step = scale.astype(jnp.float32)
        level = jnp.clip(jnp.round(magnitude / jnp.where(step > 0, step, 1)), 0, top)
        return level, jnp.sum(used * jnp.square(magnitude - level * step), axis=0)

    def shorter(i, best):
        scale, error = best
        other = (largest * (1 - i / 32) / top).astype(jnp.bfloat16)
        found = levels(other)[1]
        return jnp.where(found < error, other, scale), jnp.minimum(found, error)

    whole = (largest / top).astype(jnp.bfloat16)
    scale, _ = jax.lax.fori_loop(1, _CLIPPINGS, shorter, (whole, levels(whole)[1]))
    chosen = levels(scale)[0].astype(jnp.int32)
    codes = pack_codes(first, second, chosen, bits=bits, group_size=len(words))
    return codes, scale


def relative_errors(
    packed: PackedExperts, weights: Mapping[str, ArrayLike], pairs: np.ndarray
) -> Float[np.ndarray, "3"]:
    """Squared error of the decoded weights of paired experts over their squared sum: gate, up, down."""
    found = []
    for name in MATRICES:
        codes, scales = getattr(packed, name), getattr(packed, f"scale_{name}")
        parts = [
            _error(codes[slot], scales[slot], pos, jnp.asarray(weights[name][expert]), packed.bits)
            for slot, pair in enumerate(pairs)
            for pos, expert in enumerate(pair)
        ]
        error, squares = np.sum(np.asarray(parts, np.float64), axis=(0, 2))
        found.append(error / squares if squares else 0.0)
    return np.array(found)


@functools.partial(jax.jit, static_argnums=4)
def _error(codes, scales, pos, weight, bits):
    weight = weight.astype(jnp.float32)
    decoded = unpack_codes(codes, scales, pos, jnp.float32, bits=bits)
    return jnp.sum(jnp.square(decoded - weight), axis=-1), jnp.sum(jnp.square(weight), axis=-1)
