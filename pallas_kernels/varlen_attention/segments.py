"""From offsets to the segment of every row."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def segment_ids(offsets: Int[Array, " w"], rows: int) -> Int[Array, " t"]:
    """Number of each row's segment, from 1; 0 outside every segment."""
    ids = jnp.searchsorted(offsets, jnp.arange(rows, dtype=offsets.dtype), side="right").astype(jnp.int32)
    return jnp.where(ids < offsets.shape[0], ids, 0)
