"""Redundancy-bypassing dispatch (RBD): a token with several experts on a node crosses the network once (section 2.5).

Kept slots of one token whose experts lie on one node form a group. One slot of the group is its pilot, and its row
alone is sent to that node; there the group's rows are copied from it and handed on inside the node. On the way back the
group's outputs are weighted and summed on the device where the pilot landed, and one row returns.

The released implementation differs in its results from its own padding-free layer, and this one does not: here one
permutation places rows and weights alike, in both directions.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxlab.xmoe.config import MoEConfig, Topology
from jaxlab.xmoe.exchange import (
    Delivery,
    Splits,
    agree,
    bring_back,
    deliver,
    exchange,
    fitting,
    regrouping,
    rows_abroad,
    segment_of,
    starts_of,
)
from jaxlab.xmoe.peers import Peers, across, device_index, inside, is_bound, receive_rows, topology_of
from jaxlab.xmoe.pft import PFT
from pallas_kernels.token_combine import token_combine
from pallas_kernels.token_gather import token_gather


@struct.dataclass
class RBDPlan:
    """Which rows one device sends where; integers only, and nothing exchanged yet.

    A pilot's row *lands* on its expert's device, or with "rail" on the device of that node with the sender's own index.
    The rows that a landing device hands on are listed by expert; `place` counts through the lists of all landing
    devices, and `P` is the most pilots there can be.

    Attributes:
        is_pilot: `[S,k]` bool; with "rail" the first slot of each group.
        pilot_slot: `[S,k]` int32, the pilot of each slot's group; S * k where the slot was dropped.
        pilot_sizes: `[W]` int32, pilots by the device on which they land.
        pilot_row: `[S,k]` int32, the place of each pilot among the rows that are sent; P for other slots.
        slots: `[P]` int32, the slots of these rows; S * k past the last.
        place: `[S,k]` int32, the place of each slot in the lists; S * k where it was dropped.
        list_sizes: `[W,E/N]` int32, slots for each landing device and expert of its node.
    """

    is_pilot: Any
    pilot_slot: Any
    pilot_sizes: Any
    pilot_row: Any
    slots: Any
    place: Any
    list_sizes: Any


def rbd_plan(
    pft: PFT,
    cfg: MoEConfig,
    topology: Topology,
    key: Array | None = None,
    *,
    device: Int[Array, ""] | int | None = None,
) -> RBDPlan:
    """Chooses the pilots among the kept slots and orders what is to be sent.

    Groups lie within a token's k slots, so pilots are found by comparing those; one sort of integers orders the lists
    (none with "rail", where the buffer's own order serves).

    Args:
        pft: the kept slots.
        cfg: the layer; `cfg.pilot` chooses.
        topology: W devices and their nodes; E / W experts each.
        key: for "random" pilots.
        device: index of this device, which "rail" needs; by default its place on `cfg.expert_axes`, or 0 where these
            are not bound.

    Raises:
        ValueError: experts that do not divide over the devices; "random" without a key.
    """
    devices, nodes = topology.num_devices, topology.num_nodes
    if cfg.num_experts % devices:
        raise ValueError(f"num_experts must be a multiple of num_devices={devices}, got {cfg.num_experts}")
    if cfg.pilot == "random" and key is None:
        raise ValueError("pilot='random' needs a key, got None; 'first' and 'rail' do without")
    (tokens, k), buffer_rows = pft.inv.shape, pft.slots.shape[0]
    total, per_node, per_device = tokens * k, cfg.num_experts // nodes, cfg.num_experts // devices
    most = min(buffer_rows, tokens * min(k, nodes))
    slot = jnp.arange(total, dtype=jnp.int32).reshape(tokens, k)
    if total == 0:
        none = jnp.zeros((tokens, k), jnp.int32)
        lists = jnp.zeros((devices, per_node), jnp.int32)
        return RBDPlan(none > 0, none, lists[:, 0], none, none.reshape(-1)[:0], none, lists)

    kept = pft.inv < pft.num_valid
    expert = jnp.where(kept, _at(pft.expert_ids, pft.inv), cfg.num_experts)
    pilot_slot = jnp.where(kept, _pilots(expert // per_node, cfg.pilot, key) + slot[:, :1], total)
    is_pilot = kept & (pilot_slot == slot)

    # Pilots in the buffer's order lie by expert, therefore by device and by node.
    count = jnp.cumsum(_at(is_pilot.reshape(-1), pft.slots) & (pft.slots < total), dtype=jnp.int32)
    pilot_row = jnp.where(is_pilot, _at(count, pft.inv) - 1, most)
    slots = _inverse(pilot_row, slot, most, total)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), count])  # pilots among the first i rows of the buffer
    ends = pft.bins.reshape(nodes if cfg.pilot == "rail" else devices, -1)[:, -1]
    pilot_sizes = jnp.diff(before[ends], prepend=0)

    if cfg.pilot == "rail":
        if device is None:
            device = device_index(cfg) if is_bound(cfg.expert_axes) else 0
        local = jnp.arange(topology.devices_per_node) == device % topology.devices_per_node
        pilot_sizes = jnp.where(local, pilot_sizes[:, None], 0).reshape(-1)
        lists = pft.tokens_per_expert.reshape(nodes, 1, per_node)
        list_sizes = jnp.where(local[:, None], lists, 0).reshape(devices, per_node)
        place = jnp.where(kept, pft.inv, total)
    else:
        lands = _at(expert.reshape(-1), pilot_slot) // per_device
        bucket = jnp.where(kept, lands * per_node + expert % per_node, devices * per_node).reshape(-1)
        order, ends = _sorted(bucket, devices * per_node)
        list_sizes = jnp.diff(ends, prepend=0).reshape(devices, per_node)
        place = jnp.where(kept, _inverse(order, slot.reshape(-1), total, total).reshape(tokens, k), total)
    return RBDPlan(is_pilot, pilot_slot, pilot_sizes, pilot_row, slots, place, list_sizes)


def _pilots(node: Int[Array, "s k"], pilot: str, key: Array | None) -> Int[Array, "s k"]:
    """Of each slot, which of its token's slots is the pilot of its node."""
    k = node.shape[1]
    index_bits = 0
    rank = jnp.broadcast_to(jnp.arange(k, dtype=jnp.uint32), node.shape)
    if key is not None and pilot == "random":  # the least of random numbers, whose last bits are the slot's index
        index_bits = (k - 1).bit_length()
        rank = (jax.random.bits(key, node.shape, jnp.uint32) >> index_bits << index_bits) | rank
    best = jnp.full(node.shape, jnp.iinfo(jnp.uint32).max)
    for j in range(k):  # [s, k, k] is never stored
        best = jnp.where(node == node[:, j, None], jnp.minimum(best, rank[:, j, None]), best)
    return (best & ((1 << index_bits) - 1) if index_bits else best).astype(jnp.int32)


def _sorted(bucket: Int[Array, " n"], buckets: int) -> tuple[Int[Array, " n"], Int[Array, " b"]]:
    """The places in stable order of their bucket, and where each bucket ends."""
    n = bucket.shape[0]
    index = jnp.arange(n, dtype=jnp.int32)
    if (buckets + 1) * n < 2**31:
        keys = jax.lax.sort(bucket * n + index)
        bucket, order = keys // n, keys % n
    else:
        bucket, order = jax.lax.sort((bucket, index), num_keys=1, is_stable=True)
    ends = jnp.searchsorted(bucket, jnp.arange(buckets, dtype=jnp.int32), side="right")
    return order, ends.astype(jnp.int32)


def _inverse(places: Int[Array, "..."], values: Int[Array, "..."], length: int, fill: int) -> Int[Array, " n"]:
    """Values at their places, which are distinct; those from `length` on are left out."""
    out = jnp.full(length, fill, jnp.int32)
    return out.at[places.reshape(-1)].set(values.reshape(-1), mode="drop", unique_indices=True)


def _at(x: Array, index: Int[Array, "..."]) -> Array:
    return x.at[index].get(mode="clip")


class RBDRows(NamedTuple):
    """Rows delivered to a device's experts, and what it takes to bring their outputs home.

    Attributes:
        rows: `[R,H]`, expert after expert, undefined after the last.
        group_sizes: `[E/W]` int32, rows of each expert.
        dropped_recv: slots lost for want of room, int32: those without a row on any device add up over the devices.
        inter_node_rows: rows that this device sent to other nodes, int32.
        pilots: splits of the exchange between landing devices.
        weights: `[R1,k]` float32, of each landed row's slots; differentiable in the routing's.
        inv: `[R1,k]` int32, place of each landed row's slots among the rows it handed on.
        slots: `[R2]` int32, the inverse.
        handed: rows handed on, int32.
        delivery: of the exchange inside the node.
    """

    rows: Array
    group_sizes: Array
    dropped_recv: Array
    inter_node_rows: Array
    pilots: Splits
    weights: Array
    inv: Array
    slots: Array
    handed: Array
    delivery: Delivery


def rbd_dispatch(
    x: Float[Array, "s h"], weights: Float[Array, "s k"], plan: RBDPlan, cfg: MoEConfig, *, capacity: int | None = None
) -> RBDRows:
    """Sends pilots across the network and their copies on inside the node.

    With each pilot travel the weights of its group and the places of the group's slots. To be called inside a
    `jax.shard_map` over `cfg.expert_axes`.

    Args:
        x: this device's tokens.
        weights: combine weights.
        plan: of `rbd_plan`, for these axes.
        cfg: the layer.
        capacity: slots of one device that an expert takes, which bounds the buffers; None if all.

    Raises:
        ValueError: no axes or unbound ones, or sizes that do not divide.
    """
    if not cfg.expert_axes:
        raise ValueError("expert_axes must name the mesh axes that RBD exchanges over, got ()")
    topology = topology_of(cfg)
    outer, senders, columns = _stage_one(cfg, topology)
    (tokens, k), per_node = plan.is_pilot.shape, cfg.num_experts // topology.num_nodes
    kernels, how = cfg.kernel_implementation, cfg.exchange_implementation

    reach = per_node if cfg.pilot == "rail" else cfg.num_experts // topology.num_devices
    pilot_room = receive_rows(cfg, tokens, capacity, senders, reach, pilots_only=True)
    pilot_sizes, list_sizes = columns(plan.pilot_sizes), columns(plan.list_sizes)
    splits, _ = agree(pilot_sizes, outer, pilot_room)
    place, lost = plan.place, jnp.int32(0)
    if cfg.recv_buffer_factor is not None:
        place, list_sizes, lost = _without_lost_pilots(plan, list_sizes, splits)

    num_pilots = jnp.sum(plan.pilot_sizes)
    token = plan.slots // k
    rows = token_gather(x, token, plan.pilot_row, num_pilots, implementation=kernels)
    mine = _at(plan.pilot_slot, token) == plan.slots[:, None]
    spread = token_gather(weights.astype(jnp.float32), token, plan.pilot_row, num_pilots, implementation=kernels)
    # Places count from the start of the landing device's list; the lists of any device are far shorter than 2^24.
    list_starts = starts_of(jnp.sum(list_sizes, 1))
    lands = segment_of(jnp.arange(plan.slots.shape[0], dtype=jnp.int32), splits.send_starts)
    listed = _at(place, token)
    listed = jnp.where(mine & (listed < tokens * k), listed - list_starts[lands][:, None], -1)
    notes = jnp.concatenate([jnp.where(mine, spread, 0), listed.astype(jnp.float32)], 1)

    landed = exchange(rows, splits, outer, pilot_room, how)
    notes = exchange(notes, splits, outer, pilot_room, how)
    arriving = outer.swap(list_sizes)

    # A landed row stands for the slots that its notes list; here they get their places, by expert.
    room = receive_rows(cfg, tokens, capacity, senders, per_node)
    kept = fitting(arriving.reshape(-1), room).reshape(arriving.shape)
    order = regrouping(kept, room)
    index = jnp.arange(pilot_room, dtype=jnp.int32)
    source = segment_of(index, splits.recv_starts)
    used = (index < jnp.sum(splits.recv_sizes))[:, None]
    listed = jax.lax.stop_gradient(notes[:, k:]).astype(jnp.int32)
    at = jnp.where(used & (listed >= 0), starts_of(jnp.sum(arriving, 1))[source][:, None] + listed, room)
    inv = jnp.where(at < room, _at(order.by_group, at), room)
    slots = _inverse(inv, jnp.arange(pilot_room * k, dtype=jnp.int32), room, pilot_room * k)
    handed = order.num_valid
    copies = token_gather(landed, slots // k, inv, handed, implementation=kernels)

    inner = inside(cfg, topology)
    counts = jnp.sum(kept, 0).reshape(topology.devices_per_node, -1)
    out_rows = receive_rows(cfg, tokens, capacity, topology.num_devices, counts.shape[1])
    received, sizes, lost_inside, delivery = deliver(copies, counts, inner, out_rows, cfg)
    lost = lost + jnp.sum(arriving - kept) + lost_inside
    abroad = rows_abroad(splits, cfg, topology)
    return RBDRows(received, sizes, lost, abroad, splits, notes[:, :k], inv, slots, handed, delivery)


def rbd_combine(y: Float[Array, "r h"], sent: RBDRows, plan: RBDPlan, cfg: MoEConfig) -> Float[Array, "s h"]:
    """Brings the experts' outputs home: each group is weighted and summed where its pilot landed, and returns as one.

    Args:
        y: outputs for `sent.rows`, in their order.
        sent: of `rbd_dispatch`.
        plan: the same plan.
        cfg: the layer.
    """
    topology = topology_of(cfg)
    outer = _stage_one(cfg, topology)[0]
    kernels, how = cfg.kernel_implementation, cfg.exchange_implementation
    handed_on = bring_back(y, sent.delivery, inside(cfg, topology), sent.slots.shape[0], cfg)
    sums = token_combine(handed_on, sent.weights, sent.inv, sent.slots, sent.handed, implementation=kernels)
    home = exchange(sums, sent.pilots.reversed(), outer, plan.slots.shape[0], how)
    ones = jnp.ones(plan.is_pilot.shape, jnp.float32)
    return token_combine(home, ones, plan.pilot_row, plan.slots, jnp.sum(plan.pilot_sizes), implementation=kernels)


def _stage_one(cfg, topology):
    """The peers of stage 1, how many they are, and the part of an array over all devices that concerns them."""
    if cfg.pilot != "rail":
        return Peers(cfg.expert_axes), topology.num_devices, lambda array: array
    shape = (topology.num_nodes, topology.devices_per_node)
    return across(cfg, topology), topology.num_nodes, lambda array: jnp.sum(array.reshape(*shape, *array.shape[1:]), 1)


def _without_lost_pilots(plan, list_sizes, splits):
    """Places and list sizes without the slots whose pilot finds no room, and how many these are."""
    total = plan.place.size
    row = _at(plan.pilot_row.reshape(-1), plan.pilot_slot)
    lands = segment_of(row, splits.send_starts)
    alive = (plan.place < total) & (row - splits.send_starts[lands] < splits.send_sizes[lands])
    listed = jnp.cumsum(_inverse(plan.place, alive.astype(jnp.int32), total, 0), dtype=jnp.int32)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), listed])
    place = jnp.where(alive, before[jnp.minimum(plan.place, total)], total)
    ends = jnp.cumsum(list_sizes.reshape(-1), dtype=jnp.int32)
    sizes = jnp.diff(before[ends], prepend=0).reshape(list_sizes.shape)
    return place, sizes, ends[-1] - listed[-1]
