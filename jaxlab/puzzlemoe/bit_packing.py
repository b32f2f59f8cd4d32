"""A merged pair in 16 bits a position: signs and masks in exponent bits that weights leave free.

    bit 15    14    13    12    11..7                    6..0
        S_i   S_j   M_i   M_j   max(exponent,112)-112    mantissa

(PuzzleMoE, arXiv:2511.04805, algorithm 1.) The biased exponents of expert weights lie in about 112..128; the five bits
left for them hold 112..143. A literal encoder would turn an exact zero into 2^-15; here both mask bits are cleared.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt16

from jaxlab.puzzlemoe.config import UNDERFLOWS, check_name
from jaxlab.puzzlemoe.merging import MergedPair
from pallas_kernels.packed_moe_matmul import unpack

__all__ = ["PackedEntropy", "exponent_histogram", "pack_pair", "packed_entropy", "unpack"]

LOWEST, HIGHEST = 112, 143
"""Biased exponents that a word can hold: magnitudes from 2^-15 to below 2^17."""

# Values that are counted at a time: numpy's bincount wants 8 bytes of each.
_CHUNK = 1 << 22


def pack_pair(pair: MergedPair, *, underflow: str = "clamp", checked: bool = True) -> UInt16[Array, "*shape"]:
    """One word a position; `unpack` gives the weights of either member back.

    Magnitudes of 2^-15 and more, and zeros, come back bit by bit.

    Args:
        pair: of `dual_mask_merge`.
        underflow: of magnitudes below 2^-15: "clamp" raises the exponent and keeps the mantissa (paper; the error stays
            below 2^-14), "nearest" makes those below 2^-16 zero and the others 2^-15.
        checked: look on the host for magnitudes that no word can hold. Inside `jit` pass False; such a magnitude then
            takes the highest exponent.

    Raises:
        ValueError: a magnitude of 2^17 or more, or not finite (`checked`); an unknown `underflow`; `checked` inside a
            traced function.
    """
    check_name("underflow", underflow, UNDERFLOWS)
    mag = jnp.asarray(pair.mag)
    if checked:
        if isinstance(mag, jax.core.Tracer):
            raise ValueError("pack_pair cannot look at values inside a traced function: pass checked=False")
        too_large = int(_too_large(mag))
        if too_large:
            raise ValueError(
                f"pair.mag must be finite and below 2^17 (biased exponent at most {HIGHEST}), "
                f"got {too_large} of {mag.size} magnitudes that are not"
            )
    return _pack(pair, underflow)


@functools.partial(jax.jit, static_argnames="underflow")
def _pack(pair: MergedPair, underflow: str) -> Array:
    bits = jax.lax.bitcast_convert_type(pair.mag, jnp.uint16)
    exponent, mantissa = bits >> 7 & 0xFF, bits & 0x7F
    if underflow == "clamp":
        stored = bits << 1 != 0
    else:
        stored = exponent >= LOWEST - 1
        mantissa = jnp.where(exponent == LOWEST - 1, 0, mantissa)
    word = (jnp.clip(exponent, LOWEST, HIGHEST) - LOWEST) << 7 | mantissa
    for bit, flag in ((15, pair.sign_i), (14, pair.sign_j), (13, stored & pair.mask_i), (12, stored & pair.mask_j)):
        word |= flag.astype(jnp.uint16) << bit
    return word


@jax.jit
def _too_large(mag: Array) -> Array:
    return jnp.sum(exponents(mag) > HIGHEST)


def exponent_histogram(tree: PyTree) -> np.ndarray:
    """How often each biased exponent (0..255) occurs in the leaves, rounded to bfloat16: int64 `[256]`.

    Raises:
        TypeError: a leaf that is not floating.
    """
    counts = np.zeros(256, np.int64)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"leaf {jax.tree_util.keystr(path)} must be floating, got {jnp.result_type(leaf)}")
        values = jnp.ravel(leaf)
        for start in range(0, values.size, _CHUNK):
            part = exponents(values[start : start + _CHUNK].astype(jnp.bfloat16))
            counts += np.bincount(np.asarray(part), minlength=256)
    return counts


class PackedEntropy(NamedTuple):
    """Bits a position that packed words carry, each field by its own distribution.

    Attributes:
        exponent: of the five exponent bits.
        mask: of the masks: only i, only j, both, none.
        signs: of the signs that count, those of members that are not masked.
        mantissa: of the seven mantissa bits.
        total: of all fields together, at most their sum: no code of single positions stores the weights in fewer bits.
    """

    exponent: float
    mask: float
    signs: float
    mantissa: float
    total: float


def packed_entropy(words: UInt16[Array | np.ndarray, "..."]) -> PackedEntropy:
    """Shannon entropy of packed words, positions taken as independent: what a lossless code of the 16 bits could reach.

    Bits that decoding does not look at are not counted: the sign of a masked member, and all but the masks where both
    are clear. From few words (there are 65536) the estimate is too low.

    Raises:
        TypeError: words are not uint16.
        ValueError: there are none.
    """
    words = np.asarray(words)
    if words.dtype != np.uint16:
        raise TypeError(f"words must be uint16, got {words.dtype}")
    if not words.size:
        raise ValueError(f"words must not be empty, got shape {words.shape}")
    counts = np.zeros(1 << 16, np.int64)
    flat = words.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        counts += np.bincount(flat[start : start + _CHUNK], minlength=1 << 16)
    every = np.arange(1 << 16)
    masks = every >> 12 & 3
    seen = np.where(masks == 0, 0, every & (masks << 14 | 0x3FFF))
    counts = np.bincount(seen, counts)
    every, masks, counts = (array[counts > 0] for array in (every[: counts.size], masks[: counts.size], counts))
    used = masks > 0

    def bits(*fields: np.ndarray, where: np.ndarray = used) -> float:
        """Of the joint distribution of fields, over all positions."""
        _, index = np.unique(np.stack(fields)[:, where], axis=1, return_inverse=True)
        share = np.bincount(index.reshape(-1), counts[where]) / max(counts[where].sum(), 1)
        share = share[share > 0]
        return float(-(share * np.log2(share)).sum() * counts[where].sum() / counts.sum())

    return PackedEntropy(
        exponent=bits(every >> 7 & 31),
        mask=bits(masks, where=used | True),
        signs=bits(masks, every >> 14) - bits(masks),
        mantissa=bits(every & 127),
        total=bits(every, where=used | True),
    )


def exponents(x: Array) -> Array:
    """Biased exponents of bfloat16 values, uint16."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) >> 7 & 0xFF
