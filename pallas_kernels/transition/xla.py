"""The transition by chunks of rows: what a CPU, and any platform without a kernel, really uses.

The hidden layer of a chunk is the largest temporary, in either direction: the backward pass keeps the arguments alone
and makes the hidden layer again. How the gradients of scale, offset and w_in follow from one product is said in
`layernorm_linear.xla`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import zeros_alike
from pallas_kernels.layernorm_linear.xla import (
    chunk_of,
    cut,
    folded,
    over_rows,
    put,
    standardise,
    through_norm,
    transposed,
    weight_gradients,
)


def forward(
    x: Float[Array, "m c"],
    scale: Float[Array, " c"],
    offset: Float[Array, " c"],
    w_in: Float[Array, "c f2"],
    w_out: Float[Array, "f c"],
    *,
    eps: float,
    row_chunk: int | None,
) -> Float[Array, "m c"]:
    """(silu(gate) * value) w_out with [value, gate] = LN(x) w_in."""
    weights, constant = folded(scale, offset, w_in, None, x)
    back = w_out.astype(weights.dtype)

    def chunk(at, size, fresh, out):
        del fresh
        normal, _ = standardise(cut(x, at, size, weights.dtype), eps)
        value, gate = jnp.split(normal @ weights + constant, 2, axis=1)
        return put(out, (jax.nn.silu(gate) * value) @ back, at)

    return over_rows(x.shape[0], row_chunk or chunk_of(x), chunk, zeros_alike(x.shape, x.dtype, x))


def backward(
    x: Float[Array, "m c"],
    scale: Float[Array, " c"],
    offset: Float[Array, " c"],
    w_in: Float[Array, "c f2"],
    w_out: Float[Array, "f c"],
    d_out: Float[Array, "m c"],
    *,
    eps: float,
    row_chunk: int | None,
) -> tuple[Float[Array, "m c"], Float[Array, " c"], Float[Array, " c"], Float[Array, "c f2"], Float[Array, "f c"]]:
    """Gradients of the five arrays, those of the weights in float32."""
    weights, constant = folded(scale, offset, w_in, None, x)
    wide = weights.dtype
    back = w_out.astype(wide)

    def chunk(at, size, fresh, carry):
        d_x, product, total, d_back = carry
        normal, rstd = standardise(cut(x, at, size, wide), eps)
        d_own = cut(d_out, at, size, wide)
        value, gate = jnp.split(normal @ weights + constant, 2, axis=1)
        hidden, d_hidden = swiglu_gradient(value, gate, d_own @ back.T)
        d_x = put(d_x, through_norm(d_hidden @ weights.T, normal, rstd), at)
        d_hidden = jnp.where(fresh[:, None], d_hidden, 0)
        d_own = jnp.where(fresh[:, None], d_own, 0)
        product += transposed(normal) @ d_hidden
        return d_x, product, total + jnp.sum(d_hidden, axis=0), d_back + transposed(hidden) @ d_own

    start = (
        x,
        zeros_alike(w_in.shape, wide, x),
        zeros_alike(w_in.shape[1:], wide, x),
        zeros_alike(w_out.shape, wide, x),
    )
    d_x, product, total, d_back = over_rows(x.shape[0], row_chunk or chunk_of(x), chunk, start)
    return d_x, *weight_gradients(scale, offset, w_in, product, total), d_back


def swiglu_gradient(
    value: Float[Array, "r f"], gate: Float[Array, "r f"], d: Float[Array, "r f"]
) -> tuple[Float[Array, "r f"], Float[Array, "r f2"]]:
    """silu(gate) * value, and the gradients of [value, gate] where that of the product is d."""
    share = jax.nn.sigmoid(gate)
    silu = gate * share
    d_gate = d * value * (share + silu * (1 - share))
    return silu * value, jnp.concatenate([d * silu, d_gate], axis=1)
