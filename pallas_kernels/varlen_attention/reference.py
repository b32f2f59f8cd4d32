"""The attention over all pairs of rows, masked: the specification of the fast forms."""

from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import reference
from pallas_kernels.varlen_attention.segments import segment_ids


def forward(
    q: Float[Array, "t h d"],
    k: Float[Array, "t hkv d"],
    v: Float[Array, "t hkv d"],
    offsets: Int[Array, " w"],
    *,
    max_length: int,
    scale: float,
) -> tuple[Float[Array, "t h d"], Float[Array, "h t"]]:
    """Output and log-sum-exp of every row."""
    ids = segment_ids(offsets, q.shape[0])[None]
    out, lse = reference.forward(
        q[None], k[None], v[None], (ids, ids, None), causal=False, window=None, scale=scale
    )  # fmt: skip
    return out[0], lse[0]


def backward(
    q: Float[Array, "t h d"],
    k: Float[Array, "t hkv d"],
    v: Float[Array, "t hkv d"],
    offsets: Int[Array, " w"],
    out: Float[Array, "t h d"],
    lse: Float[Array, "h t"],
    d_out: Float[Array, "t h d"],
    *,
    max_length: int,
    scale: float,
) -> tuple[Float[Array, "t h d"], Float[Array, "t hkv d"], Float[Array, "t hkv d"]]:
    """Gradients of q, k and v."""
    ids = segment_ids(offsets, q.shape[0])[None]
    whole = (x[None] for x in (out, lse, d_out))
    dq, dk, dv = reference.backward(
        q[None], k[None], v[None], (ids, ids, None), *whole, causal=False, window=None, scale=scale
    )
    return dq[0], dk[0], dv[0]
