"""Templates: known structures laid over a chain by sequence."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from jaxlab.core.errors import require
from jaxlab.megafold.data.mmcif import read_mmcif
from jaxlab.megafold.data.structure import Structure
from jaxlab.megafold.features import GAP, RESTYPES

BACKBONE = ("N", "CA", "C")


@dataclasses.dataclass(frozen=True, eq=False)
class ChainTemplate:
    """A template over the residues L of a polymer: `restype` [L], `pos` [L, 3], `frame` [L, 3, 3] (N, CA, C), masks."""

    restype: np.ndarray
    pos: np.ndarray
    pos_mask: np.ndarray
    frame: np.ndarray
    frame_mask: np.ndarray


def representative(name: str) -> str:
    """The atom that stands for a standard residue: CB (CA of GLY), C4 of a purine, C2 of a pyrimidine, else C1'."""
    if name in RESTYPES[:21]:
        return "CA" if name == "GLY" else "CB"
    return {"A": "C4", "G": "C4", "C": "C2", "U": "C2", "T": "C2"}.get(name[-1], "C1'")


def read_template(path: str | os.PathLike, sequence: Sequence[str]) -> ChainTemplate:
    """Lays the most alike protein chain of a file over a sequence.

    Args:
      path: mmCIF, plain or gzip-compressed.
      sequence: names of residues, such as "ALA".

    Raises:
      MMCIFError: no structure.
      ValueError: it has no protein.
    """
    structure = read_mmcif(path)
    proteins = {unit for unit, kind in enumerate(structure.unit_kind) if kind == "protein"}
    best: tuple[int, list[tuple[int, int]]] | None = None
    for chain in structure.chains:
        residues = structure.polymer(chain)
        residues = residues[[unit in proteins for unit in structure.residue_unit[residues].tolist()]]
        if not len(residues):
            continue
        pairs = [
            (at, int(residues[other])) for at, other in aligned(sequence, structure.residue_name[residues].tolist())
        ]
        alike = sum(sequence[at] == structure.residue_name[other] for at, other in pairs)
        if best is None or alike > best[0]:
            best = alike, pairs
    if best is None:
        raise ValueError(f"templates: expected a protein in {os.fspath(path)}, found none")
    return _gather(structure, best[1], len(sequence))


def aligned(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of places, one in each sequence of residues' names, that a global alignment (BLOSUM62) puts together."""
    gemmi = require("gemmi", "folding")
    result = gemmi.align_string_sequences(list(first), list(second), [], gemmi.AlignmentScoring("b"))
    pairs, i, j = [], 0, 0
    for one, other in zip(result.add_gaps("X" * len(first), 1), result.add_gaps("X" * len(second), 2)):
        if one != "-" and other != "-":
            pairs.append((i, j))
        i, j = i + (one != "-"), j + (other != "-")
    return pairs


def _gather(structure: Structure, pairs: list[tuple[int, int]], length: int) -> ChainTemplate:
    made = ChainTemplate(
        np.full(length, GAP, np.int32),
        np.zeros((length, 3), np.float32),
        np.zeros(length, np.bool_),
        np.zeros((length, 3, 3), np.float32),
        np.zeros(length, np.bool_),
    )
    bounds = np.searchsorted(structure.residue, np.arange(len(structure.residue_name) + 1)).tolist()
    names = structure.atom_name.tolist()
    for at, residue in pairs:
        name = str(structure.residue_name[residue])
        if name not in RESTYPES[:20]:
            continue
        atoms = {names[atom]: atom for atom in range(*bounds[residue : residue + 2])}
        if not atoms:
            continue
        made.restype[at] = RESTYPES.index(name)
        if (place := atoms.get(representative(name))) is not None:
            made.pos[at], made.pos_mask[at] = structure.coords[place], True
        if all(atom in atoms for atom in BACKBONE):
            made.frame[at], made.frame_mask[at] = structure.coords[[atoms[atom] for atom in BACKBONE]], True
    return made
