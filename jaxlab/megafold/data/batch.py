"""Features of several structures, padded to the sizes of a configuration."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.data.cropping import keep, keep_rows
from jaxlab.megafold.data.synthetic import key_generator
from jaxlab.megafold.features import FEATURES, abstract_batch, sizes

_AXES = {"N": "tokens", "A": "atoms", "E": "bonds"}
_ROOM = {"N": "max_tokens", "A": "max_atoms", "E": "max_tokens, doubled"}


def make_batch(
    features: Sequence[Mapping[str, np.ndarray]], config: AF3Config, key: jax.Array
) -> dict[str, np.ndarray]:
    """Pads structures to the configuration's sizes and puts a batch axis first.

    What has more alignment rows or templates than there is room for loses some at random, never row 0; every reference
    conformer is turned and moved at random (AlphaFold3, supplement 2.8).

    Args:
      features: one or more, from `featurize` or `crop`.
      config: whose sizes the arrays get.
      key: decides what is drawn; each structure's share depends on its place in the batch alone.

    Returns:
      All FEATURES, with the types they have there.

    Raises:
      ValueError: no structure, or more tokens, atoms or bonds than there is room for.
    """
    if not features:
        raise ValueError("features: expected at least one structure, got none")
    room = sizes(config)
    shapes = abstract_batch(config, len(features))
    batch = {name: np.full(shapes[name].shape, feature.pad, feature.dtype) for name, feature in FEATURES.items()}
    for index, one in enumerate(features):
        random = key_generator(jax.random.fold_in(key, index))
        count = {"N": len(one["restype"]), "A": len(one["resolved"]), "E": len(one["bonds"])}
        for axis, value in count.items():
            if value > room[axis]:
                limit = f"{room[axis]} {_AXES[axis]} (config.{_ROOM[axis]})"
                raise ValueError(f"features[{index}]: expected at most {limit}, got {value}; crop it")
        kept = {
            "S": keep_rows(random, len(one["msa"]), room["S"]),
            "T": keep(random, len(one["template_mask"]), room["T"]),
        }
        for name, feature in FEATURES.items():
            value = one[name]
            if feature.axes and feature.axes[0] in kept:
                value = value[kept[feature.axes[0]]]
            batch[name][(index, *map(slice, value.shape))] = value
        atoms = slice(0, count["A"])
        batch["ref_pos"][index, atoms] = moved(one["ref_pos"], one["ref_space"], random)
    return batch


def moved(positions: np.ndarray, space: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Each conformer about its own centre, turned, and moved by a standard normal, in Å; unknown ones stay at zero."""
    if not len(space):
        return positions
    names, index = np.unique(space, return_inverse=True)
    number = np.bincount(index)[:, None]
    center = np.stack([np.bincount(index, positions[:, axis]) for axis in range(3)], axis=1) / number
    turn, move = _rotations(random, len(names)), random.normal(size=(len(names), 3))
    there = positions - center[index]
    known = np.bincount(index, np.abs(positions).sum(axis=1)) > 0
    placed = np.einsum("aij,aj->ai", turn[index], there) + move[index]
    return np.where(known[index][:, None], placed, positions).astype(np.float32)


def _rotations(random: np.random.Generator, count: int) -> np.ndarray:
    """Uniform rotations, from normal quaternions."""
    w, x, y, z = (q := random.normal(size=(count, 4))).T / np.linalg.norm(q, axis=1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)
