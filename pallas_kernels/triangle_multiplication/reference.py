"""Triangle multiplication as the formula reads, every array of it stored: the specification, and the unfused peer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Affine = tuple[Float[Array, " _"], Float[Array, " _"]]
"""Scale and offset of a normalisation."""


class Weights(NamedTuple):
    """All weights of the op; a normalisation that is None has been applied already."""

    ln_in: Affine | None
    w_proj: Float[Array, "c f2"]
    w_gate: Float[Array, "c f2"]
    ln_out: Affine | None
    w_out: Float[Array, "f c"]
    w_out_gate: Float[Array, "c c"]

    def cast(self, dtype: jnp.dtype) -> "Weights":
        """The matrices in the dtype in which they are multiplied; scales and offsets stay."""
        matrices = {name: getattr(self, name).astype(dtype) for name in ("w_proj", "w_gate", "w_out", "w_out_gate")}
        return self._replace(**matrices)


def forward(
    z: Float[Array, "b n n c"], mask: Bool[Array, "b n n"] | None, weights: Weights, *, direction: str, eps: float
) -> Float[Array, "b n n c"]:
    """Products and gates in z's dtype, normalisations in float32."""
    weights = weights.cast(z.dtype)
    x = _layer_norm(z, weights.ln_in, eps)
    pair = jax.nn.sigmoid(x @ weights.w_gate) * (x @ weights.w_proj)
    if mask is not None:
        pair = jnp.where(mask[..., None], pair, 0)
    a, b = jnp.split(pair, 2, axis=-1)
    t = jnp.einsum("bikf,bjkf->bijf" if direction == "outgoing" else "bkif,bkjf->bijf", a, b)
    return jax.nn.sigmoid(x @ weights.w_out_gate) * (_layer_norm(t, weights.ln_out, eps) @ weights.w_out)


def backward(
    z: Float[Array, "b n n c"],
    mask: Bool[Array, "b n n"] | None,
    weights: Weights,
    d_out: Float[Array, "b n n c"],
    *,
    direction: str,
    eps: float,
) -> tuple[Float[Array, "b n n c"], Weights]:
    """Gradients of z and of the weights by JAX's own differentiation of `forward`."""
    return jax.vjp(lambda z, weights: forward(z, mask, weights, direction=direction, eps=eps), z, weights)[1](d_out)


def _layer_norm(x: Array, affine: Affine | None, eps: float) -> Array:
    if affine is None:
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    scale, offset = affine
    return (centred * rstd * scale + offset).astype(x.dtype)
