"""The door: signature, argument checks, implementation choice."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.shared_prefix_attention import reference, triton, xla

_FORWARD = implementations(reference.forward, xla.forward, triton.forward)


def shared_prefix_attention(
    q: Float[Array, "b n h d"],
    prefix_k: Float[Array, "b p hkv d"],
    prefix_v: Float[Array, "b p hkv d"],
    prefix_lengths: Int[Array, " b"],
    suffix_k: Float[Array, "b n s hkv d"],
    suffix_v: Float[Array, "b n s hkv d"],
    suffix_lengths: Int[Array, "b n"],
    *,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "b n h d"]:
    """softmax(scale * q [prefix_k, suffix_k]^T) [prefix_v, suffix_v]: one query of each of N samples of B prompts.

    A query sees the first `prefix_lengths[b]` keys of its prompt, which all samples share and which are read once, and
    the first `suffix_lengths[b, n]` of its own. The two softmaxes are merged by their log-sum-exp (flash decoding).
    Softmax and accumulation are float32, the weights meet the values in the values' dtype. Query head h reads
    key/value head h // (H / Hkv). A query that sees nothing gives zeros. There is no gradient: it is for decoding. Keys
    and values are read with heads before tokens: transposed views of arrays that lie so are not copied.

    Args:
        q: `[B,N,H,D]`.
        prefix_k: `[B,P,Hkv,D]`, Hkv a divisor of H.
        prefix_v: shaped as prefix_k.
        prefix_lengths: `[B]` integers in 0..P.
        suffix_k: `[B,N,S,Hkv,D]`.
        suffix_v: shaped as suffix_k.
        suffix_lengths: `[B,N]` integers, at most S; below 1 none is seen.
        scale: of the logits; None is D ** -0.5.
        implementation: None, "reference", "xla", "triton" or "interpret", or several in order.

    Returns:
        `[B,N,H,D]` in q's dtype.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: arrays not floating or of different dtypes, lengths not integer.
        NotImplementedError: the implementation asked for cannot run here.
    """
    check_names("shared_prefix_attention", _FORWARD, implementation)
    arrays = (q, prefix_k, prefix_v, prefix_lengths, suffix_k, suffix_v, suffix_lengths)
    _check(*arrays)
    if q.size == 0:
        return jnp.zeros_like(q)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return dispatch("shared_prefix_attention", _FORWARD, implementation, *vary_alike(*arrays), scale=scale)


def _check(q, prefix_k, prefix_v, prefix_lengths, suffix_k, suffix_v, suffix_lengths):
    if q.ndim != 4:
        raise ValueError(f"q: expected 4 axes [prompts, samples, heads, head_dim], got shape {q.shape}")
    batch, samples, heads, dim = q.shape
    if prefix_k.ndim != 4 or (prefix_k.shape[0], prefix_k.shape[3]) != (batch, dim) or not prefix_k.shape[1]:
        raise ValueError(
            f"prefix_k: expected [{batch}, P, Hkv, {dim}] beside q of shape {q.shape}, got {prefix_k.shape}"
        )
    kv_heads = prefix_k.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"prefix_k: expected a number of heads that divides q's {heads}, got {kv_heads}")
    fits = suffix_k.ndim == 5 and suffix_k.shape[:2] == (batch, samples) and suffix_k.shape[3:] == (kv_heads, dim)
    if not fits or not suffix_k.shape[2]:
        raise ValueError(f"suffix_k: expected [{batch}, {samples}, S, {kv_heads}, {dim}], got {suffix_k.shape}")
    floats = {"prefix_k": prefix_k, "prefix_v": prefix_v, "suffix_k": suffix_k, "suffix_v": suffix_v}
    for name, x in {"q": q, **floats}.items():
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype, floating, got {x.dtype} beside q of {q.dtype}")
    expected = (
        ("prefix_v", prefix_v, prefix_k.shape),
        ("suffix_v", suffix_v, suffix_k.shape),
        ("prefix_lengths", prefix_lengths, (batch,)),
        ("suffix_lengths", suffix_lengths, (batch, samples)),
    )
    for name, x, shape in expected:
        if x.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {x.shape}")
        if name.endswith("lengths") and not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{name}: expected integers, got {x.dtype}")
