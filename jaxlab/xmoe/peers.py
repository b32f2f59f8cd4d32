"""Who exchanges rows with whom: the devices of the expert axes, those of one node, or one device of each node."""

import dataclasses
import math
from collections.abc import Sequence

from jax import lax
from jaxtyping import Array, Int, Shaped

from jaxlab.xmoe.config import MoEConfig, Topology


@dataclasses.dataclass(frozen=True)
class Peers:
    """The devices along some mesh axes, or a part of them, in row-major order.

    Attributes:
        axes: names of axes that a `shard_map` binds.
        groups: the places along the one axis that talk to each other, equally many in each; None is all of them.
    """

    axes: Sequence[str]
    groups: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self):
        object.__setattr__(self, "axes", tuple(self.axes))

    @property
    def size(self) -> int:
        """How many they are, this device among them."""
        return axis_size(self.axes) if self.groups is None else len(self.groups[0])

    @property
    def where(self) -> dict[str, object]:
        """The arguments by which a collective of `jax.lax` is told."""
        return {"axis_name": self.axes, "axis_index_groups": self.groups}

    def swap(self, x: Shaped[Array, "p *rest"]) -> Shaped[Array, "p *rest"]:
        """Row i goes to peer i, and row i of the result came from it."""
        return lax.all_to_all(x, split_axis=0, concat_axis=0, tiled=True, **self.where)


def axis_size(axes: Sequence[str]) -> int:
    """The product of the axes' sizes.

    Raises:
        ValueError: an axis is not bound by an enclosing `shard_map`.
    """
    try:
        return lax.axis_size(tuple(axes))
    except NameError as error:
        raise ValueError(f"axis {axes} is not bound: expected to be called inside jax.shard_map over it") from error


def is_bound(axes: Sequence[str]) -> bool:
    """Whether an enclosing `shard_map` binds all of the axes, of which there is at least one."""
    try:
        return bool(axes) and lax.axis_size(tuple(axes)) > 0
    except NameError:
        return False


def topology_of(config: MoEConfig) -> Topology:
    """The devices of `expert_axes` and their nodes; one device where there are no axes.

    Raises:
        ValueError: unbound axes; experts or devices that do not divide.
    """
    if not config.expert_axes:
        return Topology(1, 1)
    topology = Topology.of_axes([axis_size((axis,)) for axis in config.expert_axes], config.node_size)
    if config.num_experts % topology.num_devices:
        raise ValueError(
            f"num_experts must be a multiple of the number of devices on expert_axes {config.expert_axes}, "
            f"got {config.num_experts} experts on {topology.num_devices} devices"
        )
    return topology


def device_index(config: MoEConfig) -> Int[Array, ""]:
    """This device's place along `expert_axes`."""
    return lax.axis_index(config.expert_axes)


def inside(config: MoEConfig, topology: Topology) -> Peers:
    """The devices of the own node."""
    if len(config.expert_axes) > 1:
        return Peers(config.expert_axes[1:])
    size = topology.devices_per_node
    return _grouped(config, tuple(tuple(range(n * size, (n + 1) * size)) for n in range(topology.num_nodes)))


def across(config: MoEConfig, topology: Topology) -> Peers:
    """The device with the own index inside its node, of every node (the 'rail')."""
    if len(config.expert_axes) > 1:
        return Peers(config.expert_axes[:1])
    size = topology.devices_per_node
    return _grouped(config, tuple(tuple(range(i, topology.num_devices, size)) for i in range(size)))


def _grouped(config: MoEConfig, groups: tuple[tuple[int, ...], ...]) -> Peers:
    return Peers(config.expert_axes, groups if len(groups) > 1 else None)


def receive_rows(
    config: MoEConfig, tokens: int, capacity: int | None, sources: int, experts: int, *, pilots_only: bool = False
) -> int:
    """Room for the slots of `sources` devices at `experts` experts: the worst case, or what the buffer factor allows.

    Args:
        config: the layer.
        tokens: S of each source.
        capacity: slots of one source that an expert takes; None if all.
        sources: devices that send here.
        experts: experts whose slots they send.
        pilots_only: they send at most one slot of each token.
    """
    slots = tokens * (1 if pilots_only else min(config.top_k, experts))
    if capacity is not None:
        slots = min(slots, experts * capacity)
    worst = sources * slots
    factor = config.recv_buffer_factor
    return worst if factor is None else min(worst, math.ceil(factor * tokens * config.top_k))
