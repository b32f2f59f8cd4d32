"""A loop over blocks of a few pages of some row each, with an online softmax: work follows the sum of lengths.

Each step takes the next blocks of the batch, whichever rows they belong to, and gathers their pages out of the whole
array: no layer, and no row, is ever copied out. (Against one gather of everything that is faster, too, since a step's
keys stay in the cache.)
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import vary_alike

_HIDDEN = -1e30  # finite, so that a row that sees nothing makes no NaN
_STEP = 2**18  # elements of the keys of a step; they and the values fit a CPU's cache
_BLOCK = 64  # tokens of a block, about


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
    pages = min(max(1, _BLOCK // page), page_table.shape[1])
    tokens = pages * page
    at_once = max(1, min(batch * -(-page_table.shape[1] // pages), _STEP // (heads * tokens * dim)))
    grouped = q.astype(wide).reshape(batch, heads, -1, dim)
    table = jnp.pad(jnp.clip(page_table, 0, count - 1), ((0, 0), (0, -page_table.shape[1] % pages)))
    first = (layer * heads + jnp.arange(heads, dtype=jnp.int32)) * count  # page 0 of each head
    blocks = (lengths + (tokens - 1)) // tokens
    ends = jnp.cumsum(blocks)

    def step(j, state):
        out, peak, total = state
        place = j * at_once + jnp.arange(at_once)
        row = jnp.sum(ends <= place[:, None], axis=1)  # `batch` past the last block: dropped
        near = jnp.minimum(row, batch - 1)
        block = jnp.where(row < batch, place - ends[near] + blocks[near], 0)
        own = table.reshape(batch, -1, pages)[near, block]
        # Without the barrier XLA would convert narrow pages to float32 ahead of the loop: all of them.
        k, v, own = lax.optimization_barrier((k_pages, v_pages, own))
        index = (first[:, None] + own[:, None]).reshape(-1)

        def gathered(x):
            flat = x.reshape(layers * heads * count, page * dim)
            return flat.at[index].get(mode="promise_in_bounds").reshape(at_once, heads, tokens, dim).astype(wide)

        seen = (block * tokens)[:, None] + jnp.arange(tokens) < jnp.where(row < batch, lengths[near], 0)[:, None]
        logits = jnp.einsum("ckgd,cksd->ckgs", grouped[near], gathered(k), preferred_element_type=wide) * scale
        logits = jnp.where(seen[:, None, None], logits, _HIDDEN)
        new_peak = peak.at[row].max(jnp.max(logits, axis=-1), mode="drop")
        weights = jnp.where(seen[:, None, None], jnp.exp(logits - new_peak[near][..., None]), 0.0)
        values = jnp.where(seen[:, None, :, None], gathered(v), 0.0)  # a hidden NaN times 0 would be a NaN
        shrink = jnp.exp(peak - new_peak)
        read = jnp.einsum("ckgs,cksd->ckgd", weights, values, preferred_element_type=wide)
        out = (out * shrink[..., None]).at[row].add(read, mode="drop")
        return out, new_peak, (total * shrink).at[row].add(jnp.sum(weights, axis=-1), mode="drop")

    none = vary_alike(jnp.zeros(grouped.shape[:3], wide), q)[0]
    start = (jnp.zeros_like(grouped), none + _HIDDEN, none)
    out, _, total = lax.fori_loop(0, (ends[-1] + (at_once - 1)) // at_once, step, start)
    return (out / jnp.where(total == 0, 1.0, total)[..., None]).astype(q.dtype).reshape(q.shape)
