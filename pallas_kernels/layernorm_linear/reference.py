"""LayerNorm and the product as the formulas read: the specification of the fast forms, and the unfused baseline."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def normalise(x: Float[Array, "*m k"], scale: Float[Array, " k"], offset: Float[Array, " k"], eps: float) -> Array:
    """LayerNorm over the last axis, in float32 (float64 for float64 x), not rounded to x's dtype."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    centred = x.astype(wide) - jnp.mean(x.astype(wide), axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return centred * rstd * scale.astype(wide) + offset.astype(wide)


def forward(
    x: Float[Array, "*m k"],
    scale: Float[Array, " k"],
    offset: Float[Array, " k"],
    w: Float[Array, "k n"],
    b: Float[Array, " n"] | None,
    *,
    eps: float,
) -> Float[Array, "*m n"]:
    """LN(x) w + b, the product of x's dtype with float32 sums."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    normal = normalise(x, scale, offset, eps).astype(x.dtype)
    out = jnp.matmul(normal, w.astype(x.dtype), preferred_element_type=wide)
    return (out if b is None else out + b.astype(wide)).astype(x.dtype)


def backward(
    x: Float[Array, "m k"],
    scale: Float[Array, " k"],
    offset: Float[Array, " k"],
    w: Float[Array, "k n"],
    d_out: Float[Array, "m n"],
    *,
    eps: float,
) -> tuple[Float[Array, "m k"], Float[Array, " k"], Float[Array, " k"], Float[Array, "k n"], Float[Array, " n"]]:
    """Gradients of x, scale, offset, w and b by JAX's own differentiation of `forward`."""
    b = jnp.zeros_like(d_out, shape=d_out.shape[1:], dtype=jnp.promote_types(x.dtype, jnp.float32))
    return jax.vjp(lambda *args: forward(*args, eps=eps), x, scale, offset, w, b)[1](d_out)
