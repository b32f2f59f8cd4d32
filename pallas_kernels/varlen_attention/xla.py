"""Segments gathered into a batch `[W, max_length]`, and tiles of `flash_attention` over it.

Work is W * max_length^2 in place of T^2. A segment that one tile holds, as a window does, is one batched product.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import xla
from pallas_kernels.varlen_attention.segments import segment_ids


class _Batch:
    """The segments as rows of a batch: `gather` [T,...] -> [W,L,...], and `scatter` back, zeros outside."""

    def __init__(self, offsets: Int[Array, " w"], rows: int, length: int):
        place = offsets[:-1, None] + jnp.arange(length, dtype=offsets.dtype)
        self._real = place < offsets[1:, None]
        self._place = jnp.clip(place, 0, rows - 1)
        ids = segment_ids(offsets, rows)
        self._inside = ids > 0
        self._segment = jnp.maximum(ids - 1, 0)
        self._index = jnp.clip(jnp.arange(rows, dtype=offsets.dtype) - offsets[self._segment], 0, length - 1)
        real = self._real.astype(jnp.int32)
        self.ids = real, real, None

    def gather(self, x: Float[Array, "t ..."]) -> Float[Array, "w l ..."]:
        return x[self._place]

    def scatter(self, x: Float[Array, "w l ..."]) -> Float[Array, "t ..."]:
        inside = self._inside.reshape(-1, *[1] * (x.ndim - 2))
        return jnp.where(inside, x[self._segment, self._index], 0)


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
    batch = _Batch(offsets, q.shape[0], max_length)
    q, k, v = map(batch.gather, (q, k, v))
    out, lse = xla.forward(q, k, v, batch.ids, causal=False, window=None, scale=scale)
    return batch.scatter(out), batch.scatter(lse.swapaxes(1, 2)).T


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
    """Gradients of q, k and v, from what `forward` gave."""
    batch = _Batch(offsets, q.shape[0], max_length)
    q, k, v, out, d_out = map(batch.gather, (q, k, v, out, d_out))
    lse = batch.gather(lse.T).swapaxes(1, 2)
    dq, dk, dv = xla.backward(q, k, v, batch.ids, out, lse, d_out, causal=False, window=None, scale=scale)
    return batch.scatter(dq), batch.scatter(dk), batch.scatter(dv)
