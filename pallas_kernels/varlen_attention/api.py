"""The door: signature, argument checks, implementation choice, the custom gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.varlen_attention import reference, triton, xla

_FORWARD = implementations(reference.forward, xla.forward, triton.forward)
_BACKWARD = implementations(reference.backward, xla.backward, triton.backward)


def varlen_attention(
    q: Float[Array, "t h d"],
    k: Float[Array, "t hkv d"],
    v: Float[Array, "t hkv d"],
    offsets: Int[Array, " w"],
    *,
    max_length: int,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "t h d"]:
    """softmax(scale * q k^T) v, where each row sees the rows of its own segment.

    Softmax and accumulation are float32, the weights meet v in v's dtype. Query head h reads key/value head
    h // (H / Hkv). Rows outside every segment give zeros and take no gradient. The backward pass recomputes the
    weights from the output and one log-sum-exp a row. On a GPU the kernels are those of `flash_attention`, which visit
    the tiles of keys that a tile of rows shares a segment with, and no others.

    Args:
        q: queries `[T,H,D]`.
        k: keys `[T,Hkv,D]`, Hkv a divisor of H.
        v: values, shaped as k.
        offsets: `[W+1]` integers that do not fall: segment w is rows offsets[w] up to offsets[w+1]; it may be empty.
        max_length: rows of the longest segment, or more; of a longer one, what comes out is undefined.
        scale: of the logits; None is D ** -0.5.
        implementation: None, "reference", "xla", "triton" or "interpret", or several in order.

    Returns:
        `[T,H,D]` in q's dtype.

    Raises:
        ValueError: shapes that do not fit, or a max_length below 1.
        TypeError: q, k, v not floating or of different dtypes, offsets not integer.
        NotImplementedError: the implementation asked for cannot run here.
    """
    check_names("varlen_attention", _FORWARD, implementation)
    _check(q, k, v, offsets, max_length)
    q, k, v, offsets = vary_alike(q, k, v, offsets)
    if not isinstance(implementation, str | None):
        implementation = tuple(implementation)
    if q.size == 0 or offsets.shape[0] == 1:
        return jnp.zeros_like(q)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return _attention((implementation, min(max_length, q.shape[0]), scale), q, k, v, offsets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, offsets):
    return _fwd(static, q, k, v, offsets)[0]


def _fwd(static, q, k, v, offsets):
    implementation, max_length, scale = static
    rules = {"max_length": max_length, "scale": scale}
    out, lse = dispatch("varlen_attention", _FORWARD, implementation, q, k, v, offsets, **rules)
    return out, (q, k, v, offsets, out, lse)


def _bwd(static, saved, d_out):
    implementation, max_length, scale = static
    rules = {"max_length": max_length, "scale": scale}
    gradients = dispatch("varlen_attention", _BACKWARD, implementation, *saved, d_out, **rules)
    return *gradients, None


_attention.defvjp(_fwd, _bwd)


def _check(q, k, v, offsets, max_length):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name}: expected 3 axes [rows, heads, head_dim], got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype, floating, got {x.dtype} beside q of {q.dtype}")
    rows, heads, dim = q.shape
    if (k.shape[0], k.shape[2]) != (rows, dim):
        raise ValueError(f"k: expected [{rows}, Hkv, {dim}] beside q of shape {q.shape}, got {k.shape}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {k.shape}, got {v.shape}")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {k.shape[1]}")
    if offsets.ndim != 1 or not offsets.shape[0]:
        raise ValueError(f"offsets: expected one axis and at least one element, got shape {offsets.shape}")
    if not jnp.issubdtype(offsets.dtype, jnp.integer):
        raise TypeError(f"offsets: expected integers, got {offsets.dtype}")
    if max_length < 1:
        raise ValueError(f"max_length: expected at least 1, got {max_length}")
