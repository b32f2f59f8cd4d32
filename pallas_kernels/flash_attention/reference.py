"""Attention as the formula reads, with [T, S] logits: the specification of the fast forms."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def forward(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s hkv d"],
    v: Float[Array, "b s hkv d"],
    ids: tuple[Int[Array, "b t"] | None, Int[Array, "b s"] | None, Int[Array, "b t"] | None],
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h t"]]:
    """softmax(scale * q k^T, masked) v in float32, and the log-sum-exp; rows that see nothing are zero."""
    q_segments, kv_segments, q_positions = ids
    wide = jnp.promote_types(q.dtype, jnp.float32)
    batch, length, heads, dim = q.shape
    grouped = q.astype(wide).reshape(batch, length, k.shape[2], heads // k.shape[2], dim)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, k.astype(wide)) * scale
    rows = (jnp.arange(length)[None] if q_positions is None else q_positions)[:, :, None]
    columns = jnp.arange(k.shape[1])[None, None, :]
    mask = jnp.ones((1, length, k.shape[1]), bool)
    if causal:
        mask &= columns <= rows
    if window is not None:
        mask &= columns > rows - window
    if q_segments is not None and kv_segments is not None:
        mask &= (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments[:, :, None] != 0)
    mask = mask[:, None, None]
    logits = jnp.where(mask, logits, -1e30)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(logits - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = jnp.where(total == 0, 1.0, total)
    out = jnp.einsum("bkgts,bskd->btkgd", weights / total, v.astype(wide))
    return out.reshape(q.shape).astype(q.dtype), (peak + jnp.log(total)).reshape(batch, heads, length)


def backward(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s hkv d"],
    v: Float[Array, "b s hkv d"],
    ids: tuple[Int[Array, "b t"] | None, Int[Array, "b s"] | None, Int[Array, "b t"] | None],
    out: Float[Array, "b t h d"],
    lse: Float[Array, "b h t"],
    d_out: Float[Array, "b t h d"],
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b s hkv d"], Float[Array, "b s hkv d"]]:
    """Gradients of q, k and v by JAX's own differentiation of `forward`."""

    def attention(q, k, v):
        return forward(q, k, v, ids, causal=causal, window=window, scale=scale)[0]

    return jax.vjp(attention, q, k, v)[1](d_out)
