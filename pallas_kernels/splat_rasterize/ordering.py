"""Stable orders of unsigned keys: by counting on a CPU, by `lax.sort` elsewhere.

On a CPU XLA's sort of pairs calls back for every comparison, at ten times the cost of the counting. On an NVIDIA GPU it
is CUB's radix sort, but not in programs compiled without one: XLA then has a slower sort of its own.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, UInt32

from pallas_kernels.dispatch import vary_alike

_BITS = 4  # of a key, at most, that one pass orders by: with 8 the masks of a million keys leave the cache
_WORDS = 8  # of a block of keys that is counted as one, 32 of them a word


def stable_order(keys: UInt32[Array, " m"], bits: int) -> Int[Array, " m"]:
    """Indices that put keys below 2**bits in ascending order, equal ones as they were."""
    return lax.platform_dependent(keys, cpu=lambda keys: by_counting(keys, bits), default=by_sorting)


def by_sorting(keys: UInt32[Array, " m"]) -> Int[Array, " m"]:
    """The order, by `lax.sort`."""
    return lax.sort((keys, _indices(keys)), num_keys=1, is_stable=True)[1]


def by_counting(keys: UInt32[Array, " m"], bits: int) -> Int[Array, " m"]:
    """The order, by digits from the lowest (radix sort)."""
    indices = _indices(keys)
    passes = -(-bits // _BITS)
    width = -(-bits // max(passes, 1))
    for turn in range(passes):
        digits = (keys if turn == 0 else keys[indices]) >> (turn * width) & (2**width - 1)
        places = _places(digits.astype(jnp.int32), 2**width)
        indices = indices.at[places].set(indices, unique_indices=True)
    return indices


def inverse(indices: Int[Array, " m"]) -> Int[Array, " m"]:
    """Where each index stands in a permutation."""
    return jnp.zeros_like(indices).at[indices].set(_indices(indices), unique_indices=True)


def _indices(x: Array) -> Int[Array, " m"]:
    """0 to M - 1, varying under `shard_map` as `x` does."""
    return vary_alike(jnp.arange(x.size, dtype=jnp.int32), x)[0]


def _places(digits: Int[Array, " m"], values: int) -> Int[Array, " m"]:
    """Where each element comes in the stable order of its digit.

    A bit for each element in the mask of its digit and of its 32 neighbours: a sum of them is their union, and a count
    of the bits below its own is how many came before it.
    """
    index = jnp.arange(digits.size, dtype=jnp.int32)
    shape = _WORDS, -(-digits.size // (32 * _WORDS)), values
    where = (index // 32 % _WORDS * shape[1] + index // (32 * _WORDS)) * values + digits
    bit = jnp.uint32(1) << (index % 32).astype(jnp.uint32)
    masks = jnp.zeros(shape[0] * shape[1] * values, jnp.uint32).at[where].add(bit)
    words = _ones(masks).reshape(shape)
    blocks = jnp.sum(words, axis=0, dtype=jnp.int32)
    totals = jnp.sum(blocks, axis=0, dtype=jnp.int32)
    totals, blocks, words = (jnp.cumsum(x, axis=0) - x for x in (totals, blocks, words))
    before = (totals + blocks + words).reshape(-1)
    return before[where] + _ones(masks[where] & (bit - 1))


def _ones(x: UInt32[Array, "..."]) -> Int[Array, "..."]:
    return lax.population_count(x).astype(jnp.int32)
