"""A made-up structure with everything a batch can have, for tests and for where no data is."""

import jax
import numpy as np

from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.data.frames import atom_frames, valid_frames
from jaxlab.megafold.features import FEATURES, GAP, RESTYPES, abstract_batch

# Backbone and one more atom: N CA C O CB, or C1' C3' C4' P C4, on one made-up shape, Å.
_SHAPE = np.array([[-0.53, 1.36, 0.0], [0.0, 0.0, 0.0], [1.53, 0.0, 0.0], [2.15, -1.06, 0.0], [-0.52, -0.77, -1.2]])
_NAMES = {True: ("N", "CA", "C", "O", "CB"), False: ("C1'", "C3'", "C4'", "P", "C4")}
_ELEMENTS = {True: (7, 6, 6, 8, 6), False: (6, 6, 6, 15, 6)}
_STEP = 3.8


def key_generator(key: jax.Array) -> np.random.Generator:
    """NumPy's generator of a JAX key: the same key, the same numbers."""
    data = jax.random.key_data(key) if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return np.random.default_rng(np.asarray(data).ravel().tolist())


def encode_name(name: str) -> list[int]:
    """The four numbers of an atom's name in `ref_name`."""
    return [min(max(ord(letter) - 32, 0), 63) for letter in name[:4].upper().ljust(4)]


def synthetic_batch(config: AF3Config, key: jax.Array) -> dict[str, np.ndarray]:
    """A batch of one structure: two copies of a random-walk protein, a DNA strand, a ligand, an ion, and padding.

    An eighth of the tokens is ligand, an eighth padding; residues have five atoms, one in twenty atoms is unresolved;
    half of the alignment's rows and one template are there. Positions are made up, distances are a molecule's.

    Args:
      config: its sizes are the arrays'; at least 16 tokens, and 5 atoms a token.
      key: decides everything.

    Returns:
      All `FEATURES`, each with an axis of one before it.

    Raises:
      ValueError: the configuration has no room for it.
    """
    if config.max_tokens < 16 or config.max_atoms < 5 * config.max_tokens:
        raise ValueError(
            "config: expected max_tokens >= 16 and max_atoms >= 5 * max_tokens, "
            f"got {config.max_tokens} and {config.max_atoms}"
        )
    random = key_generator(key)
    ligand = config.max_tokens // 8
    copy = config.max_tokens * 5 // 16
    strand = config.max_tokens - 2 * copy - 2 * ligand
    chains = [("protein", copy), ("protein", copy), ("dna", strand), ("ligand", ligand - 1), ("ion", 1)]
    shapes = abstract_batch(config)
    batch = {name: np.full(shapes[name].shape, feature.pad, feature.dtype) for name, feature in FEATURES.items()}
    one = {name: array[0, ...] for name, array in batch.items()}  # views: what is written here is in the batch
    protein = random.integers(0, 20, copy)
    protein[: copy // 8 + 1] = RESTYPES.index("GLY")
    types = {"protein": protein, "dna": random.integers(RESTYPES.index("DA"), RESTYPES.index("DN"), strand)}
    token = atom = 0
    place = np.zeros(3)
    for asym, (kind, length) in enumerate(chains):
        here = slice(token, token + length)
        residues = kind in types
        one["token_mask"][here] = True
        one["asym_id"][here] = asym
        one["entity_id"][here] = max(asym - 1, 0)
        one["sym_id"][here] = int(asym == 1)
        one["residue_index"][here] = np.arange(1, length + 1) if residues else 1
        one["is_ligand" if not residues else f"is_{kind}"][here] = True
        if residues:
            one["restype"][here] = types[kind]
        first_atom = atom
        for index in range(length):
            step = random.normal(size=3)
            place = place + step / np.linalg.norm(step) * (_STEP if residues else 1.5)
            shape, names, elements = np.zeros((1, 3)), (f"C{index + 1}",), (6,)
            if residues:
                glycine = kind == "protein" and types[kind][index] == RESTYPES.index("GLY")
                atoms = slice(0, 4 if glycine else 5)
                shape, names, elements = (
                    _SHAPE[atoms],
                    _NAMES[kind == "protein"][atoms],
                    _ELEMENTS[kind == "protein"][atoms],
                )
                axes = np.linalg.qr(random.normal(size=(3, 3)))[0]
                one["center_atom"][token] = atom + (1 if kind == "protein" else 0)
                one["representative_atom"][token] = atom + (1 if glycine else 4)
                one["frame_atoms"][token] = atom + np.arange(3)
            else:
                axes = np.eye(3)
                one["center_atom"][token] = one["representative_atom"][token] = atom
            span = slice(atom, atom + len(names))
            one["atom_token"][span] = token
            one["ref_pos"][span] = shape if residues else place
            one["ref_element"][span] = elements if kind != "ion" else 12
            one["ref_name"][span] = [encode_name(name if kind != "ion" else "MG") for name in names]
            one["ref_space"][span] = token if residues else token - index
            one["ref_charge"][span] = 2.0 if kind == "ion" else 0.0
            one["coords"][span] = place + shape @ (axes * np.sign(np.linalg.det(axes)))
            token, atom = token + 1, atom + len(names)
        if kind == "ligand":
            pairs = np.stack([np.arange(length - 1), np.arange(1, length)], axis=1)
            one["bonds"][: length - 1] = first_atom + pairs
            one["token_bonds"][tuple((here.start + pairs).T)] = True
            one["frame_atoms"][here] = first_atom + atom_frames(
                one["ref_pos"][first_atom:atom], np.ones(length, np.bool_)
            )
        elif kind == "ion":
            one["frame_atoms"][here] = first_atom
    one["token_bonds"] |= one["token_bonds"].T
    one["token_index"][:token] = np.arange(token)
    one["atom_mask"][:atom] = True
    one["resolved"][:atom] = random.random(atom) > 0.05
    one["coords"] *= one["resolved"][:, None]
    one["has_frame"][:token] = valid_frames(one["frame_atoms"][:token], one["coords"], one["resolved"])
    _align(one, random, token)
    one["resolution"][...] = 2.0
    return batch


def _align(one: dict[str, np.ndarray], random: np.random.Generator, tokens: int) -> None:
    """Mutated rows under the sequence, and the structure itself as a template of its first chain."""
    rows = max(1, one["msa"].shape[0] // 2)
    msa = np.repeat(one["restype"][None, :tokens], rows, axis=0)
    residue = one["is_protein"][:tokens]
    msa[1:] = np.where((random.random(msa[1:].shape) < 0.3) & residue, random.integers(0, 20, msa[1:].shape), msa[1:])
    msa[1:] = np.where((random.random(msa[1:].shape) < 0.1) | ~residue, GAP, msa[1:])
    deletions = np.where(random.random(msa.shape) < 0.05, random.integers(1, 5, msa.shape), 0)
    deletions[0] = 0
    one["msa"][:rows, :tokens] = msa
    one["msa_mask"][:rows, :tokens] = True
    one["deletion_value"][:rows, :tokens] = 2 / np.pi * np.arctan(deletions / 3)
    one["profile"][:tokens] = np.eye(32)[msa].mean(axis=0)
    one["deletion_mean"][:tokens] = deletions.mean(axis=0)
    first = np.flatnonzero(one["token_mask"] & (one["asym_id"] == 0))
    one["template_mask"][0] = True
    one["template_restype"][0, first] = one["restype"][first]
    representative, frame = one["representative_atom"][first], one["frame_atoms"][first]
    one["template_pos"][0, first] = one["coords"][representative]
    one["template_pos_mask"][0, first] = one["resolved"][representative]
    one["template_frame"][0, first] = one["coords"][frame]
    one["template_frame_mask"][0, first] = one["resolved"][frame].all(axis=1)
