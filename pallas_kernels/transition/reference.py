"""The transition as the formula reads: the specification of the fast forms, and the unfused baseline."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.layernorm_linear import reference as layernorm_linear


def forward(
    x: Float[Array, "*m c"],
    scale: Float[Array, " c"],
    offset: Float[Array, " c"],
    w_in: Float[Array, "c f2"],
    w_out: Float[Array, "f c"],
    *,
    eps: float,
    row_chunk: int | None,
) -> Float[Array, "*m c"]:
    """(silu(gate) * value) w_out with [value, gate] = LN(x) w_in; `row_chunk` has no part in it."""
    del row_chunk
    wide = jnp.promote_types(x.dtype, jnp.float32)
    hidden = layernorm_linear.forward(x, scale, offset, w_in, None, eps=eps)
    value, gate = jnp.split(hidden.astype(wide), 2, axis=-1)
    product = (jax.nn.silu(gate) * value).astype(x.dtype)
    return jnp.matmul(product, w_out.astype(x.dtype), preferred_element_type=wide).astype(x.dtype)


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
    """Gradients of the five arrays by JAX's own differentiation of `forward`."""
    args = x, scale, offset, w_in, w_out
    return jax.vjp(lambda *args: forward(*args, eps=eps, row_chunk=row_chunk), *args)[1](d_out)
