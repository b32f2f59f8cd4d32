"""The attention as its definition reads, the prefix repeated for every sample: the specification of the fast forms."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def forward(
    q: Float[Array, "b n h d"],
    prefix_k: Float[Array, "b p hkv d"],
    prefix_v: Float[Array, "b p hkv d"],
    prefix_lengths: Int[Array, " b"],
    suffix_k: Float[Array, "b n s hkv d"],
    suffix_v: Float[Array, "b n s hkv d"],
    suffix_lengths: Int[Array, "b n"],
    *,
    scale: float,
) -> Float[Array, "b n h d"]:
    """One softmax over the prefix and the suffix of each sample."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    samples, group = q.shape[1], q.shape[2] // prefix_k.shape[2]

    def whole(prefix, suffix):
        repeated = jnp.repeat(prefix[:, None], samples, axis=1)
        return jnp.repeat(jnp.concatenate([repeated, suffix], axis=2).astype(wide), group, axis=3)

    keys, values = whole(prefix_k, suffix_k), whole(prefix_v, suffix_v)
    prefix_seen = jnp.arange(prefix_k.shape[1]) < prefix_lengths[:, None, None]
    suffix_seen = jnp.arange(suffix_k.shape[2]) < suffix_lengths[..., None]
    prefix_seen = jnp.broadcast_to(prefix_seen, (*q.shape[:2], prefix_k.shape[1]))
    seen = jnp.concatenate([prefix_seen, suffix_seen], axis=2)[:, :, None]
    logits = jnp.where(seen, jnp.einsum("bnhd,bnshd->bnhs", q.astype(wide), keys) * scale, -1e30)
    weights = jnp.where(seen, jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bnhs,bnshd->bnhd", weights / jnp.where(total == 0, 1.0, total), values)
    return out.astype(q.dtype)
