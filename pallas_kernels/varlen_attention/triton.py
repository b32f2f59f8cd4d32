"""The kernels of `flash_attention` over one row of packed segments: tiles that share none are never visited."""

from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import triton, triton_backward
from pallas_kernels.flash_attention.triton_tiles import Tiles
from pallas_kernels.varlen_attention.segments import as_one_row

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
    rules = {"scale": scale, "interpret": interpret, "tiles": _tiles(q)[0]}
    return as_one_row(triton.forward, q, k, v, offsets, **rules)


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
    rules = {"scale": scale, "interpret": interpret, "tiles": _tiles(q)}
    return as_one_row(triton_backward.backward, q, k, v, offsets, out, lse, d_out, **rules)
