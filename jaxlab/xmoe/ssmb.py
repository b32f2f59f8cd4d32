"""Sequence-sharded MoE blocks (SSMB): tensor-parallel ranks, holding the same tokens, take a part each (section 2.6).

Both directions are plain transposes of each other under `shard_map`'s vma checks, so gradients need no scaling: that of
a slice is the sum over ranks of zero-padded parts, that of a gather to an unvarying result is the own slice.
"""

import jax
from jax import lax
from jaxtyping import Array, Float

from jaxlab.xmoe.peers import axis_size


def sequence_shard(x: Float[Array, "s h"], tp_axis: str) -> Float[Array, "r h"]:
    """Rows [rank * S / TP, (rank + 1) * S / TP) of x, for this device's rank on the axis.

    To be called inside `jax.shard_map`.

    Args:
        x: tokens, equal along the axis.
        tp_axis: a mesh axis of TP devices.

    Raises:
        ValueError: the axis is unbound, or TP does not divide S.
    """
    ranks = axis_size((tp_axis,))
    if x.ndim != 2:
        raise ValueError(f"x must be [S, H], got shape {x.shape}")
    if x.shape[0] % ranks:
        raise ValueError(f"tokens must be a multiple of the size of {tp_axis!r}, got {x.shape[0]} tokens over {ranks}")
    rows = x.shape[0] // ranks
    return lax.dynamic_slice_in_dim(_varying(x, tp_axis), lax.axis_index(tp_axis) * rows, rows)


def sequence_unshard(y: Float[Array, "r h"], tp_axis: str) -> Float[Array, "s h"]:
    """The rows of all ranks on the axis one after the other, known to be equal (unvarying) along it.

    Args:
        y: this rank's rows.
        tp_axis: a mesh axis of TP devices.

    Raises:
        ValueError: the axis is unbound.
    """
    axis_size((tp_axis,))
    if y.ndim != 2:
        raise ValueError(f"y must be [S / TP, H], got shape {y.shape}")
    y = _varying(y, tp_axis)
    # Without vma checks shard_map itself shares an output's gradient out over the ranks, and a sum collects it again.
    checked = tp_axis in jax.typeof(lax.axis_index(tp_axis)).manual_axis_type.varying
    return lax.all_gather(y, tp_axis, tiled=True, to="invarying" if checked else "varying")


def _varying(x: Array, axis: str) -> Array:
    return x if axis in jax.typeof(x).manual_axis_type.varying else lax.pcast(x, axis, to="varying")
