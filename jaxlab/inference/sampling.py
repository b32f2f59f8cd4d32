"""Drawing one token for each row of logits.

A row's token is a function of its own logits, key and parameters alone. Nothing is sorted: where rows truncate, their
thresholds come from the `_CANDIDATES` likeliest tokens, and only when these do not settle some row from a binary
search over the bits of the logits. Drawing itself is by inversion in two steps, first a block of the vocabulary and
then a token in it, which needs two uniforms a row and no noise of the size of the vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.inference.params import SamplingArrays

_CANDIDATES = 256
_BLOCK = 256


def sample(
    logits: Float[Array, "b v"], keys: Array, sampling: SamplingArrays
) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """Draws a token for every row.

    Args:
        logits: `[B,V]`; -inf forbids a token.
        keys: `[B]` PRNG keys (or `[B,2]` raw key data), each used once, for its row.
        sampling: temperature 0 takes the likeliest token (the lower id of equals).

    Returns:
        ids `[B]` int32, and their log-probabilities `[B]` float32 under the temperature-scaled, untruncated
        distribution (temperature 1 where greedy).
    """
    vocabulary = logits.shape[-1]
    greedy = sampling.temperature == 0
    temperature = jnp.where(greedy, 1.0, sampling.temperature)[:, None]
    scaled = logits.astype(jnp.float32) / temperature
    padded = jnp.pad(scaled, ((0, 0), (0, -vocabulary % _BLOCK)), constant_values=-jnp.inf)
    blocks = padded.reshape(padded.shape[0], -1, _BLOCK)

    block_peaks = jnp.max(blocks, axis=-1)
    first_block = jnp.argmax(block_peaks, axis=-1)
    likeliest = first_block * _BLOCK + jnp.argmax(_take(blocks, first_block), axis=-1)
    peak = jnp.max(block_peaks, axis=-1)
    masses = jnp.sum(jnp.exp(blocks - peak[:, None, None]), axis=-1)
    log_total = jnp.log(jnp.sum(masses, axis=-1)) + peak

    def draw(_):
        truncates = ~greedy & ((sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0))
        kept_masses, floor, last_tie = jax.lax.cond(
            jnp.any(truncates),
            lambda _: _kept_blocks(blocks, peak, masses, vocabulary, truncates, sampling),
            lambda _: (masses, jnp.full_like(peak, -jnp.inf), jnp.full(peak.shape, vocabulary, jnp.int32)),
            None,
        )
        return _invert(blocks, peak, kept_masses, floor, last_tie, keys)

    ids = jax.lax.cond(jnp.all(greedy), lambda _: likeliest, draw, None)
    ids = jnp.where(greedy, likeliest, ids).astype(jnp.int32)
    return ids, jnp.take_along_axis(scaled, ids[:, None], axis=-1)[:, 0] - log_total


def _take(blocks: Float[Array, "b n width"], index: Int[Array, " b"]) -> Float[Array, "b width"]:
    return jnp.take_along_axis(blocks, index[:, None, None], axis=1)[:, 0]


def _kept(values: Array, ids: Array, floor: Array, last_tie: Array) -> Array:
    """Tokens above the floor, and of those equal to it the ids up to `last_tie`."""
    return (values > floor) | ((values == floor) & (ids <= last_tie))


def _invert(
    blocks: Float[Array, "b n width"],
    peak: Float[Array, " b"],
    masses: Float[Array, "b n"],
    floor: Float[Array, " b"],
    last_tie: Int[Array, " b"],
    keys: Array,
) -> Int[Array, " b"]:
    """The token at a uniform point of the kept mass: its block by one uniform, its place there by another."""
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _point(masses, uniforms[:, 0])
    row = _take(blocks, block)
    ids = block[:, None] * _BLOCK + jnp.arange(_BLOCK)
    weights = jnp.where(_kept(row, ids, floor[:, None], last_tie[:, None]), jnp.exp(row - peak[:, None]), 0.0)
    return block * _BLOCK + _point(weights, uniforms[:, 1])


def _point(weights: Float[Array, "b n"], uniform: Float[Array, " b"]) -> Int[Array, " b"]:
    """The index where the running sum passes uniform * total; never one of weight 0, however sums round."""
    sums = jnp.cumsum(weights, axis=-1)
    passed = (sums > uniform[:, None] * sums[:, -1:]) & (weights > 0)
    return jnp.where(jnp.any(passed, axis=-1), jnp.argmax(passed, axis=-1), jnp.argmax(weights, axis=-1))


def _kept_blocks(
    blocks: Float[Array, "b n width"],
    peak: Float[Array, " b"],
    masses: Float[Array, "b n"],
    vocabulary: int,
    truncates: Bool[Array, " b"],
    sampling: SamplingArrays,
) -> tuple[Float[Array, "b n"], Float[Array, " b"], Int[Array, " b"]]:
    """What truncation leaves of each block's mass, the lowest value kept, and the last id kept among its equals."""
    flat = blocks.reshape(blocks.shape[0], -1)
    # Rows that do not truncate ask for nothing; theirs is the whole vocabulary.
    top_k = jnp.where(truncates & (sampling.top_k > 0) & (sampling.top_k < vocabulary), sampling.top_k, vocabulary)
    top_p = jnp.where(truncates, sampling.top_p, 1.0)
    total = jnp.sum(masses, axis=-1)
    floor, last_tie, settled = _candidate_floor(flat, peak, total, vocabulary, top_k, top_p)
    floor, last_tie = jax.lax.cond(
        jnp.all(settled),
        lambda _: (floor, last_tie),
        # A settled row keeps what it has, so that it never depends on which way its batch mates went.
        lambda _: jax.tree.map(
            lambda a, b: jnp.where(settled, a, b), (floor, last_tie), _searched_floor(flat, peak, total, top_k, top_p)
        ),
        None,
    )
    least = jnp.where(truncates & (sampling.min_p > 0), peak + jnp.log(sampling.min_p), -jnp.inf)
    # The likeliest token always stays, also where rounding puts `least` above it (min_p = 1).
    least = jnp.minimum(least, peak)
    last_tie = jnp.where(least > floor, vocabulary, last_tie)
    floor = jnp.maximum(least, floor)
    ids = jnp.arange(flat.shape[1]).reshape(blocks.shape[1:])
    kept = _kept(blocks, ids, floor[:, None, None], last_tie[:, None, None])
    return jnp.sum(jnp.where(kept, jnp.exp(blocks - peak[:, None, None]), 0.0), axis=-1), floor, last_tie


def _candidate_floor(
    flat: Float[Array, "b v"],
    peak: Float[Array, " b"],
    total: Float[Array, " b"],
    vocabulary: int,
    top_k: Int[Array, " b"],
    top_p: Float[Array, " b"],
) -> tuple[Float[Array, " b"], Int[Array, " b"], Bool[Array, " b"]]:
    """Floor and last tie of the rows that the likeliest candidates settle, and which rows these are."""
    count = min(_CANDIDATES, vocabulary)
    values, ids = jax.lax.top_k(flat, count)
    weights = jnp.exp(values - peak[:, None])
    sums = jnp.cumsum(weights, axis=-1)
    before = jnp.pad(sums[:, :-1], ((0, 0), (1, 0)))
    inside = jnp.minimum(top_k, count)
    limited = top_k < vocabulary
    mass = top_p * jnp.where(limited, jnp.take_along_axis(sums, inside[:, None] - 1, axis=-1)[:, 0], total)
    by_mass = jnp.sum(before < mass[:, None], axis=-1)
    by_mass = jnp.where(top_p < 1, jnp.maximum(by_mass, 1), inside)
    last = jnp.minimum(by_mass, inside) - 1
    everything = ~limited & (top_p >= 1)
    settled = everything | jnp.where(limited, top_k <= count, sums[:, -1] >= mass) | (count == vocabulary)
    floor = jnp.take_along_axis(values, last[:, None], axis=-1)[:, 0]
    last_tie = jnp.take_along_axis(ids, last[:, None], axis=-1)[:, 0]
    return jnp.where(everything, -jnp.inf, floor), jnp.where(everything, flat.shape[1], last_tie), settled


def _searched_floor(
    flat: Float[Array, "b v"],
    peak: Float[Array, " b"],
    total: Float[Array, " b"],
    top_k: Int[Array, " b"],
    top_p: Float[Array, " b"],
) -> tuple[Float[Array, " b"], Int[Array, " b"]]:
    """The same for any row, by binary search: first for the k-th value, then for the one that closes the mass."""
    codes = _ordered(flat)
    weights = jnp.exp(flat - peak[:, None])

    def lowest(holds):
        """The lowest code of which `holds(code[B]) -> bool[B]`, false below and true from it on."""

        def halve(_, bounds):
            low, high = bounds
            middle = (low & high) + ((low ^ high) >> 1)
            ok = holds(middle)
            return jnp.where(ok, low, middle), jnp.where(ok, middle, high)

        bounds = (jnp.full(peak.shape, -(2**31), jnp.int32), _ordered(peak))
        return jax.lax.fori_loop(0, 32, halve, bounds)[1]

    def above(code, what):
        return jnp.sum(jnp.where(codes > code[:, None], what, 0), axis=-1)

    def tie(code, rank):
        """The id of the rank-th (from 1) token of this code."""
        ranks = jnp.cumsum(codes == code[:, None], axis=-1)
        return jnp.minimum(jnp.sum(ranks < rank[:, None], axis=-1), flat.shape[1] - 1)

    code_k = lowest(lambda code: above(code, 1) < top_k)
    rank_k = top_k - above(code_k, 1)
    equal_k = jnp.exp(_unordered(code_k) - peak)
    inside = above(code_k, weights) + rank_k * equal_k
    mass = top_p * jnp.where(top_k < flat.shape[1], inside, total)
    everything = _ordered(jnp.full_like(peak, -jnp.inf))
    code_p = jnp.where(top_p < 1, lowest(lambda code: above(code, weights) < mass), everything)
    equal_p = jnp.exp(_unordered(code_p) - peak)
    rank_p = jnp.ceil((mass - above(code_p, weights)) / jnp.maximum(equal_p, jnp.finfo(jnp.float32).tiny))
    rank_p = jnp.clip(rank_p, 1, flat.shape[1]).astype(jnp.int32)
    code = jnp.maximum(code_k, code_p)
    rank = jnp.where(code_k > code_p, rank_k, jnp.where(code_p > code_k, rank_p, jnp.minimum(rank_k, rank_p)))
    return _unordered(code), tie(code, rank).astype(jnp.int32)


def _ordered(values: Float[Array, "..."]) -> Int[Array, "..."]:
    """The bits of float32 values as integers of the same order."""
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.int32)  # -0 is 0
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _unordered(codes: Int[Array, "..."]) -> Float[Array, "..."]:
    return jax.lax.bitcast_convert_type(jnp.where(codes < 0, codes ^ 0x7FFFFFFF, codes), jnp.float32)
