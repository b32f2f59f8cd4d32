"""Attention by tiles of queries and keys: no [T, S] array in either direction, tiles that nobody sees never touched.

A loop over query chunks and, within, over the key chunks that any of their queries sees, with an online softmax (Dao et
al., 2022, arXiv:2205.14135). The backward pass is written by hand: it keeps the output and one log-sum-exp a row, and
recomputes the weights tile by tile. (A loop, not an unrolled list of chunks: XLA's CPU scheduler would run the chunks
side by side and hold all their logits at once.)

Letters: B batch, K key/value heads, G query heads of each, T queries, S keys, C queries of a chunk, D head size.
Inside, arrays are [B,K,G,C,D] and [B,K,S,D]; logits are [B,K,G,C,s].
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import vary_alike

_TILE = 128  # largest tile side; larger ones leave a CPU's cache
_HIDDEN = -1e30  # logit of a masked key: finite, so that a row that sees nothing makes no NaN


@dataclasses.dataclass(frozen=True)
class _Rules:
    """What is static: who sees whom by index, the scale, and the sizes of a tile."""

    causal: bool
    window: int | None
    scale: float
    chunk: int
    key_chunk: int


Ids = tuple[Int[Array, "b t"] | None, Int[Array, "b s"] | None, Int[Array, "b t"] | None]


def forward(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s hkv d"],
    v: Float[Array, "b s hkv d"],
    ids: Ids,
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h t"]]:
    """Output and log-sum-exp of every row; `ids` are segments of q, segments of k, positions of q."""
    rules = _Rules(causal, window, scale, _side(q.shape[1]), _side(k.shape[1]))
    out, lse = _forward(rules, _by_head(q, k.shape[2]), _by_head(k), _by_head(v), ids)
    return _by_token(out.astype(q.dtype), q.shape), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def backward(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s hkv d"],
    v: Float[Array, "b s hkv d"],
    ids: Ids,
    out: Float[Array, "b t h d"],
    lse: Float[Array, "b h t"],
    d_out: Float[Array, "b t h d"],
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b s hkv d"], Float[Array, "b s hkv d"]]:
    """Gradients of q, k and v, from what `forward` gave."""
    rules = _Rules(causal, window, scale, _side(q.shape[1]), _side(k.shape[1]))
    heads = k.shape[2]
    delta = jnp.sum(out.astype(lse.dtype) * d_out.astype(lse.dtype), axis=-1)
    delta = delta.reshape(*delta.shape[:2], heads, -1).transpose(0, 2, 3, 1)
    arrays = (_by_head(q, heads), _by_head(k), _by_head(v), _by_head(d_out.astype(q.dtype), heads))
    dq, dk, dv = _backward(rules, *arrays, lse.reshape(delta.shape), delta, ids)
    # Key gradients come as [B,K,D,S]: the product with the long axis last is the fast one on a CPU.
    dk, dv = (x.transpose(0, 3, 1, 2) for x in (dk, dv))
    return _by_token(dq.astype(q.dtype), q.shape), dk.astype(k.dtype), dv.astype(v.dtype)


def _side(length: int) -> int:
    """Tile side that splits a length into equal parts, each a multiple of 8 unless there is only one."""
    parts = max(1, -(-length // _TILE))
    return max(1, length) if parts == 1 else -(-length // (8 * parts)) * 8


def _by_head(x, heads=None):
    """[B,T,H,D] -> [B,H,T,D], or [B,K,G,T,D] when the query heads are grouped."""
    if heads is None:
        return x.transpose(0, 2, 1, 3)
    return x.reshape(*x.shape[:2], heads, -1, x.shape[-1]).transpose(0, 2, 3, 1, 4)


def _by_token(x, shape):
    return x.transpose(0, 3, 1, 2, 4).reshape(shape)


def _mask(rules, ids, rows, columns, q_cut, k_cut):
    """[B or 1, 1, 1, C, s]: which keys each query sees; None when all.

    rows[C] and columns[s] are indices; `q_cut` and `k_cut` cut the chunk's part out of a [B,T] and a [B,S] array.
    """
    q_segments, kv_segments, q_positions = ids
    place = rows[None] if q_positions is None else q_cut(q_positions)
    place, columns = place[:, :, None], columns[None, None, :]
    mask = None
    if rules.causal:
        mask = columns <= place
    if rules.window is not None:
        near = columns > place - rules.window
        mask = near if mask is None else mask & near
    if q_segments is not None:
        own = q_cut(q_segments)[:, :, None]
        same = (own == k_cut(kv_segments)[:, None, :]) & (own != 0)
        mask = same if mask is None else mask & same
    return None if mask is None else mask[:, None, None]


def _dot(a, b, contract_a, contract_b, dtype):
    """Batched over B and K; the other axes of a come before those of b."""
    return jax.lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((0, 1), (0, 1))), preferred_element_type=dtype)


def _rows(x):
    """[B,K,G,C,D] -> [B,K,G*C,D]: the query heads of a group are more rows against the same keys."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _logits(rules, q, k, mask, dtype):
    logits = _dot(_rows(q), k, 3, 3, dtype).reshape(*q.shape[:4], k.shape[2]) * rules.scale
    return logits if mask is None else jnp.where(mask, logits, _HIDDEN)


def _weights(logits, offset, mask):
    weights = jnp.exp(logits - offset[..., None])
    return weights if mask is None else jnp.where(mask, weights, 0.0)


def _mix(weights, v):
    """weights[B,K,G,C,s] v[B,K,s,D] -> [B,K,G,C,D]."""
    out = _dot(_rows(weights.astype(v.dtype)), v, 3, 2, weights.dtype)
    return out.reshape(*weights.shape[:4], v.shape[-1])


def _finish(out, peak, total):
    """Normalised output and log-sum-exp; a row that saw nothing gives zeros."""
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    return out / total[..., None], peak + jnp.log(total)


def _chunk_gradients(rules, q, k, v, d_out, lse, delta, mask):
    """Gradients of one chunk of queries against one range of keys: dq[B,K,G,C,D], dk[B,K,D,s], dv[B,K,D,s]."""
    wide = lse.dtype
    weights = _weights(_logits(rules, q, k, mask, wide), lse, mask)
    d_weights = _dot(_rows(d_out), v, 3, 3, wide).reshape(weights.shape)
    d_logits = (weights * (d_weights - delta[..., None]) * rules.scale).astype(q.dtype)
    dv = _dot(_rows(d_out), _rows(weights.astype(q.dtype)), 2, 2, wide)
    dk = _dot(_rows(q), _rows(d_logits), 2, 2, wide)
    dq = _dot(_rows(d_logits), k, 3, 2, wide).reshape(q.shape)
    return dq, dk, dv


def _zeros_like(shape, array, dtype=None):
    """Zeros that vary over the `shard_map` axes of `array`, as a loop's carry must."""
    return vary_alike(jnp.zeros(shape, dtype or array.dtype), array)[0]


def _padded(x, axis, multiple):
    extra = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, extra if i == axis % x.ndim else 0) for i in range(x.ndim)]) if extra else x


def _padded_ids(rules, ids, queries, keys):
    """Segments and positions padded like queries and keys, so that padding is neither seen nor sees."""
    q_segments, kv_segments, q_positions = ids
    if q_segments is not None:
        q_segments, kv_segments = _padded(q_segments, 1, rules.chunk), _padded(kv_segments, 1, rules.key_chunk)
    if q_positions is not None:
        q_positions = jnp.pad(q_positions, ((0, 0), (0, -queries % rules.chunk)), constant_values=-1)
    return q_segments, kv_segments, q_positions


def _cut(x, axis, index, size):
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _key_bounds(rules, ids, chunk_index, queries, keys):
    """First and last + 1 key chunk that the queries of a chunk may see."""
    chunks = -(-keys // rules.key_chunk)
    positions = ids[2]
    if positions is None:
        first = chunk_index * rules.chunk
        last = jnp.minimum(first + rules.chunk, queries) - 1
    else:
        own = _cut(positions, 1, chunk_index, rules.chunk)
        first = jnp.min(jnp.where(own < 0, jnp.iinfo(own.dtype).max - keys, own))
        last = jnp.max(own)
    high = jnp.minimum(last // rules.key_chunk + 1, chunks) if rules.causal else chunks
    low = 0 if rules.window is None else jnp.maximum(first - rules.window + 1, 0) // rules.key_chunk
    return low, high


def _dynamic_mask(rules, ids, queries, keys, i, j):
    columns = j * rules.key_chunk + jnp.arange(rules.key_chunk)
    mask = _mask(
        rules,
        ids,
        i * rules.chunk + jnp.arange(rules.chunk),
        columns,
        lambda x: _cut(x, 1, i, rules.chunk),
        lambda x: _cut(x, 1, j, rules.key_chunk),
    )
    real = (columns < keys)[None, None, None, None]
    return real if mask is None else mask & real


def _forward(rules, q, k, v, ids):
    wide = jnp.promote_types(q.dtype, jnp.float32)
    queries, keys = q.shape[3], k.shape[2]
    ids = _padded_ids(rules, ids, queries, keys)
    q = _padded(q, 3, rules.chunk)
    k, v = (_padded(x, 2, rules.key_chunk) for x in (k, v))

    def query_chunk(i):
        own = _cut(q, 3, i, rules.chunk)

        def key_chunk(j, state):
            out, peak, total = state
            mask = _dynamic_mask(rules, ids, queries, keys, i, j)
            logits = _logits(rules, own, _cut(k, 2, j, rules.key_chunk), mask, wide)
            new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
            weights, shrink = _weights(logits, new_peak, mask), jnp.exp(peak - new_peak)
            out = out * shrink[..., None] + _mix(weights, _cut(v, 2, j, rules.key_chunk))
            return out, new_peak, total * shrink + jnp.sum(weights, axis=-1)

        none = _zeros_like(own.shape[:4], q, wide)
        start = (_zeros_like(own.shape, q, wide), none + _HIDDEN, none)
        return _finish(*jax.lax.fori_loop(*_key_bounds(rules, ids, i, queries, keys), key_chunk, start))

    out, lse = jax.lax.map(query_chunk, jnp.arange(q.shape[3] // rules.chunk))
    return _join(out, queries), _join(lse, queries)


def _join(chunks, queries):
    """[n,B,K,G,C,...] -> [B,K,G,n*C,...] without the padding."""
    joined = jnp.moveaxis(chunks, 0, 3)
    return joined.reshape(*joined.shape[:3], -1, *joined.shape[5:])[:, :, :, :queries]


def _backward(rules, q, k, v, d_out, lse, delta, ids):
    queries, keys = q.shape[3], k.shape[2]
    ids = _padded_ids(rules, ids, queries, keys)
    q, d_out, lse, delta = (_padded(x, 3, rules.chunk) for x in (q, d_out, lse, delta))
    k, v = (_padded(x, 2, rules.key_chunk) for x in (k, v))
    nothing = _zeros_like((*k.shape[:2], k.shape[3], k.shape[2]), lse)

    def query_chunk(sums, i):
        q_own, d_own, lse_own, delta_own = (_cut(x, 3, i, rules.chunk) for x in (q, d_out, lse, delta))

        def key_chunk(j, state):
            dq, dk, dv = state
            mask = _dynamic_mask(rules, ids, queries, keys, i, j)
            k_part, v_part = _cut(k, 2, j, rules.key_chunk), _cut(v, 2, j, rules.key_chunk)
            dq_part, dk_part, dv_part = _chunk_gradients(rules, q_own, k_part, v_part, d_own, lse_own, delta_own, mask)
            dk, dv = (
                jax.lax.dynamic_update_slice_in_dim(
                    whole, _cut(whole, 3, j, rules.key_chunk) + part, j * rules.key_chunk, 3
                )
                for whole, part in ((dk, dk_part), (dv, dv_part))
            )
            return dq + dq_part, dk, dv

        start = (_zeros_like(q_own.shape, lse), *sums)
        dq, dk, dv = jax.lax.fori_loop(*_key_bounds(rules, ids, i, queries, keys), key_chunk, start)
        return (dk, dv), dq

    (dk, dv), dq = jax.lax.scan(query_chunk, (nothing, nothing), jnp.arange(q.shape[3] // rules.chunk))
    return _join(dq, queries), dk[..., :keys], dv[..., :keys]
