"""Attention and its mean probabilities as the formulas read, with `[B,H,T,S]` logits: the specification."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def forward(
    q: Float[Array, "b t h d"], k: Float[Array, "b s h d"], v: Float[Array, "b s h d"], *, scale: float
) -> tuple[Float[Array, "b t h d"], Float[Array, "b t s"]]:
    """Output, and the head mean of the probabilities."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bthd,bshd->bhts", q.astype(wide), k.astype(wide)) * scale
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v.astype(wide)).astype(q.dtype), jnp.mean(weights, axis=1)


def backward(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    d_out: Float[Array, "b t h d"],
    d_map: Float[Array, "b t s"],
    *,
    scale: float,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b s h d"], Float[Array, "b s h d"]]:
    """Gradients of q, k and v by JAX's own differentiation of `forward`."""
    return jax.vjp(functools.partial(forward, scale=scale), q, k, v)[1]((d_out, d_map))
