"""The door: signature, argument checks, implementation choice, the custom gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.flash_self_attention import reference, triton, xla

_FORWARD = implementations(reference.forward, xla.forward, triton.forward)
_BACKWARD = implementations(reference.backward, xla.backward, triton.backward)


def flash_self_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "b t h d"]:
    """softmax(scale * q k^T) v over all keys, without a [T, S] array of all heads in either direction.

    Softmax and accumulation are float32; on a GPU the weights meet v in v's dtype. The kernels are those of
    `flash_attention` without any mask: heads of any size up to 256 (Stable Diffusion's 40, 80 and 160) are padded in
    registers, not in memory. On a CPU one head at a time meets all its keys, and there is nothing to rescale. The
    backward pass recomputes the weights from the output and one log-sum-exp a row (FlashAttention-2, Dao, 2023,
    arXiv:2307.08691).

    Args:
        q: queries `[B,T,H,D]`.
        k: keys `[B,S,H,D]`; S is T in self-attention.
        v: values, shaped as k.
        scale: of the logits; None is D ** -0.5.
        implementation: None, "reference", "xla", "triton" or "interpret", or several in order.

    Returns:
        `[B,T,H,D]` in q's dtype; zeros where there is no key.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: q, k, v not floating or of different dtypes.
        NotImplementedError: the implementation asked for cannot run here.
    """
    check_names("flash_self_attention", _FORWARD, implementation)
    check_arrays(q, k, v)
    q, k, v = vary_alike(q, k, v)
    if not isinstance(implementation, str | None):
        implementation = tuple(implementation)
    if q.size == 0 or k.size == 0:
        return jnp.zeros_like(q)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return _attention((implementation, scale), q, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v):
    return _fwd(static, q, k, v)[0]


def _fwd(static, q, k, v):
    implementation, scale = static
    out, lse = dispatch("flash_self_attention", _FORWARD, implementation, q, k, v, scale=scale)
    return out, (q, k, v, out, lse)


def _bwd(static, saved, d_out):
    implementation, scale = static
    return dispatch("flash_self_attention", _BACKWARD, implementation, *saved, d_out, scale=scale)


_attention.defvjp(_fwd, _bwd)


def check_arrays(q: Array, k: Array, v: Array) -> None:
    """Holds q to `[B,T,H,D]`, k and v to `[B,S,H,D]`, and all to one floating dtype; errors as in the signature."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: expected 4 axes [batch, length, heads, head_dim], got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype, floating, got {x.dtype} beside q of {q.dtype}")
    batch, _, heads, dim = q.shape
    if (k.shape[0], *k.shape[2:]) != (batch, heads, dim):
        raise ValueError(f"k: expected [{batch}, S, {heads}, {dim}] beside q of shape {q.shape}, got {k.shape}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {k.shape}, got {v.shape}")
