"""The kernels of `flash_attention` over one row of packed segments: tiles that share none are never visited."""

from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import triton, triton_backward
from pallas_kernels.flash_attention.triton_tiles import Tiles
from pallas_kernels.varlen_attention.segments import segment_ids

# Tiles as high as a window; more warps where a tile's gradients of keys and values are held in registers, too.
_TILES, _KEYS_TILES = Tiles(64, 64, warps=4, stages=2), Tiles(64, 64, warps=8, stages=2)
_WIDE_TILES, _WIDE_KEYS_TILES = Tiles(32, 32, warps=4, stages=2), Tiles(32, 32, warps=8, stages=2)


def _tiles(q: Array) -> tuple[Tiles, Tiles]:
    """Tiles for rows, and for the gradients of keys; smaller ones for float32 and heads beyond 128."""
    small = q.dtype.itemsize > 2 or q.shape[-1] > 128
    return (_WIDE_TILES, _WIDE_KEYS_TILES) if small else (_TILES, _KEYS_TILES)


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
    out, lse = triton.forward(q[None], k[None], v[None], (ids, ids, None), tiles=_tiles(q)[0], **rules)
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
    dq, dk, dv = triton_backward.backward(q[None], k[None], v[None], (ids, ids, None), *whole, tiles=_tiles(q), **rules)
    return dq[0], dk[0], dv[0]
