"""How many rows each way of dispatching moves, counted on the host from the router's choices (X-MoE section 2.5).

All counts are exact integers of one direction (dispatch; the combine moves the same back), over all sources. Rows that
stay on their device are not counted.
"""

import math
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxlab.xmoe.config import MoEConfig, Topology, expert_capacity

ArrayLike = jax.Array | np.ndarray


class Volume(NamedTuple):
    """Rows of H numbers, and their bytes, that leave their device in one direction.

    Attributes:
        inter_rows: rows to another node.
        intra_rows: rows to another device of the same node.
        inter_bytes: the same in bytes.
        intra_bytes: the same in bytes.
    """

    inter_rows: int
    intra_rows: int
    inter_bytes: int
    intra_bytes: int


def dispatch_volume(
    expert_ids: Int[ArrayLike, "w s k"],
    cfg: MoEConfig,
    topology: Topology,
    *,
    keep: Bool[ArrayLike, "w s k"] | None = None,
    itemsize: int = 2,
) -> dict[str, Volume]:
    """What padded dispatch, PFT and RBD move for these choices.

    - "padded" moves E * C rows a source whatever was chosen; C is the capacity of S tokens in training, and S itself
      where nothing is dropped (`drop_policy="none"`).
    - "pft" moves one row a kept slot.
    - "rbd" moves one row for each token and destination node (the pilot), then inside the node one row for each
      replica that is not on its pilot's device. `cfg.pilot` decides the intra-node rows only: "first" counts them for
      the first slot of each group, "rail" for pilots that land on the source's own local index and are handed on from
      there, "random" gives their expectation over the pilots, rounded. The few integers of metadata beside each replica
      are not counted.

    Args:
        expert_ids: the choices of the S tokens of each of W devices.
        cfg: the layer.
        topology: the W devices and their nodes.
        keep: slots that stay; None keeps all.
        itemsize: bytes of one number of a row.

    Raises:
        ValueError: shapes, devices or experts that do not match, or ids outside 0..E-1.
    """
    ids, kept = _checked(expert_ids, keep, cfg.num_experts)
    if ids.ndim != 3 or ids.shape[0] != topology.num_devices:
        raise ValueError(f"expert_ids must be [W={topology.num_devices}, S, k], got shape {ids.shape}")
    if cfg.num_experts % topology.num_devices:
        raise ValueError(
            f"num_experts must be a multiple of the number of devices, got {cfg.num_experts} experts "
            f"on {topology.num_devices} devices"
        )
    devices, tokens, k = ids.shape
    per_node, nodes = topology.devices_per_node, topology.num_nodes
    target = ids // (cfg.num_experts // devices)
    source = np.arange(devices)[:, None, None]
    abroad = target // per_node != source // per_node

    capacity = tokens
    if cfg.drop_policy != "none":
        capacity = expert_capacity(tokens, cfg.num_experts, k, cfg.capacity_factor, cfg.min_capacity)
    slab = devices * (cfg.num_experts // devices) * capacity  # what all sources send to any one place
    moving = kept & (target != source)
    reached = _nodes_reached(target // per_node, kept, nodes)
    own = np.arange(nodes) == source[..., 0] // per_node
    rows = {
        "padded": (slab * (devices - per_node), slab * (per_node - 1)),
        "pft": (int(np.sum(moving & abroad)), int(np.sum(moving & ~abroad))),
        "rbd": (int(np.sum(reached & ~own[:, None, :])), _rows_inside(target, kept, per_node, cfg.pilot)),
    }
    size = cfg.hidden_size * itemsize
    return {name: Volume(inter, intra, inter * size, intra * size) for name, (inter, intra) in rows.items()}


def redundancy_rate(
    expert_ids: Int[ArrayLike, "*batch s k"],
    *,
    num_experts: int,
    num_nodes: int,
    keep: Bool[ArrayLike, "*batch s k"] | None = None,
) -> float:
    """The share of slots whose token goes to their node for another slot already: 1 - distinct (token, node) / slots.

    Args:
        expert_ids: choices; the last axis is the token's k.
        num_experts: E, spread evenly over the nodes in order.
        num_nodes: N.
        keep: slots that stay; None keeps all.

    Raises:
        ValueError: E is no multiple of N, ids outside 0..E-1, or a mask of another shape.
    """
    _check_nodes(num_experts, num_nodes)
    ids, kept = _checked(expert_ids, keep, num_experts)
    slots = int(np.sum(kept))
    if slots == 0:
        return 0.0
    return 1.0 - int(np.sum(_nodes_reached(ids // (num_experts // num_nodes), kept, num_nodes))) / slots


def uniform_redundancy_rate(num_experts: int, top_k: int, num_nodes: int) -> float:
    """`redundancy_rate` expected where each token's k distinct experts are uniform and nothing is dropped.

    A node is missed with probability C(E - E/N, k) / C(E, k), so a token reaches N (1 - that) nodes for its k slots.

    Raises:
        ValueError: E is no multiple of N, or k outside 1..E.
    """
    _check_nodes(num_experts, num_nodes)
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be in 1..num_experts={num_experts}, got {top_k}")
    missed = math.comb(num_experts - num_experts // num_nodes, top_k) / math.comb(num_experts, top_k)
    return 1.0 - num_nodes * (1.0 - missed) / top_k


def _check_nodes(num_experts: int, num_nodes: int) -> None:
    if num_nodes < 1 or num_experts % num_nodes:
        raise ValueError(f"num_experts must be a multiple of num_nodes, got {num_experts} experts, {num_nodes} nodes")


def _checked(expert_ids: ArrayLike, keep: ArrayLike | None, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Choices and mask as host arrays."""
    ids = np.asarray(expert_ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"expert_ids must be integers, got {ids.dtype}")
    if ids.ndim < 2:
        raise ValueError(f"expert_ids must be [..., S, k], got shape {ids.shape}")
    kept = np.ones(ids.shape, bool) if keep is None else np.asarray(keep, bool)
    if kept.shape != ids.shape:
        raise ValueError(f"keep must have the shape of expert_ids {ids.shape}, got {kept.shape}")
    if np.any(kept & ((ids < 0) | (ids >= num_experts))):
        raise ValueError(f"expert_ids must be in 0..{num_experts - 1}, got {ids[kept].min()}..{ids[kept].max()}")
    return np.where(kept, ids, 0).astype(np.int64), kept


def _nodes_reached(node: np.ndarray, kept: np.ndarray, nodes: int) -> np.ndarray:
    """[..., S, N] bool: the nodes that a token's kept slots lie on."""
    reached = np.zeros((*node.shape[:-1], nodes + 1), bool)  # dropped slots lie on one node more
    np.put_along_axis(reached, np.where(kept, node, nodes), True, axis=-1)
    return reached[..., :nodes]


def _rows_inside(target: np.ndarray, kept: np.ndarray, per_node: int, pilot: str) -> int:
    """RBD's rows between devices of a node: pilots of the own node in stage 1, and replicas in stage 2."""
    devices, _, k = target.shape
    source = np.arange(devices)[:, None]
    if pilot == "rail":
        return int(np.sum(kept & (target % per_node != source[..., None] % per_node)))
    node = target // per_node
    expected = np.zeros(target.shape[:-1])
    total = 0
    for i in range(k):  # rows moved if slot i is its group's pilot
        group = kept & kept[..., i, None] & (node == node[..., i, None])
        replicas = np.sum(group & (target != target[..., i, None]), axis=-1)
        pilots = kept[..., i] & (node[..., i] == source // per_node) & (target[..., i] != source)
        if pilot == "first":
            total += int(np.sum(np.where(np.any(group[..., :i], axis=-1), 0, replicas + pilots)))
        else:
            expected += (replicas + pilots) / np.maximum(np.sum(group, axis=-1), 1)
    return total if pilot == "first" else round(float(np.sum(expected)))
