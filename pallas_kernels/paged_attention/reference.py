"""The attention as its definition reads, every row's pages gathered: the specification of the fast forms."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def forward(
    q: Float[Array, "b h d"],
    k_pages: Float[Array, "l hkv p page d"],
    v_pages: Float[Array, "l hkv p page d"],
    page_table: Int[Array, "b n"],
    lengths: Int[Array, " b"],
    layer: Int[Array, ""],
    *,
    scale: float,
) -> Float[Array, "b h d"]:
    """One softmax over the tokens of each row."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    batch, heads, dim = q.shape
    group = heads // k_pages.shape[1]
    seen = jnp.arange(page_table.shape[1] * k_pages.shape[3]) < lengths[:, None]

    def tokens(pages):
        own = pages[layer].swapaxes(0, 1)[page_table]  # [B,N,Hkv,page,D]
        own = own.swapaxes(1, 2).reshape(batch, -1, seen.shape[1], dim).astype(wide)
        return jnp.where(seen[:, None, :, None], jnp.repeat(own, group, axis=1), 0.0)

    logits = jnp.einsum("bhd,bhsd->bhs", q.astype(wide), tokens(k_pages)) * scale
    logits = jnp.where(seen[:, None], logits, -1e30)
    weights = jnp.where(seen[:, None], jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1.0, total)
    return jnp.einsum("bhs,bhsd->bhd", weights, tokens(v_pages)).astype(q.dtype)
