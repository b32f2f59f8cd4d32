"""Rows between devices, counted slot by slot in plain Python."""

import numpy as np


def pft(experts: np.ndarray, keep: np.ndarray, num_experts: int, per_node: int) -> tuple[int, int]:
    """(rows to other nodes, rows to other devices of the same node)."""
    devices = experts.shape[0]
    inter = intra = 0
    for (source, _, _), expert in np.ndenumerate(np.where(keep, experts, -1)):
        if expert < 0:
            continue
        target = int(expert) // (num_experts // devices)
        if target // per_node != source // per_node:
            inter += 1
        elif target != source:
            intra += 1
    return inter, intra


def rbd(experts: np.ndarray, keep: np.ndarray, num_experts: int, per_node: int, pick) -> tuple[int, int]:
    """The same for RBD; `pick(source, node, slots)` says where a group lands: one of its devices, or any other."""
    devices, tokens, k = experts.shape
    inter = intra = 0
    for source in range(devices):
        for token in range(tokens):
            groups: dict[int, list[int]] = {}
            for j in range(k):
                if keep[source, token, j]:
                    target = int(experts[source, token, j]) // (num_experts // devices)
                    groups.setdefault(target // per_node, []).append(target)
            for node, targets in groups.items():
                landing = pick(source, node, targets)
                inter += node != source // per_node
                intra += node == source // per_node and landing != source
                intra += sum(target != landing for target in targets)
    return inter, intra


def distinct(experts: np.ndarray, keep: np.ndarray, num_experts: int, nodes: int) -> int:
    """(token, node) pairs among the kept slots."""
    node = experts // (num_experts // nodes)
    rows = zip(node.reshape(-1, node.shape[-1]), keep.reshape(-1, node.shape[-1]))
    return sum(len(set(row[kept])) for row, kept in rows)
