"""Attention with a pair bias, some rows at a time: logits live for one chunk, in both directions.

A scan over chunks of rows; in the backward pass it carries the sum for the bias. Written by hand because JAX, left to
itself, would keep every chunk's logits for the gradient.

Letters: B batch, S rows, N queries and keys, H heads, D head size, C rows of a chunk.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.dispatch import zeros_alike
from pallas_kernels.evo_attention.reference import Options

_BYTES = 4 * 2**20  # logits of a chunk


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

    def of_batch(q, k, v, mask, bias):
        def step(carry, part):
            logits = _logits(*part[:2], *part[3:], bias, options)
            peak = jnp.max(logits, axis=-1, keepdims=True)
            peak = jnp.where(peak == -jnp.inf, 0.0, peak)
            weights = jnp.exp(logits - peak)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            empty = total == 0
            total = jnp.where(empty, 1.0, total)
            out = jnp.einsum("chij,cjhd->cihd", weights / total, part[2].astype(logits.dtype))
            return carry, (out.astype(q.dtype), jnp.where(empty, -jnp.inf, peak + jnp.log(total))[..., 0])

        return _over_rows(step, None, (q, k, v, mask), options)[1]

    return lax.map(lambda x: of_batch(*x), (q, k, v, mask, bias))


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

    def of_batch(q, k, v, mask, lse, delta, d_out, bias):
        def step(d_bias, part):
            q_, k_, v_, mask_, lse_, delta_, d_ = part
            logits = _logits(q_, k_, mask_, bias, options)
            weights = jnp.exp(logits - jnp.where(lse_ == -jnp.inf, jnp.inf, lse_)[..., None])
            q_, k_, v_, d_ = (x.astype(logits.dtype) for x in (q_, k_, v_, d_))
            d_logits = weights * (jnp.einsum("cihd,cjhd->chij", d_, v_) - delta_[..., None])
            dq = jnp.einsum("chij,cjhd->cihd", d_logits, k_) * options.scale
            dk = jnp.einsum("chij,cihd->cjhd", d_logits, q_) * options.scale
            dv = jnp.einsum("chij,cihd->cjhd", weights, d_)
            d_mask = jnp.sum(d_logits, axis=(1, 2)) if mask_gradient else None
            if bias_gradient:
                d_bias += jnp.sum(d_logits, axis=0)
            return d_bias, (*(x.astype(q.dtype) for x in (dq, dk, dv)), d_mask)

        start = zeros_alike(bias.shape, lse.dtype, lse) if bias_gradient else None
        d_bias, made = _over_rows(step, start, (q, k, v, mask, lse, delta, d_out), options)
        return (*made, d_bias.astype(bias.dtype) if bias_gradient else None)

    return lax.map(lambda x: of_batch(*x), (q, k, v, mask, lse, delta, d_out, bias))


def _logits(q, k, mask, bias, options):
    """[C,H,N,N]"""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("cihd,cjhd->chij", q.astype(wide), k.astype(wide)) * options.scale
    if bias is not None:
        logits += bias.astype(wide)
    return logits if mask is None else logits + mask[:, None, None]


def _over_rows(step: Any, start: Any, arrays: Any, options: Options) -> Any:
    """Scans `step` over chunks of the leading axis, and over what is left as one more chunk."""
    rows, length, heads, _ = arrays[0].shape
    chunk = options.row_chunk or max(1, _BYTES // (4 * heads * length * length))
    chunk = min(chunk, rows)
    whole = rows // chunk * chunk
    parts = jax.tree.map(lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:]), arrays)
    carry, made = lax.scan(step, start, parts)
    made = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), made)
    if whole == rows:
        return carry, made
    carry, last = step(carry, jax.tree.map(lambda x: x[whole:], arrays))
    return carry, jax.tree.map(lambda *x: jnp.concatenate(x), made, last)
