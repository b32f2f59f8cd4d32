"""Attention with a pair bias, a few rows or heads at a time: logits live for one chunk, in both directions.

A loop over chunks that writes its results into place and, in the backward pass, adds up the gradient of the bias.
Written by hand because JAX, left to itself, would keep every chunk's logits for the gradient. Every product has the
keys on the last axis of a factor or sums over the last axis of the logits: those are the fast ones on a CPU.

Letters: B batch, S rows, N queries and keys, H heads, D head size; C rows and G heads of a chunk, E = C * G.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.dispatch import zeros_alike
from pallas_kernels.evo_attention.reference import Options

_BYTES = 2**20  # of a chunk's logits: a CPU's cache then holds them, the weights, the bias and its gradient


def forward(
    q: Float[Array, "b s n h d"],
    k: Float[Array, "b s n h d"],
    v: Float[Array, "b s n h d"],
    mask: Float[Array, "b s n"] | None,
    bias: Float[Array, "b h n n"] | None,
    *,
    options: Options,
) -> tuple[Float[Array, "b s n h d"], Float[Array, "b s h n"]]:
    """Output and log-sum-exp of every row."""
    batch, rows, length, heads, _ = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def step(at, state):
        out, lse = state
        logits = _logits(at, q, k, mask, bias, options.scale)
        peak = jnp.max(logits, axis=-1, keepdims=True)
        peak = jnp.where(peak == -jnp.inf, 0.0, peak)
        weights = jnp.exp(logits - peak)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        out = at.put(out, _product(weights, at.tall(v)) / total)
        lse = at.put_numbers(lse, jnp.where(empty, -jnp.inf, peak + jnp.log(total)))
        return out, lse

    start = zeros_alike(q.shape, q.dtype, q), zeros_alike((batch, rows, heads, length), wide, q)
    return _over_chunks(step, start, q, options)


def backward(
    q: Float[Array, "b s n h d"],
    k: Float[Array, "b s n h d"],
    v: Float[Array, "b s n h d"],
    mask: Float[Array, "b s n"] | None,
    bias: Float[Array, "b h n n"] | None,
    lse: Float[Array, "b s h n"],
    delta: Float[Array, "b s h n"],
    d_out: Float[Array, "b s n h d"],
    *,
    options: Options,
    mask_gradient: bool,
    bias_gradient: bool,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Gradients of q, k, v, mask and bias (the last two None unless asked for), from what `forward` gave."""
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # a row that sees nothing has no weights

    def step(at, state):
        dq, dk, dv, d_mask, d_bias = state
        weights = jnp.exp(_logits(at, q, k, mask, bias, options.scale) - at.numbers(lse))
        d_logits = weights * (_product(at.tall(d_out), at.flat(v)) - at.numbers(delta))
        dq = at.put(dq, _product(d_logits, at.tall(k)) * options.scale)
        dk = at.put(dk, _product(at.flat(q), d_logits).swapaxes(1, 2) * options.scale)
        dv = at.put(dv, _product(at.flat(d_out), weights).swapaxes(1, 2))
        fresh = at.fresh(d_logits.reshape(at.rows, at.heads, *d_logits.shape[1:]))
        if d_mask is not None:
            d_mask = at.add_to_mask(d_mask, jnp.sum(fresh, axis=(1, 2)))
        if d_bias is not None:
            d_bias = at.add_to_bias(d_bias, fresh)
        return dq, dk, dv, d_mask, d_bias

    wanted = (q.dtype, q), (q.dtype, q), (q.dtype, q)
    wanted += ((lse.dtype, mask if mask_gradient else None), (lse.dtype, bias if bias_gradient else None))
    start = tuple(None if x is None else zeros_alike(x.shape, dtype, lse) for dtype, x in wanted)
    dq, dk, dv, d_mask, d_bias = _over_chunks(step, start, q, options)
    return dq, dk, dv, d_mask, None if d_bias is None or bias is None else d_bias.astype(bias.dtype)


def _logits(at, q, k, mask, bias, scale):
    """[E,N,N]"""
    logits = _product(at.tall(q), at.flat(k)) * scale
    by_head = logits.reshape(at.rows, at.heads, *logits.shape[1:])
    if bias is not None:
        by_head += at.of_bias(bias).astype(logits.dtype)
    if mask is not None:
        by_head += at.of_mask(mask)[:, None, None]
    return by_head.reshape(logits.shape)


def _product(a, b):
    """a[E,m,k] b[E,k,n] -> [E,m,n]"""
    return lax.dot_general(a, b, (((2,), (1,)), ((0,), (0,))))


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Where a chunk begins, how large it is, and how many of its first rows an earlier one has seen to (or None)."""

    batch: Array
    row: Array
    head: Array
    rows: int
    heads: int
    seen: Array | None

    def tall(self, x):
        """[B,S,N,H,D] -> [E,N,D]"""
        part = self._cut(x).transpose(0, 2, 1, 3)
        return part.reshape(-1, *part.shape[2:])

    def flat(self, x):
        """[B,S,N,H,D] -> [E,D,N]"""
        part = self._cut(x).transpose(0, 2, 3, 1)
        return part.reshape(-1, *part.shape[2:])

    def put(self, x, value):
        """Writes what `tall` would read."""
        part = value.reshape(self.rows, self.heads, *value.shape[1:]).transpose(0, 2, 1, 3)
        return lax.dynamic_update_slice(x, part.astype(x.dtype)[None], (self.batch, self.row, 0, self.head, 0))

    def numbers(self, x):
        """[B,S,H,N] -> [E,N,1]"""
        size = (1, self.rows, self.heads, x.shape[3])
        return lax.dynamic_slice(x, (self.batch, self.row, self.head, 0), size).reshape(-1, x.shape[3], 1)

    def put_numbers(self, x, value):
        """Writes what `numbers` would read."""
        part = value.reshape(1, self.rows, self.heads, -1)
        return lax.dynamic_update_slice(x, part, (self.batch, self.row, self.head, 0))

    def of_mask(self, x):
        """[B,S,N] -> [C,N]"""
        return lax.dynamic_slice(x, (self.batch, self.row, 0), (1, self.rows, x.shape[2]))[0]

    def of_bias(self, x):
        """[B,H,N,N] -> [G,N,N]"""
        return lax.dynamic_slice(x, (self.batch, self.head, 0, 0), (1, self.heads, *x.shape[2:]))[0]

    def fresh(self, x):
        """[C,...] with zeros in the rows that an earlier chunk has seen to."""
        if self.seen is None:
            return x
        new = jnp.arange(self.rows) >= self.seen
        return jnp.where(new.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0)

    def add_to_mask(self, x, value):
        """Adds value[C,N] to x[B,S,N]."""
        return lax.dynamic_update_slice(x, (self.of_mask(x) + value)[None], (self.batch, self.row, 0))

    def add_to_bias(self, x, value):
        """Adds value[C,G,N,N], summed over C, to x[B,H,N,N]."""
        # A product with ones, because XLA sums a leading axis slowly on a CPU.
        total = value[0] if self.rows == 1 else jnp.einsum("c,cgij->gij", jnp.ones(self.rows, value.dtype), value)
        return lax.dynamic_update_slice(x, (self.of_bias(x) + total)[None], (self.batch, self.head, 0, 0))

    def _cut(self, x):
        size = (1, self.rows, x.shape[2], self.heads, x.shape[4])
        part = lax.dynamic_slice(x, (self.batch, self.row, 0, self.head, 0), size)[0]
        return part.astype(jnp.promote_types(x.dtype, jnp.float32))


def _over_chunks(step: Callable[[_Chunk, Any], Any], start: Any, q: Array, options: Options) -> Any:
    """Runs `step` over chunks of rows and heads; rows innermost, so that a bias stays in the cache."""
    batch, rows, length, heads, _ = q.shape
    fitting = max(1, _BYTES // (4 * length * length))  # logits of one row and head
    group = max(size for size in range(1, heads + 1) if heads % size == 0 and size <= fitting)
    chunk = min(rows, options.row_chunk or max(1, fitting // group))
    parts = -(-rows // chunk)

    def body(index, state):
        outer, part = index // parts, index % parts
        row = jnp.minimum(part * chunk, rows - chunk)  # the last chunk may overlap the one before
        seen = part * chunk - row if rows % chunk else None
        groups = heads // group
        return step(_Chunk(outer // groups, row, outer % groups * group, chunk, group, seen), state)

    return lax.fori_loop(0, batch * (heads // group) * parts, body, start)
