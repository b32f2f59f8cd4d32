"""The quantised form of a pair of experts: below 16 bits a position, and decoded as it is multiplied (ours).

A position's coefficients (c_0, c_1), each -1, 0 or 1, are never both 0, so they are one of the eight directions around
the origin: three bits hold both signs and both masks (the paper's appendix spends 2 + 1.58: it keeps the sign of a
masked member too). Beside this pair code a position has a level of 5 or 3 bits, whose product with the scale that a
group of inputs of a column shares is the magnitude. Member p's weight is c_p * level * scale.

In 8 bits a position is a byte: code << 5 | level. In 6 bits a group of G inputs takes 3 G / 4 rows of bytes in three
planes of G / 4 rows: rows of the first hold, from the lowest bit on, the nibbles 2 code | (level & 1) of the inputs of
the group's first and second quarter, those of the second plane the third and fourth quarter's; and the third plane
holds level >> 1 of all four, first quarter lowest. What is sliced by whole groups, or by columns, stays a slice.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int, Integer, UInt8

from pallas_kernels.packed_moe_matmul.bits import AnyArray, check_members, is_concrete

BITS = (8, 6)
"""Bits of a position of the quantised forms; the highest level is 2^(bits - 3) - 1."""
QUARTERS = {8: 1, 6: 4}
"""Runs of inputs of a group that share rows of bytes."""

# The pair codes in order, counterclockwise from (1, 0): a quarter turn takes member 1's coefficient to member 0's.
_DIRECTIONS = ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1))
# For each member its coefficients as two-bit integers, code 0 in the highest bits.
_TABLES = tuple(
    np.uint32(sum((direction[p] & 3) << (30 - 2 * code) for code, direction in enumerate(_DIRECTIONS))) for p in (0, 1)
)
_BITS_OF_192 = 0x4340


def pack_codes(
    first: Integer[AnyArray, "*s k n"],
    second: Integer[AnyArray, "*s k n"],
    levels: Integer[AnyArray, "*s k n"],
    *,
    bits: int,
    group_size: int,
) -> UInt8[Array, "*s r n"]:
    """Bytes of a pair's positions; `unpack_codes` reads them. Traceable: values are not looked at.

    Args:
      first: coefficients of member 0: -1, 0 or 1.
      second: of member 1; where both are 0 the level must be 0, too.
      levels: 0 .. 2^(bits - 3) - 1.
      bits: of a position, 8 or 6.
      group_size: inputs that share a scale.

    Returns:
      `[..., k bits / 8, n]`.

    Raises:
      ValueError: another number of bits; a group size that is no multiple of 4 or does not divide k.
    """
    first, second, levels = map(jnp.asarray, (first, second, levels))
    *stack, k, n = levels.shape
    check_groups(bits, group_size, k)
    # The code of every (c_0, c_1), -1 first; of (0, 0) any code does.
    codes = np.zeros(9, np.uint8)
    for code, (one, other) in enumerate(_DIRECTIONS):
        codes[3 * one + other + 4] = code
    code, level = jnp.asarray(codes)[3 * first + second + 4], levels.astype(jnp.uint8)
    if bits == 8:
        return code << 5 | level
    quarters = (*stack, k // group_size, 4, group_size // 4, n)
    nibbles, rest = ((code << 1 | level & 1).reshape(quarters), (level >> 1).reshape(quarters))
    nibbles, rest = ([part[..., r, :, :] for r in range(4)] for part in (nibbles, rest))
    planes = [nibbles[0] | nibbles[1] << 4, nibbles[2] | nibbles[3] << 4]
    planes.append(rest[0] | rest[1] << 2 | rest[2] << 4 | rest[3] << 6)
    return jnp.stack(planes, axis=-3).reshape(*stack, k * 3 // 4, n)


def unpack_codes(
    codes: UInt8[AnyArray, "*s r n"],
    scales: Float[AnyArray, "*s g n"],
    pos: int | Integer[AnyArray, "..."],
    dtype: DTypeLike = jnp.bfloat16,
    *,
    bits: int,
) -> Float[Array, "*s k n"]:
    """The weights of one member of every pair: coefficient times level times scale, rounded once to `dtype`.

    Args:
      codes: of `pack_codes`.
      scales: of every group of inputs of a column, floating.
      pos: which member, 0 or 1; an array is broadcast against the weights.
      dtype: floating; float32 holds every product with a bfloat16 scale exactly.
      bits: of a position, 8 or 6.

    Returns:
      The weights, `[..., 8 r / bits, n]`. Where a traced `pos` is neither 0 nor 1 (a concrete one is an error) NaN.

    Raises:
      TypeError: codes are not uint8, scales or dtype not floating, pos is not an integer.
      ValueError: shapes disagree, groups are not of a multiple of 4 inputs, another number of bits; pos is neither 0
        nor 1.
    """
    codes, scales, pos = jnp.asarray(codes), jnp.asarray(scales), jnp.asarray(pos)
    dtype = jnp.dtype(dtype)
    check_codes("codes", codes)
    for name, kind in (("scales", scales.dtype), ("dtype", dtype)):
        if not jnp.issubdtype(kind, jnp.floating):
            raise TypeError(f"{name} must be floating, got {kind}")
    if not jnp.issubdtype(pos.dtype, jnp.integer):
        raise TypeError(f"pos must be an integer, got {pos.dtype}")
    if codes.ndim < 2 or scales.ndim != codes.ndim or _outer(codes) != _outer(scales) or 0 in scales.shape:
        raise ValueError(f"codes [..., r, n] and scales [..., g, n] must agree, got {codes.shape} and {scales.shape}")
    rows, groups = codes.shape[-2], scales.shape[-2]
    if bits in BITS and rows * 8 % (bits * groups):
        raise ValueError(f"{rows} rows of {bits} bits are not made of {groups} groups of equal size")
    check_groups(bits, rows * 8 // bits // groups)
    if is_concrete(pos):
        check_members("pos", pos)
    return _unpack(codes, scales, pos, dtype, bits, not is_concrete(pos))


def _outer(array: Array) -> tuple[int, ...]:
    return (*array.shape[:-2], array.shape[-1])


# Jitted, so that an eager call is one pass over the codes.
@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _unpack(codes, scales, pos, dtype, bits, doubtful):
    precise = jnp.promote_types(dtype, jnp.float32)
    weights = decode_codes(codes, scales, pos & 1, precise, bits).astype(dtype)
    return jnp.where((pos == 0) | (pos == 1), weights, jnp.nan) if doubtful else weights


def decode_codes(
    codes: UInt8[Array, "*s r n"],
    scales: Float[Array, "*s g n"],
    pos: Integer[Array, "..."],
    dtype: DTypeLike,
    bits: int,
) -> Float[Array, "*s k n"]:
    """`unpack_codes` without checks."""
    *stack, groups, n = scales.shape
    k, splits = codes.shape[-2] * 8 // bits, QUARTERS[bits]
    run = k // groups // splits
    planes = codes.reshape(*stack, groups, -1, run, n)
    # Members by position, should `pos` have that many dimensions.
    pos = jnp.broadcast_to(pos, (*stack, k, n)) if pos.ndim else pos
    members = [pos.reshape(*stack, groups, splits, run, n)[..., r, :, :] if pos.ndim else pos for r in range(splits)]
    levels = [
        decode_run([planes[..., plane, :, :] for plane in planes_of(r, bits)], r, member, dtype)
        for r, member in enumerate(members)
    ]
    levels = jnp.stack(levels, axis=-3)
    return (levels * scales[..., None, None, :].astype(dtype)).reshape(*stack, k, n)


def planes_of(run: Any, bits: int) -> tuple[Any, ...]:
    """Which planes of a group hold the `run`-th of its runs of inputs: what `decode_run` takes."""
    return (0,) if bits == 8 else (run // 2, 2)


def decode_run(
    planes: Sequence[UInt8[Array, "..."]], run: int | Int[Array, "..."], pos: Integer[Array, "..."], dtype: DTypeLike
) -> Float[Array, "..."]:
    """Coefficient times level of one member, a small integer, for the `run`-th run of inputs of groups.

    For kernels too: shifts and masks of whole bytes, no branch; the table is a constant of 16 bits.

    Args:
      planes: those of the run: whole bytes, or nibbles and what is left of the levels.
      run: 0 where a position is a byte, otherwise the quarter.
      pos: 0 or 1.
      dtype: floating.
    """
    first = planes[0].astype(jnp.uint32)
    if len(planes) == 1:
        twice_code, level = first >> 4 & 14, first & 31
    else:
        run = jnp.asarray(run).astype(jnp.uint32)
        nibble = first >> ((run & 1) * 4)
        twice_code, level = nibble & 14, planes[1].astype(jnp.uint32) << 1 >> (run * 2) & 6 | nibble & 1
    table = jnp.where(pos == 0, _TABLES[0], _TABLES[1])
    # Shifted to the top, two bits are a coefficient and its sign.
    coefficient = lax.bitcast_convert_type(table << twice_code, jnp.int32) >> 30
    product = coefficient * lax.bitcast_convert_type(level, jnp.int32)
    if jnp.dtype(dtype) != jnp.bfloat16:
        return product.astype(dtype)
    # 192 + product as the bits of a bfloat16, whose last one counts 1 there: GPUs convert integers slowly.
    return lax.bitcast_convert_type((product + _BITS_OF_192).astype(jnp.uint16), jnp.bfloat16) - jnp.bfloat16(192)


def check_codes(name: str, codes: Array) -> None:
    """Raises TypeError unless `codes` are uint8."""
    if codes.dtype != jnp.uint8:
        raise TypeError(f"{name} must be uint8 (the quantised form, with scales), got {codes.dtype}")


def check_groups(bits: int, group_size: int, inputs: int | None = None) -> None:
    """Raises ValueError unless there is such a form, and groups of that size make up the inputs."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits}")
    if group_size < 4 or group_size % 4:
        raise ValueError(f"groups must be of a multiple of 4 inputs, got {group_size}")
    if inputs is not None and inputs % group_size:
        raise ValueError(f"groups of {group_size} do not divide {inputs} inputs")
