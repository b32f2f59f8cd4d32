"""Grouped matrix products, plain and gated, and their gradients in float64 numpy, group by group."""

import math

import numpy as np


def grouped_matmul(lhs: np.ndarray, rhs: np.ndarray, group_sizes: np.ndarray) -> np.ndarray:
    """[m, k] rows, [g, k, n] matrices -> [m, n]; rows of no group are zero."""
    out = np.zeros((lhs.shape[0], rhs.shape[2]))
    for rows, matrix in zip(_slices(group_sizes), rhs):
        out[rows] = lhs[rows] @ matrix
    return out


def gradients(
    lhs: np.ndarray, rhs: np.ndarray, group_sizes: np.ndarray, cotangent: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of `sum(cotangent * grouped_matmul(...))` in lhs and rhs."""
    d_lhs, d_rhs = np.zeros(lhs.shape), np.zeros(rhs.shape)
    for group, rows in enumerate(_slices(group_sizes)):
        d_lhs[rows] = cotangent[rows] @ rhs[group].T
        d_rhs[group] = lhs[rows].T @ cotangent[rows]
    return d_lhs, d_rhs


def gated(lhs: np.ndarray, gate: np.ndarray, up: np.ndarray, group_sizes: np.ndarray, act: str) -> np.ndarray:
    """act(lhs @ gate) * (lhs @ up); rows of no group are zero."""
    return _act(grouped_matmul(lhs, gate, group_sizes), act)[0] * grouped_matmul(lhs, up, group_sizes)


def gated_gradients(
    lhs: np.ndarray, gate: np.ndarray, up: np.ndarray, group_sizes: np.ndarray, act: str, cotangent: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `sum(cotangent * gated(...))` in lhs, gate and up."""
    value, slope = _act(grouped_matmul(lhs, gate, group_sizes), act)
    by_gate = gradients(lhs, gate, group_sizes, cotangent * slope * grouped_matmul(lhs, up, group_sizes))
    by_up = gradients(lhs, up, group_sizes, cotangent * value)
    return by_gate[0] + by_up[0], by_gate[1], by_up[1]


def _act(z: np.ndarray, act: str) -> tuple[np.ndarray, np.ndarray]:
    """The activation and its derivative."""
    if act == "silu":
        share = 1 / (1 + np.exp(-z))
        return z * share, share * (1 + z * (1 - share))
    share = 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(z / math.sqrt(2)))
    return z * share, share + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _slices(group_sizes: np.ndarray) -> list[slice]:
    ends = np.cumsum(group_sizes)
    return [slice(int(end - size), int(end)) for size, end in zip(group_sizes, ends)]
