"""Rows between devices in plain numpy, row by row: the uneven exchange, and who shares a node with whom."""

import numpy as np


def exchange(x: np.ndarray, sizes: np.ndarray, out_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x[W,M,H], sizes[source, target] -> received [W,out_rows,H], rows kept [target, source], rows lost [W]."""
    devices = len(sizes)
    received = np.zeros((devices, out_rows, x.shape[2]))
    kept, lost = np.zeros((devices, devices), int), np.zeros(devices, int)
    for target in range(devices):
        place = 0
        for source in range(devices):
            start = sizes[source, :target].sum()
            for row in range(start, start + sizes[source, target]):
                if place < out_rows:
                    received[target, place] = x[source, row]
                    kept[target, source] += 1
                else:
                    lost[target] += 1
                place += 1
    return received, kept, lost


def exchange_gradient(cotangent: np.ndarray, sizes: np.ndarray, rows: int) -> np.ndarray:
    """The gradient of sum(cotangent * received) in x."""
    devices, out_rows, width = cotangent.shape
    gradient = np.zeros((devices, rows, width))
    for target in range(devices):
        place = 0
        for source in range(devices):
            start = sizes[source, :target].sum()
            for row in range(start, start + sizes[source, target]):
                if place < out_rows:
                    gradient[source, row] = cotangent[target, place]
                place += 1
    return gradient


def groups(expert_ids: np.ndarray, keep: np.ndarray, experts_per_node: int) -> dict[tuple[int, int], list[int]]:
    """(token, node) -> the token's kept slots there, in order."""
    tokens, k = expert_ids.shape
    found: dict[tuple[int, int], list[int]] = {}
    for token in range(tokens):
        for j in range(k):
            if keep[token, j]:
                found.setdefault((token, int(expert_ids[token, j]) // experts_per_node), []).append(token * k + j)
    return found


def rows_abroad(expert_ids: np.ndarray, keep: np.ndarray, num_experts: int, nodes: int, *, distinct: bool) -> int:
    """Rows to other nodes from all devices: one for each slot, or for each token and node. ids[W,S,k]."""
    devices = len(expert_ids)
    total = 0
    for device in range(devices):
        own = device // (devices // nodes)
        for (_, node), slots in groups(expert_ids[device], keep[device], num_experts // nodes).items():
            if node != own:
                total += 1 if distinct else len(slots)
    return total


def arrivals(expert_ids: np.ndarray, keep: np.ndarray, num_experts: int) -> list[list[int]]:
    """Of each expert the sorted global tokens (device * S + token) that come to it. ids[W,S,k]."""
    devices, tokens, k = expert_ids.shape
    found: list[list[int]] = [[] for _ in range(num_experts)]
    for device, token, j in np.ndindex(devices, tokens, k):
        if keep[device, token, j]:
            found[expert_ids[device, token, j]].append(device * tokens + token)
    return [sorted(rows) for rows in found]
