"""Tokens, their slots and the padding-free buffer in float64 numpy, slot by slot."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A routed batch laid out expert after expert.

    Attributes:
      slots: [b], the slot t * k + j of each row; s * k past the last.
      token_ids: [b], its token; s past the last.
      inv: [s, k], the row of each slot; b where it was dropped.
      num_valid: rows in use.
    """

    slots: np.ndarray
    token_ids: np.ndarray
    inv: np.ndarray
    num_valid: int


def buffer(rng: np.random.Generator, s: int, k: int, *, kept: float = 1.0, rows: int | None = None) -> Buffer:
    """k random experts of 5 for each of s tokens, a share of the slots kept, in a buffer of `rows` (default s * k)."""
    rows = s * k if rows is None else rows
    experts, keep = rng.integers(0, 5, s * k), rng.random(s * k) < kept
    order = [slot for slot in np.argsort(experts, kind="stable") if keep[slot]][:rows]
    slots, inv = np.full(rows, s * k, np.int32), np.full(s * k, rows, np.int32)
    for row, slot in enumerate(order):
        slots[row], inv[slot] = slot, row
    return Buffer(slots, (slots // max(k, 1)).astype(np.int32), inv.reshape(s, k), len(order))


def gather(x: np.ndarray, token_ids: np.ndarray, num_valid: int) -> np.ndarray:
    """[s, h] -> [b, h]; zero past the last row."""
    out = np.zeros((len(token_ids), x.shape[1]))
    for row in range(num_valid):
        out[row] = x[token_ids[row]]
    return out


def gather_gradient(d_rows: np.ndarray, token_ids: np.ndarray, num_valid: int, tokens: int) -> np.ndarray:
    """Gradient of `sum(d_rows * gather(x))` in x."""
    out = np.zeros((tokens, d_rows.shape[1]))
    for row in range(num_valid):
        out[token_ids[row]] += d_rows[row]
    return out


def combine(y: np.ndarray, weights: np.ndarray, slots: np.ndarray, num_valid: int) -> np.ndarray:
    """[b, h] rows and [s, k] weights -> [s, h]."""
    out = np.zeros((weights.shape[0], y.shape[1]))
    for row in range(num_valid):
        token, choice = divmod(int(slots[row]), weights.shape[1])
        out[token] += weights[token, choice] * y[row]
    return out


def combine_gradients(
    y: np.ndarray, weights: np.ndarray, slots: np.ndarray, num_valid: int, d_out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of `sum(d_out * combine(...))` in y (zero past the last row) and weights."""
    d_y, d_weights = np.zeros(y.shape), np.zeros(weights.shape)
    for row in range(num_valid):
        token, choice = divmod(int(slots[row]), weights.shape[1])
        d_y[row] = weights[token, choice] * d_out[token]
        d_weights[token, choice] = y[row] @ d_out[token]
    return d_y, d_weights
