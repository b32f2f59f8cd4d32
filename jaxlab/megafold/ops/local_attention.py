"""Attention of blocks of atoms to the atoms around them."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from jaxlab.megafold.ops.basic import check_mask, check_shape, masked_softmax

_EDGES = ("mask", "shift")


def atom_windows(
    x: Shaped[Array, "..."], *, axis: int, n_q: int = 32, n_k: int = 128, edge: str = "mask"
) -> Shaped[Array, "..."]:
    """The keys of every block of queries: axis n becomes two, [ceil(n / n_q), n_k].

    Block i of n_q queries looks at the n_k places centred on it, from n_q * i - (n_k - n_q) // 2 on. Places outside
    the array hold 0 (False). With edge "shift" the windows at both ends move inwards until they lie inside the array as
    padded to whole blocks; if that is shorter than a window, it begins at 0.

    Args:
      x: what lies along the atoms.
      axis: which axis they are.
      n_q: queries of a block.
      n_k: keys of a window.
      edge: "mask" or "shift".

    Raises:
      ValueError: unknown edge; n_q below 1, or n_k below n_q; an empty axis.
    """
    if edge not in _EDGES:
        raise ValueError(f"edge: expected one of {_EDGES}, got {edge!r}")
    if n_q < 1 or n_k < n_q:
        raise ValueError(f"n_q, n_k: expected 1 <= n_q <= n_k, got {n_q}, {n_k}")
    axis %= x.ndim
    length = x.shape[axis]
    if length == 0:
        raise ValueError(f"x: expected at least one atom along axis {axis}, got shape {x.shape}")
    blocks = math.ceil(length / n_q)
    before = (n_k - n_q) // 2

    def padded(left: int, total: int) -> Array:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (left, total - left - length)
        return jnp.pad(x, padding)

    def cut(x: Array, start: int, stop: int) -> Array:
        return x[(slice(None),) * axis + (slice(start, stop),)]

    # Windows are runs of whole blocks, so that they are slices, and their gradient is a sum of slices: no scatter.
    run = math.ceil(n_k / n_q)
    long = padded(before, (blocks + run - 1) * n_q)
    tiles = long.reshape(*x.shape[:axis], -1, n_q, *x.shape[axis + 1 :])
    shifted = [cut(tiles, i, i + blocks) for i in range(run)]
    windows = jnp.concatenate(shifted, axis=axis + 1)
    windows = windows[(slice(None),) * (axis + 1) + (slice(n_k),)]
    if edge == "mask":
        return windows
    total = max(blocks * n_q, n_k)
    inside = padded(0, total)
    first = min(math.ceil(before / n_q), blocks)  # blocks before this one would begin below 0
    last = max((total - n_k + before) // n_q + 1, first)  # from this one on they would end above the array

    def repeated(start: int, count: int) -> Array:
        window = jnp.expand_dims(cut(inside, start, start + n_k), axis)
        return jnp.broadcast_to(window, (*x.shape[:axis], count, n_k, *x.shape[axis + 1 :]))

    ends = repeated(0, first), repeated(total - n_k, max(blocks - last, 0))
    return jnp.concatenate([ends[0], cut(windows, first, last), ends[1]], axis=axis)


def local_attention(
    q: Float[Array, "b *t n h d"],
    k: Float[Array, "b *t n h d"],
    v: Float[Array, "b *t n h d"],
    bias: Float[Array, "b h blocks n_q n_k"] | None = None,
    mask: Bool[Array, "b n"] | None = None,
    *,
    n_q: int = 32,
    n_k: int = 128,
    edge: str = "mask",
    scale: float | None = None,
) -> Float[Array, "b *t n h d"]:
    """Attention in windows along the sequence of atoms (AlphaFold3, algorithm 7).

    Queries of block i, atoms n_q * i and following, see the n_k keys of `atom_windows`. Softmax is float32.

    Args:
      q: queries `[B, N, H, D]`, or `[B, T, N, H, D]`: T samples that share bias and mask.
      k: keys, shaped as q.
      v: values, shaped as q.
      bias: of every query of a block with every key of its window, `[B, H, ceil(N / n_q), n_q, n_k]`.
      mask: valid keys; a query that sees none gives zeros.
      n_q: queries of a block.
      n_k: keys of a window.
      edge: "mask" hides the places of a window outside the array; "shift" moves the window inwards.
      scale: of the products; None is D ** -0.5.

    Raises:
      ValueError: unknown edge; shapes that do not fit; n_q below 1, or n_k below n_q.
      TypeError: a mask that is not boolean.
    """
    if q.ndim not in (4, 5):
        raise ValueError(f"q: expected shape [B, N, H, D] or [B, T, N, H, D], got {q.shape}")
    check_shape("k", k, "that of q", q.shape)
    check_shape("v", v, "that of q", q.shape)
    batch, length, heads, dim = q.shape[0], *q.shape[-3:]
    blocks = math.ceil(length / max(n_q, 1))
    check_mask(mask, "[B, N]", (batch, length))
    if bias is not None:
        check_shape("bias", bias, "[B, H, ceil(N / n_q), n_q, n_k]", (batch, heads, blocks, n_q, n_k))
    valid = jnp.ones((batch, length), bool) if mask is None else mask
    window = {"n_q": n_q, "n_k": n_k, "edge": edge}
    samples = (batch, math.prod(q.shape[1:-3]), length, heads, dim)
    keys, values = (atom_windows(x.reshape(samples), axis=2, **window) for x in (k, v))
    seen = atom_windows(valid, axis=1, **window)
    padding = ((0, 0), (0, 0), (0, blocks * n_q - length), (0, 0), (0, 0))
    queries = jnp.pad(q.reshape(samples), padding)
    queries = queries.reshape(*queries.shape[:2], blocks, n_q, heads, dim)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("btnihd,btnjhd->bthnij", queries, keys, preferred_element_type=wide)
    logits *= dim**-0.5 if scale is None else scale
    if bias is not None:
        logits += bias[:, None].astype(wide)
    weights = masked_softmax(logits, seen[:, None, None, :, None, :])
    out = jnp.einsum("bthnij,btnjhd->btnihd", weights.astype(q.dtype), values)
    return out.reshape(*out.shape[:2], blocks * n_q, heads, dim)[:, :, :length].reshape(q.shape)
