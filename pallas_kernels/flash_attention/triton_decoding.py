"""Pieces of the kernels that attend with few rows: an online softmax over keys that lie anywhere, and its merging.

The state of a tile of rows is its unnormalised output [R, D], largest logit [R] and sum of weights [R], in base 2.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.flash_attention.triton_tiles import dot, load

State = tuple[Array, Array, Array]

_HIDDEN = -1e30  # largest logit of a row that saw none yet: finite, so that no difference of infinities is taken


def nothing(q: Array) -> State:
    """The state of rows that have seen no key."""
    none = jnp.zeros(q.shape[0], jnp.float32)
    return jnp.zeros(q.shape, jnp.float32), none + _HIDDEN, none


def attended(
    q: Array, k_ref: Any, v_ref: Any, place: Callable[..., Any], low: Any, high: Any, length: Any, *,
    columns: int, scale: float,
) -> State:  # fmt: skip
    """The state of rows q over the tiles low..high of `columns` keys, those from `length` on hidden.

    `place(column)` gives where the keys of a tile lie in both arrays, and masks. `scale` is that of logits in base 2.
    """

    def step(j, state):
        out, peak, total = state
        column = j * columns + jnp.arange(columns, dtype=jnp.int32)
        where, *masks = place(column)
        logits = dot(q, load(k_ref, where, *masks).astype(q.dtype), 1) * scale
        logits = jnp.where((column < length)[None, :], logits, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        weights, shrink = jnp.exp2(logits - new_peak[:, None]), jnp.exp2(peak - new_peak)
        values = load(v_ref, where, *masks).astype(q.dtype)
        out = out * shrink[:, None] + dot(weights.astype(values.dtype), values, 0)
        return out, new_peak, total * shrink + jnp.sum(weights, axis=1)

    return lax.fori_loop(low, high, step, nothing(q))


def merged(state: State, other: State) -> State:
    """The state of rows over the keys of two states."""
    (out, peak, total), (other_out, other_peak, other_total) = state, other
    new_peak = jnp.maximum(peak, other_peak)
    shrink, other_shrink = jnp.exp2(peak - new_peak), jnp.exp2(other_peak - new_peak)
    out = out * shrink[:, None] + other_out * other_shrink[:, None]
    return out, new_peak, total * shrink + other_total * other_shrink


def normalised(state: State) -> Array:
    """The output; zeros for rows that saw nothing."""
    out, _, total = state
    return out / jnp.where(total == 0, 1.0, total)[:, None]


def features(dim: int) -> tuple[Array, Array | None]:
    """Indices along a head, padded to the side of a product, and the [1, D] mask of the real ones, if any is not."""
    feature = jnp.arange(side(dim), dtype=jnp.int32)
    return feature, None if feature.size == dim else (feature < dim)[None, :]


def divided(index: jax.Array, by: int) -> tuple[Array, Array]:
    """Quotient and remainder."""
    return lax.div(index, jnp.int32(by)), lax.rem(index, jnp.int32(by))


def side(size: int) -> int:
    """The power of two that holds `size`, and a side of a product: at least 16."""
    return max(16, 1 << math.ceil(math.log2(size)))
