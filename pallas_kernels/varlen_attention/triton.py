"""The kernels of `flash_attention` over one row of packed segments: tiles that share none are never visited."""

from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import triton, triton_backward
from pallas_kernels.flash_attention.triton_tiles import Tiles
from pallas_kernels.varlen_attention.segments import segment_ids

_TILES = Tiles(64, 64, warps=4, stages=2)
_WIDE_TILES = Tiles(32, 32, warps=4, stages=2)  # float32, or heads beyond 128


def _tiles(q: Array) -> Tiles:
    return _TILES if q.dtype.itemsize == 2 and q.shape[-1] <= 128 else _WIDE_TILES


def forward(
    q: Float[Array, "t h d"],
    k: Float[Array, "t hkv d"],
    v: Float[Array, "t hkv d"],
    offsets: Int[Array, " w"],
    *,
    max_length: int,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "t h d"], Float[Array, "h t"]]:
    """Output and log-sum-exp of every row."""
    ids = segment_ids(offsets, q.shape[0])[None]
    rules = {"causal": False, "window": None, "scale": scale, "interpret": interpret}
    out, lse = triton.forward(q[None], k[None], v[None], (ids, ids, None), tiles=_tiles(q), **rules)
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
    interpret: bool = False,
) -> tuple[Float[Array, "t h d"], Float[Array, "t hkv d"], Float[Array, "t hkv d"]]:
    """Gradients of q, k and v, from what `forward` gave."""
    ids = segment_ids(offsets, q.shape[0])[None]
    whole = (x[None] for x in (out, lse, d_out))
    rules = {"causal": False, "window": None, "scale": scale, "interpret": interpret}
    dq, dk, dv = triton_backward.backward(
        q[None], k[None], v[None], (ids, ids, None), *whole, tiles=(_tiles(q), _tiles(q)), **rules
    )
    return dq[0], dk[0], dv[0]
