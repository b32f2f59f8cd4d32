"""One head at a time, its probabilities added to the map: no array of all heads' weights."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import zeros_alike
from pallas_kernels.flash_self_attention.heads import over_heads, over_rows, put, softmax, take


def forward(
    q: Float[Array, "b t h d"], k: Float[Array, "b s h d"], v: Float[Array, "b s h d"], *, scale: float
) -> tuple[Float[Array, "b t h d"], Float[Array, "b t s"]]:
    """Output, and the head mean of the probabilities."""
    (batch, queries, heads, _), keys = q.shape, k.shape[1]

    def head(b, h, carry):
        own_k, own_v = take(k, b, h, 0, keys) * scale, take(v, b, h, 0, keys)

        def chunk(start, rows, carry):
            out, mean = carry
            weights, total, _ = softmax(take(q, b, h, start, rows) @ own_k.T)
            weights /= total
            mean = put(mean, take(mean, b, 0, start, rows) + weights / heads, b, 0, start)
            return put(out, weights @ own_v, b, h, start), mean

        return over_rows(queries, chunk, carry)

    wide = jnp.promote_types(q.dtype, jnp.float32)
    start = q, zeros_alike((batch, queries, 1, keys), wide, q)
    out, mean = over_heads(batch, heads, head, start)
    return out, mean[:, :, 0]


def backward(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    d_out: Float[Array, "b t h d"],
    d_map: Float[Array, "b t s"],
    *,
    scale: float,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b s h d"], Float[Array, "b s h d"]]:
    """Gradients of q, k and v; the probabilities are made again."""
    (batch, queries, heads, dim), keys = q.shape, k.shape[1]
    d_map = d_map[:, :, None]

    def head(b, h, carry):
        own_k, own_v = take(k, b, h, 0, keys) * scale, take(v, b, h, 0, keys)

        def chunk(start, rows, carry):
            dq, own_dk, own_dv = carry
            own_q, d_own = take(q, b, h, start, rows), take(d_out, b, h, start, rows)
            weights, total, _ = softmax(own_q @ own_k.T)
            weights /= total
            d_weights = d_own @ own_v.T + take(d_map, b, 0, start, rows) / heads
            d_logits = weights * (d_weights - jnp.sum(weights * d_weights, axis=1, keepdims=True))
            dq = put(dq, d_logits @ own_k, b, h, start)
            return dq, own_dk + d_logits.T @ own_q, own_dv + weights.T @ d_own

        dq, dk, dv = carry
        none = zeros_alike((keys, dim), own_k.dtype, q)
        dq, own_dk, own_dv = over_rows(queries, chunk, (dq, none, none))
        return dq, put(dk, own_dk * scale, b, h, 0), put(dv, own_dv, b, h, 0)

    return over_heads(batch, heads, head, (q, k, v))
