"""Grouped matrix product and its gradients in float64 numpy, group by group."""

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


def _slices(group_sizes: np.ndarray) -> list[slice]:
    ends = np.cumsum(group_sizes)
    return [slice(int(end - size), int(end)) for size, end in zip(group_sizes, ends)]
