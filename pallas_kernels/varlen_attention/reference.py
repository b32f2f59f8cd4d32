"""The attention over all pairs of rows, masked: the specification of the fast forms."""

from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import reference
from pallas_kernels.varlen_attention.segments import as_one_row


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
    return as_one_row(reference.forward, q, k, v, offsets, scale=scale)


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
    return as_one_row(reference.backward, q, k, v, offsets, out, lse, d_out, scale=scale)
