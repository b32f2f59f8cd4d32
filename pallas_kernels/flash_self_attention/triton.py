"""The kernels of `flash_attention`, nothing masked but what lies past the last key."""

from jaxtyping import Array, Float

from pallas_kernels.flash_attention import triton, triton_backward
from pallas_kernels.flash_attention.triton_tiles import Tiles

_UNMASKED = {"causal": False, "window": None}
_PROMPT_TILES = Tiles(64, 128, warps=8, stages=1)  # all keys of a prompt at once; an A100 would spill with two tiles
_KEYS_TILES = Tiles(64, 64, warps=8, stages=2)  # of 16-bit heads of 65 to 128: an A100 would spill with the usual ones


def forward(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h t"]]:
    """Output and log-sum-exp of every row."""
    tiles = _PROMPT_TILES if q.dtype.itemsize == 2 and 64 < k.shape[1] <= 128 else None
    return triton.forward(q, k, v, (None, None, None), scale=scale, tiles=tiles, interpret=interpret, **_UNMASKED)


def backward(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    out: Float[Array, "b t h d"],
    lse: Float[Array, "b h t"],
    d_out: Float[Array, "b t h d"],
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b s h d"], Float[Array, "b s h d"]]:
    """Gradients of q, k and v, from what `forward` gave."""
    given = (q, k, v, (None, None, None), out, lse, d_out)
    tiles = None, _KEYS_TILES if q.dtype.itemsize == 2 and 64 < q.shape[-1] <= 128 else None
    return triton_backward.backward(*given, scale=scale, tiles=tiles, interpret=interpret, **_UNMASKED)
