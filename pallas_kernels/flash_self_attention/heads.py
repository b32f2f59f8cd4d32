"""One head of a `[B,T,H,D]` array after the other, in place: what the CPU forms of unmasked attention share.

A head's rows of queries meet all its keys in two plain products, with one [rows, S] array of weights between them that
stays in a core's cache. Slices are taken where they lie and results are written where they belong: whole arrays are
neither transposed nor padded.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Index = Int[Array, ""] | int

_ROWS = 512  # of queries at a time, at most


def take(x: Float[Array, "b t h d"], batch: Index, head: Index, start: Index, rows: int) -> Float[Array, "n d"]:
    """Rows of a head, at least float32: a CPU multiplies shorter floats by converting them every time."""
    part = lax.dynamic_slice(x, _place(batch, start, head), (1, rows, 1, x.shape[-1]))
    return part.reshape(rows, x.shape[-1]).astype(jnp.promote_types(x.dtype, jnp.float32))


def put(
    x: Float[Array, "b t h d"], part: Float[Array, "n d"], batch: Index, head: Index, start: Index
) -> Float[Array, "b t h d"]:
    """Writes what `take` would read."""
    return lax.dynamic_update_slice(x, part.astype(x.dtype)[None, :, None], _place(batch, start, head))


def _place(*indices: Index) -> tuple[Array, ...]:
    return tuple(jnp.asarray(index, jnp.int32) for index in (*indices, 0))  # of one type, whatever JAX's default is


def over_heads(batch: int, heads: int, step: Callable[..., Any], carry: Any) -> Any:
    """Runs `step(batch, head, carry)` for all heads of all rows of the batch.

    A result that is `put` whole may start as any array of its shape: as an argument rather than as zeros, of which XLA
    would keep one more where several results share them.
    """

    def run(index, carry):
        return step(index // heads, index % heads, carry)

    return lax.fori_loop(0, batch * heads, run, carry)


def over_rows(length: int, step: Callable[..., Any], carry: Any) -> Any:
    """Runs `step(start, rows, carry)` over chunks of `_ROWS`, and over what is left."""
    chunks, rest = divmod(length, _ROWS)
    if chunks:
        carry = lax.fori_loop(0, chunks, lambda index, carry: step(index * _ROWS, _ROWS, carry), carry)
    return step(chunks * _ROWS, rest, carry) if rest else carry


def softmax(logits: Float[Array, "n s"]) -> tuple[Float[Array, "n s"], Float[Array, "n 1"], Float[Array, "n 1"]]:
    """Weights before they are divided by their sum, that sum, and the log-sum-exp."""
    peak = jnp.max(logits, axis=1, keepdims=True)
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=1, keepdims=True)
    return weights, total, peak + jnp.log(total)
