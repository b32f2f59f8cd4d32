"""Packed words read by integer arithmetic, and products with packed experts in float64 numpy, row by row."""

import math

import numpy as np


def unpack(words: np.ndarray, pos: int) -> np.ndarray:
    """The weights of member `pos`, float64: sign, mask, exponent - 112 and mantissa of a bfloat16."""
    words = words.astype(np.int64)
    sign = np.where(words // 2 ** (15 - pos) % 2 == 1, -1.0, 1.0)
    keep = words // 2 ** (13 - pos) % 2 == 1
    exponent, mantissa = words // 128 % 32 + 112 - 127, words % 128
    return np.where(keep, sign * 2.0**exponent * (1 + mantissa / 128), 0.0)


def matrices(words: np.ndarray, dense: np.ndarray | None, slot_of: np.ndarray, pos_of: np.ndarray) -> np.ndarray:
    """One matrix an expert, [experts, k, n]."""
    packed = len(words)
    return np.stack(
        [
            unpack(words[slot], pos) if slot < packed else dense[slot - packed].astype(np.float64)
            for slot, pos in zip(slot_of, pos_of)
        ]
    )


def product(x: np.ndarray, experts: np.ndarray, group_sizes: np.ndarray) -> np.ndarray:
    """Each row times the matrix of its expert; rows of none give zero."""
    out = np.zeros((len(x), experts.shape[2]))
    for row, expert in enumerate(np.repeat(np.arange(len(experts)), group_sizes)):
        out[row] = x[row] @ experts[expert]
    return out


def gated_product(x: np.ndarray, gate: np.ndarray, up: np.ndarray, group_sizes: np.ndarray, act: str) -> np.ndarray:
    """act(x gate) * (x up)."""
    z, u = product(x, gate, group_sizes), product(x, up, group_sizes)
    return _activation(z, act)[0] * u


def gradient(experts: np.ndarray, group_sizes: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
    """Gradient of sum(cotangent * product) in the rows."""
    return product(cotangent, np.swapaxes(experts, 1, 2), group_sizes)


def gated_gradient(
    x: np.ndarray, gate: np.ndarray, up: np.ndarray, group_sizes: np.ndarray, act: str, cotangent: np.ndarray
) -> np.ndarray:
    """Gradient of sum(cotangent * gated_product) in the rows."""
    z, u = product(x, gate, group_sizes), product(x, up, group_sizes)
    value, slope = _activation(z, act)
    return gradient(gate, group_sizes, cotangent * u * slope) + gradient(up, group_sizes, cotangent * value)


def _activation(z: np.ndarray, act: str) -> tuple[np.ndarray, np.ndarray]:
    if act == "silu":
        sigmoid = 1 / (1 + np.exp(-z))
        return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))
    cdf = 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(z / math.sqrt(2)))
    return z * cdf, cdf + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def codes(codes: np.ndarray, scales: np.ndarray, pos: int, bits: int) -> np.ndarray:
    """Weights of member `pos` of quantised pairs, one position after the other; codes [r, n], scales [groups, n]."""
    groups, n = scales.shape
    size = len(codes) * 8 // bits // groups
    out = np.zeros((groups * size, n))
    # Angles of the pair codes in eighths of a turn: the sign of a cosine (member 0) and a sine (member 1).
    turn = [np.cos, np.sin][pos]
    for k in range(groups * size):
        group, place = divmod(k, size)
        if bits == 8:
            code, level = np.divmod(codes[k].astype(int), 32)
        else:
            quarter, row = divmod(place, size // 4)
            planes = codes[group * size * 3 // 4 :].astype(int)
            nibble = planes[quarter // 2 * (size // 4) + row] // 16 ** (quarter % 2) % 16
            rest = planes[2 * (size // 4) + row] // 4**quarter % 4
            code, level = nibble // 2, 2 * rest + nibble % 2
        coefficient = np.rint(np.sqrt(2) * turn(code * np.pi / 4)).clip(-1, 1)
        out[k] = coefficient * level * scales[group].astype(np.float64)
    return out
