"""One head at a time over all its keys: no array of more than one head's weights, and nothing rescaled."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import zeros_alike
from pallas_kernels.flash_self_attention.heads import over_heads, over_rows, put, softmax, take


def forward(
    q: Float[Array, "b t h d"], k: Float[Array, "b s h d"], v: Float[Array, "b s h d"], *, scale: float
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h t"]]:
    """Output and log-sum-exp of every row."""
    (batch, queries, heads, _), keys = q.shape, k.shape[1]

    def head(b, h, carry):
        own_k, own_v = take(k, b, h, 0, keys) * scale, take(v, b, h, 0, keys)

        def chunk(start, rows, carry):
            out, lse = carry
            weights, total, own_lse = softmax(take(q, b, h, start, rows) @ own_k.T)
            return put(out, weights @ own_v / total, b, h, start), put(lse, own_lse, b, h, start)

        return over_rows(queries, chunk, carry)

    wide = jnp.promote_types(q.dtype, jnp.float32)
    start = q, zeros_alike((batch, queries, heads, 1), wide, q)
    out, lse = over_heads(batch, heads, head, start)
    return out, lse[..., 0].swapaxes(1, 2)


def backward(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    out: Float[Array, "b t h d"],
    lse: Float[Array, "b h t"],
    d_out: Float[Array, "b t h d"],
    *,
    scale: float,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b s h d"], Float[Array, "b s h d"]]:
    """Gradients of q, k and v, from what `forward` gave."""
    (batch, queries, heads, dim), keys = q.shape, k.shape[1]
    lse = lse.swapaxes(1, 2)[..., None]

    def head(b, h, carry):
        own_k, own_v = take(k, b, h, 0, keys) * scale, take(v, b, h, 0, keys)

        def chunk(start, rows, carry):
            dq, own_dk, own_dv = carry
            own_q, d_own = take(q, b, h, start, rows), take(d_out, b, h, start, rows)
            weights = jnp.exp(own_q @ own_k.T - take(lse, b, h, start, rows))
            delta = jnp.sum(take(out, b, h, start, rows) * d_own, axis=1, keepdims=True)
            d_logits = weights * (d_own @ own_v.T - delta)
            dq = put(dq, d_logits @ own_k, b, h, start)
            return dq, own_dk + own_q.T @ d_logits, own_dv + d_own.T @ weights

        dq, dk, dv = carry
        none = zeros_alike((dim, keys), own_k.dtype, q)  # products with the long axis last are the fast ones on a CPU
        dq, own_dk, own_dv = over_rows(queries, chunk, (dq, none, none))
        return dq, put(dk, own_dk.T * scale, b, h, 0), put(dv, own_dv.T, b, h, 0)

    return over_heads(batch, heads, head, (q, k, v))
