"""Unit quaternions by their three smallest parts."""

import numpy as np

_OTHERS = np.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])


def from_smallest_three(smallest: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Quaternions [N, 4], float32, from three parts [N, 3] in their order and the index [N] of the part left out.

    What is left out is made positive; parts whose squares sum to more than 1 are scaled back.
    """
    smallest = np.asarray(smallest, np.float64)
    squares = np.sum(smallest**2, axis=1)
    smallest = smallest / np.sqrt(np.maximum(squares, 1))[:, None]
    quats = np.empty((len(smallest), 4))
    rows = np.arange(len(smallest))
    quats[rows[:, None], _OTHERS[largest]] = smallest
    quats[rows, largest] = np.sqrt(np.maximum(1 - squares, 0))
    return quats.astype(np.float32)


def smallest_three(quats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The three smallest parts [N, 3] of quaternions, which are normalised, and the index [N] of the fourth.

    Signs are turned so that the fourth is positive.
    """
    quats = np.asarray(quats, np.float64)
    quats = quats / np.linalg.norm(quats, axis=1, keepdims=True)
    rows, largest = np.arange(len(quats)), np.argmax(np.abs(quats), axis=1)
    quats = quats * np.where(quats[rows, largest] < 0, -1.0, 1.0)[:, None]
    return quats[rows[:, None], _OTHERS[largest]], largest
