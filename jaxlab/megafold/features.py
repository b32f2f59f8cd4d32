"""The features of a structure: names, shapes and types, which the data pipeline makes and the network reads.

`featurize` makes the arrays in their natural sizes, `crop` cuts them, `make_batch` pads them to a configuration's sizes
and puts a batch axis first. Sizes: tokens N, atoms A, alignment rows S, templates T, bonds between atoms E.

A token is one residue of a polymer, or one atom of anything else (ligands, ions, modified residues); `token_index`
counts them before the crop. The atoms of a token lie side by side, in token order. An atom that the
file does not show is there all the same, unresolved.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import jax
import numpy as np

from jaxlab.megafold.config import AF3Config

RESTYPES = (
    *("ALA", "ARG", "ASN", "ASP", "CYS", "GLN", "GLU", "GLY", "HIS", "ILE"),
    *("LEU", "LYS", "MET", "PHE", "PRO", "SER", "THR", "TRP", "TYR", "VAL"),
    "UNK",  # also every token that is not a residue of a polymer
    *("A", "G", "C", "U", "N"),
    *("DA", "DG", "DC", "DT", "DN"),
    "-",
)
UNKNOWN, GAP = RESTYPES.index("UNK"), RESTYPES.index("-")


@dataclasses.dataclass(frozen=True)
class Feature:
    """One array: its axes (letters are sizes of the batch, numbers are fixed), its type, what pads it."""

    axes: tuple[str | int, ...]
    dtype: type
    pad: int | float = 0


FEATURES: Mapping[str, Feature] = MappingProxyType(
    {
        # tokens
        "token_mask": Feature(("N",), np.bool_),
        "asym_id": Feature(("N",), np.int32),  # chain
        "entity_id": Feature(("N",), np.int32),  # sequence: equal chains share it
        "sym_id": Feature(("N",), np.int32),  # which copy of the entity
        "residue_index": Feature(("N",), np.int32),
        "token_index": Feature(("N",), np.int32),
        "restype": Feature(("N",), np.int32, UNKNOWN),  # index into RESTYPES
        "is_protein": Feature(("N",), np.bool_),
        "is_rna": Feature(("N",), np.bool_),
        "is_dna": Feature(("N",), np.bool_),
        "is_ligand": Feature(("N",), np.bool_),  # everything else
        "token_bonds": Feature(("N", "N"), np.bool_),  # symmetric; bonds to or inside ligands, not the polymer's own
        "center_atom": Feature(("N",), np.int32),  # CA, C1', or the atom itself
        "representative_atom": Feature(("N",), np.int32),  # CB (CA of GLY), C4 of purines, C2 of pyrimidines, or itself
        "frame_atoms": Feature(("N", 3), np.int32),  # N CA C; C1' C3' C4'; for an atom: its nearest two beside it
        "has_frame": Feature(("N",), np.bool_),  # all three resolved, and not in line
        # atoms
        "atom_mask": Feature(("A",), np.bool_),
        "atom_token": Feature(("A",), np.int32),  # the token it belongs to
        "ref_pos": Feature(("A", 3), np.float32),  # reference conformer, Å; zero where none is known
        "ref_charge": Feature(("A",), np.float32),
        "ref_element": Feature(("A",), np.int32),  # atomic number, 0 .. 127
        "ref_name": Feature(("A", 4), np.int32),  # characters of the name, code - 32, 0 .. 63
        "ref_space": Feature(("A",), np.int32, -1),  # atoms of one conformer share it
        "coords": Feature(("A", 3), np.float32),  # the truth, Å; zero where unresolved
        "resolved": Feature(("A",), np.bool_),
        "bonds": Feature(("E", 2), np.int32, -1),  # atoms of the bonds in token_bonds, each once
        # alignment
        "msa": Feature(
            ("S", "N"), np.int32, GAP
        ),  # index into RESTYPES; row 0 is the sequence; int8 before `make_batch`
        "msa_mask": Feature(("S", "N"), np.bool_),
        "deletion_value": Feature(("S", "N"), np.float32),  # (2/pi) arctan(d/3) of the deletions before a residue
        "profile": Feature(("N", 32), np.float32),  # of the whole alignment, before it is sampled
        "deletion_mean": Feature(("N",), np.float32),
        # templates
        "template_mask": Feature(("T",), np.bool_),
        "template_restype": Feature(("T", "N"), np.int32, GAP),
        "template_pos": Feature(("T", "N", 3), np.float32),  # representative atoms, Å
        "template_pos_mask": Feature(("T", "N"), np.bool_),
        "template_frame": Feature(("T", "N", 3, 3), np.float32),  # N, CA, C, Å
        "template_frame_mask": Feature(("T", "N"), np.bool_),
        # the whole
        "resolution": Feature((), np.float32),  # Å; 0 where unknown
    }
)


def sizes(config: AF3Config) -> dict[str, int]:
    """Size of each lettered axis in a batch of this configuration; rings may have more bonds than tokens."""
    return {
        "N": config.max_tokens,
        "A": config.max_atoms,
        "S": config.max_msa_rows,
        "T": config.max_templates,
        "E": 2 * config.max_tokens,
    }


def abstract_batch(config: AF3Config, batch_size: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a batch, to compile for."""
    size = sizes(config)

    def shape(feature: Feature) -> tuple[int, ...]:
        return (batch_size, *(size[axis] if isinstance(axis, str) else axis for axis in feature.axes))

    return {name: jax.ShapeDtypeStruct(shape(feature), feature.dtype) for name, feature in FEATURES.items()}
