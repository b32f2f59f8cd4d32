"""The door: signature, argument checks, implementation choice, the custom gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations, vary_alike
from pallas_kernels.flash_attention import reference, triton, triton_backward, xla

_FORWARD = implementations(reference.forward, xla.forward, triton.forward)
_BACKWARD = implementations(reference.backward, xla.backward, triton_backward.backward)


def flash_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s hkv d"],
    v: Float[Array, "b s hkv d"],
    *,
    causal: bool = True,
    segment_ids: Int[Array, "b t"] | None = None,
    kv_segment_ids: Int[Array, "b s"] | None = None,
    q_positions: Int[Array, "b t"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "b t h d"]:
    """softmax(scale * q k^T) v over the keys each query may see, with memory linear in the lengths.

    Softmax and accumulation are float32, the weights meet v in v's dtype. Query head h reads key/value head
    h // (H / Hkv). Query t sees key s when

    - `causal`: s <= t, or s <= q_positions[t];
    - `window`: s > t - window (or q_positions[t] - window): with `causal` the last `window` keys, the own one included;
    - segments: both ids are equal and not 0 (0 is padding).

    A query that sees no key gives zeros and takes no gradient. The backward pass recomputes the weights from the
    output and one log-sum-exp a row (FlashAttention-2, Dao, 2023, arXiv:2307.08691). Usable under `jit`, `vmap`,
    `jax.checkpoint` and `shard_map`; arrays that lie over a mesh need a `shard_map`, as XLA cannot divide a kernel.

    Args:
        q: queries `[B,T,H,D]`.
        k: keys `[B,S,Hkv,D]`, Hkv a divisor of H.
        v: values, shaped as k.
        causal: hide later keys.
        segment_ids: `[B,T]` integers; also those of the keys when T = S and `kv_segment_ids` is None.
        kv_segment_ids: `[B,S]` integers, only beside `segment_ids`.
        q_positions: `[B,T]`; the key index each query stands at, in place of its own index; -1 sees nothing.
            For queries against a cache.
        window: positive, or None.
        scale: of the logits; None is D ** -0.5.
        implementation: None, "reference", "xla", "triton" or "interpret", or several in order.

    Returns:
        `[B,T,H,D]` in q's dtype.

    Raises:
        ValueError: shapes that do not fit, a window below 1, kv_segment_ids alone, q_positions without causal.
        TypeError: q, k, v not floating or of different dtypes, ids not integer.
        NotImplementedError: the implementation asked for cannot run here.
    """
    check_names("flash_attention", _FORWARD, implementation)
    _check(q, k, v, causal, segment_ids, kv_segment_ids, q_positions, window)
    if segment_ids is not None and kv_segment_ids is None:
        kv_segment_ids = segment_ids
    ids = (segment_ids, kv_segment_ids, q_positions)
    present = [x for x in ids if x is not None]
    q, k, v, *present = vary_alike(q, k, v, *present)
    present = iter(present)
    ids = tuple(None if x is None else next(present) for x in ids)
    if not isinstance(implementation, str | None):
        implementation = tuple(implementation)
    if q.size == 0 or k.size == 0:
        return jnp.zeros_like(q)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return _attention((implementation, causal, window, scale), q, k, v, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, ids):
    return _fwd(static, q, k, v, ids)[0]


def _fwd(static, q, k, v, ids):
    implementation, causal, window, scale = static
    out, lse = dispatch(
        "flash_attention", _FORWARD, implementation, q, k, v, ids, causal=causal, window=window, scale=scale
    )
    return out, (q, k, v, ids, out, lse)


def _bwd(static, saved, d_out):
    implementation, causal, window, scale = static
    gradients = dispatch(
        "flash_attention", _BACKWARD, implementation, *saved, d_out, causal=causal, window=window, scale=scale
    )
    return *gradients, None


_attention.defvjp(_fwd, _bwd)


def _check(q, k, v, causal, segment_ids, kv_segment_ids, q_positions, window):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: expected 4 axes [batch, length, heads, head_dim], got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype, floating, got {x.dtype} beside q of {q.dtype}")
    batch, length, heads, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(f"k: expected [{batch}, S, Hkv, {dim}] beside q of shape {q.shape}, got {k.shape}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {k.shape}, got {v.shape}")
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {k.shape[2]}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, or None, got {window}")
    if q_positions is not None and not causal:
        raise ValueError("q_positions: expected None without causal, got an array")
    if segment_ids is None and kv_segment_ids is not None:
        raise ValueError("kv_segment_ids: expected None without segment_ids, got an array")
    if segment_ids is not None and kv_segment_ids is None and k.shape[1] != length:
        raise ValueError(f"kv_segment_ids: expected [{batch}, {k.shape[1]}] as the lengths of q and k differ, got None")
    expected = (
        ("segment_ids", segment_ids, (batch, length)),
        ("kv_segment_ids", kv_segment_ids, (batch, k.shape[1])),
        ("q_positions", q_positions, (batch, length)),
    )
    for name, x, shape in expected:
        if x is not None and x.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {x.shape}")
        if x is not None and not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{name}: expected integers, got {x.dtype}")
