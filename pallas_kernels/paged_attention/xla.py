"""A loop over blocks of a few pages with an online softmax, up to the end of the longest row.

Each step gathers its pages of all rows and heads out of the whole array: no layer, and no row, is ever copied out.
(Against one gather of everything that is faster, too, since a block of keys stays in the cache.)
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import vary_alike

_HIDDEN = -1e30  # finite, so that a row that sees nothing makes no NaN
_BLOCK = 2**18  # elements of the keys of a block; they and the values fit a CPU's cache
_MOST = 256  # tokens of a row in a block, at most


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
    """See `paged_attention`."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    (batch, _, dim), (layers, heads, count, page, _) = q.shape, k_pages.shape
    pages = min(max(1, _BLOCK // (batch * heads * page * dim)), max(1, _MOST // page), page_table.shape[1])
    tokens = pages * page
    grouped = q.astype(wide).reshape(batch, heads, -1, dim)
    table = jnp.pad(jnp.clip(page_table, 0, count - 1), ((0, 0), (0, -page_table.shape[1] % pages)))
    first = (layer * heads + jnp.arange(heads, dtype=jnp.int32)) * count  # page 0 of each head

    def step(j, state):
        out, peak, total = state
        own = lax.dynamic_slice_in_dim(table, j * pages, pages, axis=1)
        # Without the barrier XLA would convert narrow pages to float32 ahead of the loop: all of them.
        k, v, own = lax.optimization_barrier((k_pages, v_pages, own))
        index = (first[:, None] + own[:, None]).reshape(-1)

        def gathered(x):
            flat = x.reshape(layers * heads * count, page * dim)
            return flat.at[index].get(mode="promise_in_bounds").reshape(batch, heads, tokens, dim).astype(wide)

        seen = (j * tokens + jnp.arange(tokens) < lengths[:, None])[:, None, None]
        logits = jnp.einsum("bkgd,bksd->bkgs", grouped, gathered(k), preferred_element_type=wide) * scale
        logits = jnp.where(seen, logits, _HIDDEN)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
        weights = jnp.where(seen, jnp.exp(logits - new_peak[..., None]), 0.0)
        values = jnp.where(seen[:, :, 0, :, None], gathered(v), 0.0)  # a hidden NaN times 0 would be a NaN
        shrink = jnp.exp(peak - new_peak)
        out = out * shrink[..., None]
        out += jnp.einsum("bkgs,bksd->bkgd", weights, values, preferred_element_type=wide)
        return out, new_peak, total * shrink + jnp.sum(weights, axis=-1)

    none = vary_alike(jnp.zeros(grouped.shape[:3], wide), q)[0]
    start = (jnp.zeros_like(grouped), none + _HIDDEN, none)
    out, _, total = lax.fori_loop(0, (jnp.max(lengths) + (tokens - 1)) // tokens, step, start)
    return (out / jnp.where(total == 0, 1.0, total)[..., None]).astype(q.dtype).reshape(q.shape)
