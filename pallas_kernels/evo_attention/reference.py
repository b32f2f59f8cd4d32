"""Attention with a pair bias as the formula reads, logits and all, differentiated by JAX: the specification."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static of a call.

    Attributes:
      scale: of the products of q and k.
      block_q: queries of a tile of the Triton kernels; None: theirs.
      block_k: keys of one.
      row_chunk: rows (of axis S) that the XLA form takes at once; None: by bytes.
    """

    scale: float
    block_q: int | None = None
    block_k: int | None = None
    row_chunk: int | None = None


def forward(
    q: Float[Array, "b s n h d"],
    k: Float[Array, "b s n h d"],
    v: Float[Array, "b s n h d"],
    mask: Float[Array, "b s n"] | None,
    bias: Float[Array, "b h n n"] | None,
    *,
    options: Options,
) -> tuple[Float[Array, "b s n h d"], Float[Array, "b s h n"]]:
    """softmax(scale * q k^T + bias + mask) v in float32, and the log-sum-exp.

    Where the mask is -inf a key is hidden. A row that sees no key gives zeros, and -inf.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bsihd,bsjhd->bshij", q.astype(wide), k.astype(wide)) * options.scale
    if bias is not None:
        logits += bias.astype(wide)[:, None]
    if mask is not None:
        logits += mask.astype(wide)[:, :, None, None]
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out = jnp.einsum("bshij,bsjhd->bsihd", weights / total, v.astype(wide))
    return out.astype(q.dtype), jnp.where(empty, -jnp.inf, peak + jnp.log(total))[..., 0]


def backward(
    q: Float[Array, "b s n h d"],
    k: Float[Array, "b s n h d"],
    v: Float[Array, "b s n h d"],
    mask: Float[Array, "b s n"] | None,
    bias: Float[Array, "b h n n"] | None,
    lse: Float[Array, "b s h n"],
    delta: Float[Array, "b s h n"],
    d_out: Float[Array, "b s n h d"],
    *,
    options: Options,
    mask_gradient: bool,
    bias_gradient: bool,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Gradients of q, k, v, mask and bias (the last two None unless asked for), recomputing weights from `lse`.

    `delta` is the product of output and its cotangent, summed over D, minus the cotangent of `lse`.
    """
    wide = lse.dtype
    scale = options.scale
    q_, k_, v_, d_ = (x.astype(wide) for x in (q, k, v, d_out))
    logits = jnp.einsum("bsihd,bsjhd->bshij", q_, k_) * scale
    if bias is not None:
        logits += bias.astype(wide)[:, None]
    if mask is not None:
        logits += mask.astype(wide)[:, :, None, None]
    weights = jnp.exp(logits - jnp.where(lse == -jnp.inf, jnp.inf, lse)[..., None])
    d_logits = weights * (jnp.einsum("bsihd,bsjhd->bshij", d_, v_) - delta[..., None])
    dq = jnp.einsum("bshij,bsjhd->bsihd", d_logits, k_) * scale
    dk = jnp.einsum("bshij,bsihd->bsjhd", d_logits, q_) * scale
    dv = jnp.einsum("bshij,bsihd->bsjhd", weights, d_)
    d_mask = jnp.sum(d_logits, axis=(2, 3)).astype(mask.dtype) if mask_gradient and mask is not None else None
    d_bias = jnp.sum(d_logits, axis=1).astype(bias.dtype) if bias_gradient and bias is not None else None
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_mask, d_bias
