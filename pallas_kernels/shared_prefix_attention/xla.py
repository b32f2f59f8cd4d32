"""Two products, of all samples with the prefix and of each with its suffix, and one softmax over both parts.

The queries of all samples and of all heads of a group are rows of one product against the prefix: it is read once.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_HIDDEN = -1e30  # finite, so that a row that sees nothing makes no NaN


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
    """See `shared_prefix_attention`."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    batch, samples, heads, dim = q.shape
    kv_heads = prefix_k.shape[2]
    grouped = q.reshape(batch, samples, kv_heads, heads // kv_heads, dim)
    rows = grouped.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, dim)

    # Heads before tokens: where the caller's arrays lie so, and ours of them are views, nothing is copied.
    prefix_k, prefix_v = (x.transpose(0, 2, 1, 3) for x in (prefix_k, prefix_v))
    suffix_k, suffix_v = (x.transpose(0, 1, 3, 2, 4) for x in (suffix_k, suffix_v))

    shared = jnp.einsum("bkmd,bkpd->bkmp", rows, prefix_k, preferred_element_type=wide) * scale
    seen = jnp.arange(prefix_k.shape[2]) < prefix_lengths[:, None]
    shared = jnp.where(seen[:, None, None], shared, _HIDDEN).reshape(batch, kv_heads, samples, -1, prefix_k.shape[2])
    shared = shared.transpose(0, 2, 1, 3, 4)
    own = jnp.einsum("bnkgd,bnksd->bnkgs", grouped, suffix_k, preferred_element_type=wide) * scale
    seen = jnp.arange(suffix_k.shape[3]) < suffix_lengths[..., None]
    own = jnp.where(seen[:, :, None, None], own, _HIDDEN)

    peak = jnp.maximum(jnp.max(shared, axis=-1), jnp.max(own, axis=-1))[..., None]
    shared, own = (jnp.where(x > _HIDDEN, jnp.exp(x - peak), 0.0) for x in (shared, own))
    total = (jnp.sum(shared, axis=-1) + jnp.sum(own, axis=-1))[..., None]
    total = jnp.where(total == 0, 1.0, total)

    weights = shared.astype(prefix_v.dtype).transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, prefix_v.shape[2])
    out = jnp.einsum("bkmp,bkpd->bkmd", weights, prefix_v, preferred_element_type=wide)
    out = out.reshape(batch, kv_heads, samples, -1, dim).transpose(0, 2, 1, 3, 4)
    own = own.astype(suffix_v.dtype)
    out += jnp.einsum("bnkgs,bnksd->bnkgd", own, suffix_v, preferred_element_type=wide)
    return (out / total).astype(q.dtype).reshape(q.shape)
