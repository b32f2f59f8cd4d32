"""Attention as the formula reads: the specification, with [T, S] logits."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attention_reference(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s hkv d"],
    v: Float[Array, "b s hkv d"],
    q_segments: Int[Array, "b t"] | None,
    kv_segments: Int[Array, "b s"] | None,
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> Float[Array, "b t h d"]:
    """softmax(scale * q k^T, masked) v in float32; rows that see nothing are zero."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[2]
    grouped = q.astype(wide).reshape(batch, length, k.shape[2], groups, dim)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, k.astype(wide)) * scale
    rows, columns = jnp.arange(length)[:, None], jnp.arange(k.shape[1])[None, :]
    mask = jnp.ones((1, length, k.shape[1]), bool)
    if causal:
        mask &= columns <= rows
    if window is not None:
        mask &= columns > rows - window
    if q_segments is not None:
        mask &= (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments[:, :, None] != 0)
    mask = mask[:, None, None]
    logits = jnp.where(mask, logits, -1e30)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(logits - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1.0, total)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v.astype(wide))
    return out.reshape(q.shape).astype(q.dtype)
