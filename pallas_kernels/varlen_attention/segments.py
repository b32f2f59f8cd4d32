"""From offsets to the segment of every row, and to what the passes of `flash_attention` take."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int


def segment_ids(offsets: Int[Array, " w"], rows: int) -> Int[Array, " t"]:
    """Number of each row's segment, from 1; 0 outside every segment."""
    ids = jnp.searchsorted(offsets, jnp.arange(rows, dtype=offsets.dtype), side="right").astype(jnp.int32)
    return jnp.where(ids < offsets.shape[0], ids, 0)


def as_one_row(
    function: Callable[..., Any], q: Array, k: Array, v: Array, offsets: Array, *rest: Array, **rules: Any
) -> Any:
    """What a pass of `flash_attention` makes of the rows as one sequence whose segments do not see each other."""
    ids = segment_ids(offsets, q.shape[0])[None]
    row = (x[None] for x in (q, k, v))
    made = function(*row, (ids, ids, None), *(x[None] for x in rest), causal=False, window=None, **rules)
    return tuple(x[0] for x in made)
