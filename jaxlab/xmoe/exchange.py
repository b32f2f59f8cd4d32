"""Rows that change devices, as many as there are: the uneven all-to-all and its regrouping (X-MoE section 2.4).

XLA needs static shapes, so a device receives into a buffer of `out_rows` rows; what does not fit is counted. A GPU
sends the rows alone (`lax.ragged_all_to_all`); a CPU, which has no such collective, sends everything and picks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Integer, Shaped

from jaxlab.xmoe.config import MoEConfig, Topology
from jaxlab.xmoe.peers import Peers, device_index
from pallas_kernels.dispatch import check_names, dispatch, vary_alike, zeros_alike
from pallas_kernels.token_gather import token_gather

_OP = "uneven_all_to_all"
_FEW_SEGMENTS = 128  # so many comparisons a row are cheaper than a search, and far quicker to compile


class Splits(NamedTuple):
    """Where the rows of an exchange lie, on this device and on its peers; one entry a peer.

    The rows for peer p lie here from `send_starts[p]` and will lie there from `send_to[p]`; those from peer p come to
    lie here from `recv_starts[p]` and lay there from `recv_from[p]`. Rows that find no room are not counted in sizes.
    """

    send_starts: Int[Array, " p"]
    send_sizes: Int[Array, " p"]
    send_to: Int[Array, " p"]
    recv_starts: Int[Array, " p"]
    recv_sizes: Int[Array, " p"]
    recv_from: Int[Array, " p"]

    def reversed(self) -> "Splits":
        """The same rows on their way back."""
        return Splits(*self[3:], *self[:3])


def uneven_all_to_all(
    x: Shaped[Array, "m h"],
    send_sizes: Integer[Array, " w"],
    axis_name: str | tuple[str, ...],
    *,
    out_rows: int,
    implementation: str | None = None,
) -> tuple[Shaped[Array, "{out_rows} h"], Int[Array, " w"], Int[Array, ""]]:
    """Sends the first `send_sizes[0]` rows of x to device 0 of the axes, the next `send_sizes[1]` to device 1, and on.

    To be called inside `jax.shard_map`. The gradient in x is the same exchange with the splits swapped; rows of x past
    the last one sent, and rows lost on the way, take none. What they hold (NaN too) does not matter.

    Args:
        x: rows, those for device 0 first.
        send_sizes: rows for each device; not negative, together at most m.
        axis_name: the mesh axis, or several; devices count row-major over them.
        out_rows: rows that this device can receive; equal on all devices.
        implementation: "ragged" (GPUs: the rows alone), "padded" (a dense all-to-all of chunks as long as the longest
            possible), "gather" (everybody gets all rows and picks); None is the platform's best.

    Returns:
        The received rows by source device and then in their order there, zeros after the last; the rows kept of each
        source; and the number of rows that did not fit. Those at the end are lost.

    Raises:
        ValueError: ranks or lengths disagree, an unbound axis, a negative `out_rows`, an unknown implementation.
        TypeError: `send_sizes` is not integer.
        NotImplementedError: "ragged" is lowered for a platform without that collective.
    """
    peers = Peers((axis_name,) if isinstance(axis_name, str) else tuple(axis_name))
    x, send_sizes = jnp.asarray(x), jnp.asarray(send_sizes)
    check_names(_OP, _TABLE, implementation)
    if x.ndim != 2:
        raise ValueError(f"x must be [M, H], got shape {x.shape}")
    if not jnp.issubdtype(send_sizes.dtype, jnp.integer):
        raise TypeError(f"send_sizes must be integers, got {send_sizes.dtype}")
    if send_sizes.shape != (peers.size,):
        raise ValueError(
            f"send_sizes must have one entry for each of the {peers.size} devices on {peers.axes}, "
            f"got shape {send_sizes.shape}"
        )
    if out_rows < 0:
        raise ValueError(f"out_rows must not be negative, got {out_rows}")
    send_sizes = fitting(jnp.maximum(send_sizes.astype(jnp.int32), 0), x.shape[0])  # nothing is read past the end
    splits, overflow = agree(send_sizes, peers, out_rows)
    return exchange(x, splits, peers, out_rows, implementation), splits.recv_sizes, overflow


def agree(send_sizes: Int[Array, " p"], peers: Peers, out_rows: int) -> tuple[Splits, Int[Array, ""]]:
    """The splits of an exchange whose rows lie by destination, and how many rows get lost at this device."""
    send_starts = starts_of(send_sizes)
    recv_sizes, recv_from = peers.swap(jnp.stack([send_sizes, send_starts], 1)).T
    recv_starts = starts_of(recv_sizes)
    kept = fitting(recv_sizes, out_rows)
    recv_starts = jnp.minimum(recv_starts, out_rows)
    send_to, accepted = peers.swap(jnp.stack([recv_starts, kept], 1)).T
    return Splits(send_starts, accepted, send_to, recv_starts, kept, recv_from), jnp.sum(recv_sizes - kept)


def exchange(
    x: Shaped[Array, "m h"], splits: Splits, peers: Peers, out_rows: int, implementation: str | None
) -> Shaped[Array, "{out_rows} h"]:
    """The exchange alone; rows of the result that nobody sends are zero."""
    x, *flat = vary_alike(x, *splits)
    if 0 in (*x.shape, out_rows):
        return zeros_alike((out_rows, x.shape[1]), x.dtype, x)
    names = implementation or _default(x.shape[0], out_rows)
    return _exchange(peers, x.shape[0], out_rows, names, x, Splits(*flat))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _exchange(peers, in_rows, out_rows, implementation, x, splits):
    del in_rows
    return dispatch(_OP, _TABLE, implementation, x, splits, peers=peers, out_rows=out_rows)


def _exchange_forward(peers, in_rows, out_rows, implementation, x, splits):
    return _exchange(peers, in_rows, out_rows, implementation, x, splits), splits


def _exchange_backward(peers, in_rows, out_rows, implementation, splits, grads):
    if not isinstance(implementation, str):
        implementation = _default(out_rows, in_rows)
    return _exchange(peers, out_rows, in_rows, implementation, grads, splits.reversed()), None


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _ragged(x, splits, *, peers, out_rows):
    return lax.ragged_all_to_all(
        x,
        zeros_alike((out_rows, x.shape[1]), x.dtype, x),
        splits.send_starts,
        splits.send_sizes,
        splits.send_to,
        splits.recv_sizes,
        **peers.where,
    )


def _padded(x, splits, *, peers, out_rows):
    rows = min(x.shape[0], out_rows)
    index = jnp.arange(rows, dtype=jnp.int32)
    chunks = _rows(x, splits.send_starts[:, None] + index, index < splits.send_sizes[:, None])
    arrived = lax.all_to_all(chunks, split_axis=0, concat_axis=0, tiled=True, **peers.where)
    source, offset, valid = _arrivals(splits, out_rows)
    return _rows(arrived.reshape(-1, x.shape[1]), source * rows + offset, valid)


def _gather(x, splits, *, peers, out_rows):
    everything = lax.all_gather(x, tiled=True, **peers.where)
    source, offset, valid = _arrivals(splits, out_rows)
    return _rows(everything, source * x.shape[0] + splits.recv_from[source] + offset, valid)


_TABLE = {"ragged": _ragged, "padded": _padded, "gather": _gather}


def _default(in_rows: int, out_rows: int) -> tuple[str, str]:
    """Of the two for CPUs, gathering copies least, unless it is the long receive buffers that are to be gathered."""
    return "ragged", "gather" if in_rows <= out_rows else "padded"


def _arrivals(splits, out_rows):
    """Of each row of the result: its source, which of the source's rows it is, and whether there is one."""
    index = jnp.arange(out_rows, dtype=jnp.int32)
    source = segment_of(index, splits.recv_starts)
    offset = index - splits.recv_starts[source]
    return source, offset, offset < splits.recv_sizes[source]


def _rows(x, index, valid):
    return jnp.where(valid[..., None], x.at[index].get(mode="clip"), 0)


def rows_abroad(splits: Splits | None, config: MoEConfig, topology: Topology) -> Int[Array, ""]:
    """Rows that left the own node, in an exchange over all devices or with one device of each node."""
    if splits is None:
        return jnp.int32(0)
    peers, nodes = splits.send_sizes.shape[0], topology.num_nodes
    node = jnp.arange(peers, dtype=jnp.int32) // (peers // nodes)
    own = device_index(config) // topology.devices_per_node
    return jnp.sum(jnp.where(node == own, 0, splits.send_sizes))


def starts_of(sizes: Int[Array, " n"]) -> Int[Array, " n"]:
    """Where each of several consecutive segments starts."""
    return jnp.cumsum(sizes, dtype=jnp.int32) - sizes


def fitting(sizes: Int[Array, " n"], room: int) -> Int[Array, " n"]:
    """How much of each of several consecutive segments lies in the first `room` places."""
    return jnp.clip(room - starts_of(sizes), 0, sizes)


def segment_of(index: Int[Array, "*m"], starts: Int[Array, " n"]) -> Int[Array, "*m"]:
    """The segment in which each place lies; an empty one has none."""
    method = "compare_all" if starts.size <= _FEW_SEGMENTS else "scan_unrolled"
    return jnp.searchsorted(starts, index, side="right", method=method).astype(jnp.int32) - 1


class Regrouping(NamedTuple):
    """The permutation between rows that lie by source and then group, and by group and then source.

    Attributes:
        by_source: of each row in the order of groups, its place in the order of sources.
        by_group: of each row in the order of sources, its place in the order of groups; `rows` past the last.
        num_valid: rows in use.
    """

    by_source: Int[Array, " r"]
    by_group: Int[Array, " r"]
    num_valid: Int[Array, ""]

    def reversed(self) -> "Regrouping":
        """The way back."""
        return Regrouping(self.by_group, self.by_source, self.num_valid)


def regrouping(counts: Int[Array, "p g"], rows: int) -> Regrouping:
    """For `counts[p, g]` rows of group g from source p in a buffer of `rows`; nothing is sorted."""
    by_source = starts_of(counts.reshape(-1)).reshape(counts.shape)
    by_group = starts_of(counts.T.reshape(-1)).reshape(counts.T.shape)
    total = jnp.sum(counts)
    index = jnp.arange(rows, dtype=jnp.int32)

    def places(own, other):
        at = segment_of(index, own.reshape(-1))
        return jnp.where(index < total, index + (other.T - own).reshape(-1)[at], rows)

    return Regrouping(places(by_group, by_source), places(by_source, by_group), total)


class Delivery(NamedTuple):
    """What it takes to bring delivered rows back.

    Attributes:
        splits: of the exchange; None among one device.
        order: between sources and groups; None where both are the same.
    """

    splits: Splits | None
    order: Regrouping | None


def permute_rows(rows: Float[Array, "r h"], order: Regrouping, config: MoEConfig) -> Float[Array, "r h"]:
    """Rows by source, put in the order of groups; undefined after the last. The gradient is the gather back."""
    places, inverse, num_valid = order
    return token_gather(rows, places, inverse[:, None], num_valid, implementation=config.kernel_implementation)


def deliver(
    rows: Float[Array, "m h"], counts: Int[Array, "p g"], peers: Peers, out_rows: int, config: MoEConfig
) -> tuple[Float[Array, "r h"], Int[Array, " g"], Int[Array, ""], Delivery]:
    """Sends rows to the peers, where they come to lie group after group.

    Args:
        rows: by destination and then by group.
        counts: rows for each peer and group there.
        peers: the devices that exchange.
        out_rows: room at each device. Lost are the last rows by source, then group, then row.
        config: names the implementations.

    Returns:
        Rows, by group, undefined after the last; rows in each group; rows lost here; and how to bring them back.
    """
    if peers.size == 1:
        return rows, counts[0], jnp.int32(0), Delivery(None, None)
    arriving = peers.swap(counts)
    splits, overflow = agree(jnp.sum(counts, 1), peers, out_rows)
    received = exchange(rows, splits, peers, out_rows, config.exchange_implementation)
    kept = fitting(arriving.reshape(-1), out_rows).reshape(arriving.shape)
    order = None
    if counts.shape[1] > 1:
        order = regrouping(kept, out_rows)
        received = permute_rows(received, order, config)
    return received, jnp.sum(kept, 0), overflow, Delivery(splits, order)


def bring_back(
    rows: Float[Array, "r h"], delivery: Delivery, peers: Peers, sent_rows: int, config: MoEConfig
) -> Float[Array, "{sent_rows} h"]:
    """What became of the rows of `deliver`, in the order in which they were sent; zeros for lost ones."""
    splits, order = delivery
    if order is not None:
        rows = permute_rows(rows, order.reversed(), config)
    if splits is not None:
        rows = exchange(rows, splits.reversed(), peers, sent_rows, config.exchange_implementation)
    return rows
