"""The packed word of a pair of experts, and how a weight is read from it (section 3.3 and figure 3 of the paper).

| bit 15 | 14 | 13 | 12 | 11..7 | 6..0 |
|---|---|---|---|---|---|
| sign of member 0 | sign of member 1 | mask of 0 | mask of 1 | exponent - 112 | mantissa |

The lower twelve bits are those of a bfloat16 magnitude, shared by both members; a cleared mask bit makes the weight 0.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int, Integer, UInt16

AnyArray = Array | np.ndarray

_MAGNITUDE = 0x0FFF
_LOWEST_EXPONENT = 112
_SIGN_BIT, _MASK_BIT = 15, 13  # of member 0; member 1 has the next lower ones


def unpack(
    words: UInt16[AnyArray, "*shape"], pos: int | Integer[AnyArray, "..."], dtype: DTypeLike = jnp.bfloat16
) -> Float[Array, "..."]:
    """The weights of one member of every pair, exactly as they were packed.

    Args:
      words: packed words.
      pos: which member, 0 or 1; an array is broadcast against `words`.
      dtype: floating; bfloat16 holds every weight exactly, and so does every wider one.

    Returns:
      The weights. Where a traced `pos` is neither 0 nor 1 (a concrete one is an error) they are NaN.

    Raises:
      TypeError: words are not uint16, pos is not an integer, dtype is not floating.
      ValueError: pos is neither 0 nor 1, or does not broadcast against words.
    """
    words, pos = jnp.asarray(words), jnp.asarray(pos)
    check_words("words", words)
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be floating, got {dtype}")
    if not jnp.issubdtype(pos.dtype, jnp.integer):
        raise TypeError(f"pos must be an integer, got {pos.dtype}")
    try:
        np.broadcast_shapes(words.shape, pos.shape)
    except ValueError:
        raise ValueError(f"pos must broadcast against words, got shapes {pos.shape} and {words.shape}") from None
    if is_concrete(pos):
        check_members("pos", pos)
    return _unpack(words, pos, dtype, not is_concrete(pos))


# Jitted, so that an eager call is one pass over the words, too.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _unpack(words, pos, dtype, doubtful):
    weights = decode(words, pos & 1, dtype)
    return jnp.where((pos == 0) | (pos == 1), weights, jnp.nan) if doubtful else weights


def decode(words: UInt16[Array, "..."], pos: Integer[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """`unpack` without checks, for kernels too: shifts and masks of whole words, no branch, no table."""
    if jnp.dtype(dtype) == jnp.bfloat16:
        return lax.bitcast_convert_type(_decoded_bits(words, pos.astype(jnp.uint16), jnp.uint16), jnp.bfloat16)
    # bfloat16 is the upper half of float32.
    bits = _decoded_bits(words.astype(jnp.uint32), pos.astype(jnp.uint32), jnp.uint32)
    return lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)


def _decoded_bits(words, pos, kind):
    width = jnp.iinfo(kind).bits
    raised = width - 16  # how far the upper half lies above the words
    sign = (words << (pos + kind(raised))) & kind(1 << (width - 1))
    magnitude = ((words & kind(_MAGNITUDE)) << kind(raised)) + kind(_LOWEST_EXPONENT << 7 << raised)
    mask = (words >> (kind(_MASK_BIT) - pos)) & kind(1)
    return (sign | magnitude) & (kind(0) - mask)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("words", "dense", "scales"), meta_fields=("bits",))
@dataclasses.dataclass(frozen=True)
class Slots:
    """The matrices of all slots: slot s is `words[s]`, or, past those, `dense[s - len(words)]` as it stands.

    Attributes:
      words: `[s, k, n]` uint16, or codes, `[s, k bits / 8, n]` uint8.
      dense: `[r, k, n]` of slots that are not packed.
      scales: `[s, groups, n]` of codes.
      bits: of a position.
    """

    words: Any
    dense: Any = None
    scales: Any = None
    bits: int = 16

    @property
    def number(self) -> int:
        """How many slots there are."""
        return self.words.shape[0] + (0 if self.dense is None else self.dense.shape[0])

    @property
    def inputs(self) -> int:
        """Rows of a matrix."""
        rows = self.words.shape[1]
        return rows if self.scales is None else rows * 8 // self.bits


def resolve(
    slot_of: Int[Array, " e"], pos_of: Int[Array, " e"], slots: int
) -> tuple[Int[Array, " e"], Int[Array, " e"], Float[Array, " e"]]:
    """Slots and members that can be read, and what their products must be increased by: 0, or NaN where none is meant.

    Concrete addresses were checked; traced ones cannot raise, and must not silently read another expert.
    """
    valid = (slot_of >= 0) & (slot_of < slots) & ((pos_of == 0) | (pos_of == 1))
    return jnp.clip(slot_of, 0, slots - 1), pos_of & 1, jnp.where(valid, 0.0, jnp.nan).astype(jnp.float32)


def is_concrete(array: Array) -> bool:
    """Whether the values can be looked at now, on this host."""
    return not isinstance(array, jax.core.Tracer) and array.is_fully_addressable


def check_words(name: str, words: Array) -> None:
    """Raises TypeError unless `words` are uint16."""
    if words.dtype != jnp.uint16:
        raise TypeError(f"{name} must be uint16, got {words.dtype}")


def check_members(name: str, pos: Array) -> None:
    """Raises ValueError unless all of a concrete `pos` are 0 or 1."""
    values = np.asarray(pos)
    wrong = values[(values != 0) & (values != 1)]
    if wrong.size:
        raise ValueError(f"{name} must be 0 or 1, got {wrong.flat[0]}")
