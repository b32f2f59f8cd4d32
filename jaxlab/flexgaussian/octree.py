"""Cells of a grid as an octree, from the root down: which of a node's eight children there are is one symbol a node."""

import numpy as np
from jaxtyping import Int, UInt64

from jaxlab.flexgaussian.morton import interleaved, parted
from jaxlab.flexgaussian.range_coding import DamagedError, Decoder, Encoder

MOST_BITS = 20
_FULL = 1 << 8
_CROWDED = 4


def encode_cells(encoder: Encoder, codes: UInt64[np.ndarray, " n"], bits: int) -> None:
    """Adds sorted Morton codes of cells of a grid of 2^bits a side; cells may repeat."""
    nodes, counts = np.unique(codes, return_counts=True)
    crowd = np.zeros(1, np.int64)
    for level in range(bits):
        children = np.unique(nodes >> np.uint64(3 * (bits - 1 - level)))
        parents, index = np.unique(children >> np.uint64(3), return_inverse=True)
        occupied = np.zeros(len(parents), np.int64)
        np.bitwise_or.at(occupied, index, 1 << (children & np.uint64(7)).astype(np.int64))
        encoder.symbols(occupied, _FULL, crowd)
        crowd = np.minimum(np.bitwise_count(occupied), _CROWDED).astype(np.int64)[index]
    encoder.whole(counts - 1)


def decode_cells(decoder: Decoder, bits: int, count: int) -> UInt64[np.ndarray, " n"]:
    """The `count` sorted codes that `encode_cells` added.

    Raises:
      DamagedError: other numbers of cells than `count`.
    """
    nodes, crowd = np.zeros(1, np.uint64), np.zeros(1, np.int64)
    for _ in range(bits):
        occupied = decoder.symbols(len(nodes), _FULL, crowd)
        there = (occupied[:, None] >> np.arange(8) & 1).astype(bool)
        index, child = np.nonzero(there)
        if not 0 < len(index) <= count:
            raise DamagedError(f"{len(index)} cells for {count} Gaussians")
        nodes = nodes[index] << np.uint64(3) | child.astype(np.uint64)
        crowd = np.minimum(np.bitwise_count(occupied), _CROWDED).astype(np.int64)[index]
    counts = decoder.whole(len(nodes)) + 1
    if counts.min() < 1 or counts.sum() != count:
        raise DamagedError(f"{counts.sum()} Gaussians in the cells of {count}")
    return np.repeat(nodes, counts)


def codes_of(cells: Int[np.ndarray, "n 3"]) -> UInt64[np.ndarray, " n"]:
    """Morton codes of cells."""
    return interleaved(cells.astype(np.uint64))


def cells_of(codes: UInt64[np.ndarray, " n"]) -> Int[np.ndarray, "n 3"]:
    """The cells of Morton codes."""
    return parted(codes).astype(np.int64)
