"""Cutting a structure down to some tokens (AlphaFold3, supplement 2.7; AlphaFold-Multimer, algorithms 1 and 2)."""

from typing import Literal, get_args

import jax
import numpy as np

from jaxlab.megafold.data.synthetic import key_generator
from jaxlab.megafold.features import FEATURES

Method = Literal["contiguous", "spatial", "spatial_interface"]
_PROBABILITIES = (0.2, 0.4, 0.4)  # in the order of Method
_INTERFACE = 15.0  # Å between the central atoms of two chains that touch
_TOKEN_OF_ATOM = "atom_token"
_ATOMS_OF_TOKEN = ("center_atom", "representative_atom", "frame_atoms")


def crop(
    features: dict[str, np.ndarray],
    key: jax.Array,
    *,
    max_tokens: int,
    method: Method | None = None,
    max_atoms: int | None = None,
    max_msa_rows: int | None = None,
) -> dict[str, np.ndarray]:
    """Keeps at most `max_tokens` tokens; what already fits is returned as it is.

    "contiguous" takes stretches of chains in random order, "spatial" the tokens nearest to one of them, and
    "spatial_interface" those nearest to one within 15 Å of another chain. Where no chains touch, an interface is any
    token; where nothing is resolved, a crop is contiguous.

    Args:
      features: of one structure, from `featurize`.
      key: decides everything: the same key, the same crop.
      max_tokens: of the crop.
      method: None draws one, with probabilities 0.2, 0.4, 0.4.
      max_atoms: the tokens chosen last go until the atoms are no more than these.
      max_msa_rows: draws as many rows of the alignment, row 0 among them, before anything is copied.

    Raises:
      ValueError: `max_tokens` or another bound below 1, or an unknown method.
    """
    for name, value in (("max_tokens", max_tokens), ("max_atoms", max_atoms), ("max_msa_rows", max_msa_rows)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    methods = get_args(Method)
    if method is not None and method not in methods:
        raise ValueError(f"method: expected None or one of {methods}, got {method!r}")
    random = key_generator(key)
    drawn = methods[random.choice(len(methods), p=_PROBABILITIES)]
    rows = keep_rows(random, len(features["msa"]), max_msa_rows)
    order = _order(features, random, method or drawn, max_tokens)
    atoms = np.bincount(features[_TOKEN_OF_ATOM], minlength=len(features["restype"]))
    fits = np.cumsum(atoms[order]) <= (max_atoms or atoms.sum())
    chosen = order[: min(max_tokens, int(fits.sum()))]
    features = features | {name: features[name][rows] for name in ("msa", "msa_mask", "deletion_value")}
    return features if len(chosen) == len(features["restype"]) else select(features, np.sort(chosen))


def select(features: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The features of these tokens, in rising order; a frame that loses an atom is none."""
    new_token = np.full(len(features["restype"]), -1, np.int32)
    new_token[tokens] = np.arange(len(tokens))
    atoms = np.flatnonzero(new_token[features[_TOKEN_OF_ATOM]] >= 0)
    new_atom = np.full(len(features[_TOKEN_OF_ATOM]), -1, np.int32)
    new_atom[atoms] = np.arange(len(atoms))
    bonds = new_atom[features["bonds"]]
    made = {}
    for name, feature in FEATURES.items():
        value = features[name]
        for axis, letter in enumerate(feature.axes):
            if letter in ("N", "A"):
                value = np.take(value, tokens if letter == "N" else atoms, axis=axis)
        made[name] = value
    made[_TOKEN_OF_ATOM] = new_token[made[_TOKEN_OF_ATOM]]
    for name in _ATOMS_OF_TOKEN:
        made[name] = new_atom[made[name]]
    lost = (made["frame_atoms"] < 0).any(axis=1)
    made["frame_atoms"][lost] = made["center_atom"][lost, None]
    made["has_frame"] = made["has_frame"] & ~lost
    made["bonds"] = bonds[(bonds >= 0).all(axis=1)]
    return made


def keep(random: np.random.Generator, count: int, most: int) -> np.ndarray | slice:
    """Which of `count` to keep when there is room for `most`, in their order."""
    return slice(None) if count <= most else np.sort(random.choice(count, most, replace=False))


def keep_rows(random: np.random.Generator, count: int, most: int | None) -> np.ndarray | slice:
    """The same of an alignment's rows: the first is always among them; None: room for all."""
    if most is None or count <= most:
        return slice(None)
    return np.append(0, 1 + np.arange(count - 1)[keep(random, count - 1, most - 1)])


def _order(features: dict[str, np.ndarray], random: np.random.Generator, method: str, size: int) -> np.ndarray:
    """Tokens, the wanted ones first."""
    center = features["center_atom"]
    resolved = np.flatnonzero(features["resolved"][center])
    if method == "contiguous" or not len(resolved):
        return _contiguous(features["asym_id"], random, size)
    places = features["coords"][center].astype(np.float64)
    candidates = resolved
    if method == "spatial_interface":
        touching = _touching(places[resolved], features["asym_id"][resolved])
        candidates = resolved[touching] if touching.any() else resolved
    distance = np.full(len(center), np.inf)
    distance[resolved] = np.linalg.norm(places[resolved] - places[random.choice(candidates)], axis=-1)
    return np.argsort(distance, kind="stable")


def _contiguous(chains: np.ndarray, random: np.random.Generator, size: int) -> np.ndarray:
    """One stretch of every chain, in random order, until there are enough (AlphaFold-Multimer, algorithm 1)."""
    names = random.permutation(np.unique(chains))
    taken, left, room = [], len(chains), size
    for name in names:
        tokens = np.flatnonzero(chains == name)
        left -= len(tokens)
        length = int(random.integers(min(len(tokens), max(0, room - left)), min(room, len(tokens)) + 1))
        start = int(random.integers(0, len(tokens) - length + 1))
        taken.append(tokens[start : start + length])
        room -= length
    return np.concatenate(taken)


def _touching(places: np.ndarray, chains: np.ndarray) -> np.ndarray:
    """Which of the places are within reach of another chain's."""
    touching = np.zeros(len(places), np.bool_)
    for start in range(0, len(places), 512):  # 512 rows at once: the whole matrix may be large
        rows = slice(start, start + 512)
        squared = ((places[rows, None] - places[None]) ** 2).sum(axis=-1)
        near = (squared < _INTERFACE**2) & (chains[rows, None] != chains[None])
        touching[rows] = near.any(axis=1)
    return touching
