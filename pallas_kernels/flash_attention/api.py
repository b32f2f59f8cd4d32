"""The door: signature, argument checks, implementation choice."""

from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention.reference import attention_reference


def flash_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s hkv d"],
    v: Float[Array, "b s hkv d"],
    *,
    causal: bool = True,
    segment_ids: Int[Array, "b t"] | None = None,
    kv_segment_ids: Int[Array, "b s"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    implementation=None,
) -> Float[Array, "b t h d"]:
    """Attention."""
    if kv_segment_ids is None:
        kv_segment_ids = segment_ids
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attention_reference(q, k, v, segment_ids, kv_segment_ids, causal=causal, window=window, scale=scale)
