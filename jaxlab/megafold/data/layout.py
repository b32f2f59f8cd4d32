"""Atoms and tokens of a structure as the network counts them: what is there, whether the file shows it or not.

A standard residue of a polymer has the heavy atoms of its component that stay in a chain (so no OXT, no OP3), and is
one token. Any other residue is one token an atom: with a component's record, its atoms but for leaving ones that
the file does not show; without, the atoms that the file shows, their reference positions zero (never the true ones),
and the file's bonds, or those that the covalent radii suggest. Waters and hydrogens are left out, and so is what has
neither record nor atoms.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxlab.core.errors import require
from jaxlab.megafold.data.components import atomic_numbers, find_component
from jaxlab.megafold.data.structure import HYDROGEN, WATER, Structure
from jaxlab.megafold.features import RESTYPES

_SLACK = 0.4  # Å over the sum of two covalent radii that still is a bond
_LINKS = {"protein": ("C", "N"), "dna": ("O3'", "P"), "rna": ("O3'", "P")}


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """The atoms A of the tokens N.

    Attributes:
      residue: of the structure, of each atom.
      name: of each atom.
      element: its atomic number.
      source: the atom of the structure; -1 where the file does not show it.
      charge: of each atom.
      ref_pos: its place in the reference conformer, Å.
      token: which each atom belongs to.
      token_residue: of the structure, of each token.
      standard: whether a token is a standard residue.
      bonds: pairs of atoms, to or inside what is not a standard residue.
    """

    residue: Int[np.ndarray, " A"]
    name: np.ndarray
    element: Int[np.ndarray, " A"]
    source: Int[np.ndarray, " A"]
    charge: Float[np.ndarray, " A"]
    ref_pos: Float[np.ndarray, "A 3"]
    token: Int[np.ndarray, " A"]
    token_residue: Int[np.ndarray, " N"]
    standard: Bool[np.ndarray, " N"]
    bonds: Int[np.ndarray, "E 2"]


def lay_out(structure: Structure, ccd: str | None = None) -> Layout:
    """Lays a structure out; `ccd` is the folder of component records to look in first.

    Raises:
      ValueError: it has no residue but waters, or none with known atoms.
      DataUnavailable: a standard residue's record is nowhere.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("residue", "name", "element", "source", "charge", "ref_pos")}
    sizes, residues, standards = [], [], []
    numbers = atomic_numbers(structure.element) if len(structure.element) else structure.residue
    names, elements = structure.atom_name.tolist(), structure.element.tolist()
    bounds = np.searchsorted(structure.residue, np.arange(len(structure.residue_name) + 1)).tolist()
    flexible: list[int] = []
    for index, component_name in enumerate(structure.residue_name.tolist()):
        if component_name in WATER:
            continue
        atoms = {names[at]: at for at in range(*bounds[index : index + 2]) if elements[at] not in HYDROGEN}
        standard = bool(structure.residue_polymer[index]) and component_name in RESTYPES
        component = find_component(component_name, ccd)
        if component is None:
            kept, shown = list(atoms), np.array(list(atoms.values()), np.int64)
            count = len(kept)
            element = numbers[shown].tolist()
            charge, positions, source = [0.0] * count, np.zeros((count, 3), np.float32), list(atoms.values())
        else:
            absent = structure.residue_polymer[index] or bool(atoms)
            stays = (
                ~component.leaving
                if standard
                else np.array(
                    [
                        not (leaves and absent) or name in atoms
                        for name, leaves in zip(component.names, component.leaving)
                    ]
                )
            )
            places = np.flatnonzero(stays)
            kept, element = [component.names[at] for at in places], component.elements[places].tolist()
            charge, positions = component.charges[places].tolist(), component.positions[places]
            source = [atoms.get(name, -1) for name in kept]
        if not kept:
            continue
        columns["residue"] += [index] * len(kept)
        for column, value in zip(("name", "element", "source", "charge"), (kept, element, source, charge)):
            columns[column] += value
        columns["ref_pos"].append(positions)
        count = 1 if standard else len(kept)
        sizes += [len(kept)] if standard else [1] * count
        residues += [index] * count
        standards += [standard] * count
        if not standard:
            flexible.append(index)
    if not residues:
        raise ValueError(
            "structure: expected residues with known atoms, got none (a ligand may need its record in `ccd`)"
        )
    residue = np.array(columns["residue"], np.int32)
    return Layout(
        residue=residue,
        name=np.array(columns["name"], np.str_),
        element=np.array(columns["element"], np.int32),
        source=np.array(columns["source"], np.int32),
        charge=np.array(columns["charge"], np.float32),
        ref_pos=np.concatenate(columns["ref_pos"]).astype(np.float32),
        token=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        token_residue=np.array(residues, np.int32),
        standard=np.array(standards, np.bool_),
        bonds=_bonds(structure, residue, columns, flexible, ccd),
    )


def _bonds(
    structure: Structure, residue: np.ndarray, columns: dict[str, list[Any]], flexible: list[int], ccd: str | None
) -> Int[np.ndarray, "E 2"]:
    """Bonds inside every residue that is not standard, between it and its neighbours, and those the file lists."""
    if not flexible:
        return np.zeros((0, 2), np.int32)
    where = {key: atom for atom, key in enumerate(zip(columns["residue"], columns["name"]))}
    pairs: list[tuple[int | None, int | None]] = []
    for index in flexible:
        name = str(structure.residue_name[index])
        component = find_component(name, ccd)
        listed = component.bonds if component is not None else structure.component_bonds.get(name)
        if listed is not None:
            pairs += [(where.get((index, first)), where.get((index, second))) for first, second in listed]
        else:
            pairs += _near(structure, np.flatnonzero(residue == index), columns)
    single = set(flexible)
    for (first, one), (second, other) in structure.bonds:
        if first in single or second in single:
            pairs.append((where.get((first, one)), where.get((second, other))))
    for first in range(len(structure.residue_name) - 1):
        second = first + 1
        if (first in single or second in single) and _joined(structure, first, second):
            one, other = _LINKS[structure.unit_kind[structure.residue_unit[first]]]
            pairs.append((where.get((first, one)), where.get((second, other))))
    there = {(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None}
    return np.array(sorted(there), np.int32).reshape(-1, 2)


def _joined(structure: Structure, first: int, second: int) -> bool:
    """Whether two residues are neighbours in one polymer."""
    return bool(
        structure.residue_polymer[first]
        and structure.residue_unit[first] == structure.residue_unit[second]
        and structure.residue_number[second] == structure.residue_number[first] + 1
    )


def _near(structure: Structure, atoms: np.ndarray, columns: dict[str, list[Any]]) -> list[tuple[int, int]]:
    """Pairs of a residue's atoms no farther apart than their covalent radii, and a little, allow."""
    element = require("gemmi", "folding").Element
    places = structure.coords[[columns["source"][atom] for atom in atoms]]
    radii = [element(columns["element"][atom]).covalent_r for atom in atoms]
    return [
        (int(atoms[i]), int(atoms[j]))
        for i, j in itertools.combinations(range(len(atoms)), 2)
        if np.linalg.norm(places[i] - places[j]) < radii[i] + radii[j] + _SLACK
    ]


def with_coords(
    structure: Structure, coords: Float[np.ndarray, "A 3"], b_factor: Float[np.ndarray, " A"], ccd: str | None = None
) -> Structure:
    """The structure with the atoms of its features, at other places: a prediction, ready for `write_mmcif`.

    Args:
      structure: what was featurized.
      coords: of the atoms of its features, uncropped and without padding, Å.
      b_factor: of the same atoms, such as the pLDDT.
      ccd: as in `featurize`'s options.

    Raises:
      ValueError: another number of atoms than its features have.
    """
    layout = lay_out(structure, ccd)
    count = len(layout.residue)
    if coords.shape != (count, 3) or b_factor.shape != (count,):
        raise ValueError(
            f"coords, b_factor: expected shapes {(count, 3)} and {(count,)}, got {coords.shape} and {b_factor.shape}"
        )
    element = require("gemmi", "folding").Element
    return dataclasses.replace(
        structure,
        coords=np.asarray(coords, np.float32),
        atom_name=layout.name,
        res_name=structure.residue_name[layout.residue],
        chain_id=structure.residue_chain[layout.residue],
        element=np.array([element(int(number)).name.upper() for number in layout.element], np.str_),
        b_factor=np.asarray(b_factor, np.float32),
        occupancy=np.ones(count, np.float32),
        residue=layout.residue,
    )
