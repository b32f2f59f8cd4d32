"""From a structure, its alignments and its templates to the arrays that the network reads."""

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlab.megafold.data.alignment import read_alignments, stack
from jaxlab.megafold.data.frames import atom_frames, valid_frames
from jaxlab.megafold.data.layout import Layout, lay_out
from jaxlab.megafold.data.structure import Structure
from jaxlab.megafold.data.synthetic import encode_name
from jaxlab.megafold.data.templates import BACKBONE, read_template, representative
from jaxlab.megafold.features import GAP, RESTYPES, UNKNOWN

Paths = Mapping[str, str | os.PathLike]
TemplatePaths = Mapping[str, Sequence[str | os.PathLike]]

_SUGAR = ("C1'", "C3'", "C4'")


@dataclasses.dataclass(frozen=True)
class Options:
    """What `featurize`'s `options` may hold; the defaults are the paper's code's.

    Attributes:
      max_msa_rows: cap on the alignment's rows, of all chains together; longer alignments share the room.
      max_msa_tokens: cap on rows times tokens.
      max_templates: how many templates of a chain are kept.
      ccd: a folder of component records to look in first; None: the library's.
    """

    max_msa_rows: int = 16384
    max_msa_tokens: int = 16_777_216
    max_templates: int = 20
    ccd: str | None = None

    def __post_init__(self):
        for name, least in (("max_msa_rows", 1), ("max_msa_tokens", 1), ("max_templates", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"options[{name!r}]: expected at least {least}, got {getattr(self, name)}")

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> "Options":
        """Checks the names.

        Raises:
          ValueError: an unknown name, with the nearest known one.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options or {}:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"options: unknown {name!r}; did you mean {near!r}? known: {known}")
        given = dict(options or {})
        if given.get("ccd") is not None:
            given["ccd"] = os.fspath(given["ccd"])
        return cls(**given)


def featurize(
    structure: Structure,
    *,
    msas: Paths | None = None,
    templates: TemplatePaths | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Makes all FEATURES of a structure, in their natural sizes.

    Args:
      structure: of a file, or of sequences alone; then nothing is resolved.
      msas: chain (the author's name) -> its A3M file. Chains of the same sequence share one; a polymer without any is
        its own alignment.
      templates: chain -> mmCIF files of templates; chains of the same sequence share them. The t-th templates
        of all chains are template t.
      options: see `Options`.

    Returns:
      Arrays with the types of FEATURES, but for `msa`, which stays int8 until `make_batch`.

    Raises:
      ValueError: an unknown option or chain, an alignment of another sequence, or no residue with known atoms.
      A3MError, MMCIFError: a broken file.
      DataUnavailable: a standard residue's record is nowhere.
      MissingExtra: gemmi is not installed.
    """
    chosen = Options.of(options)
    layout = lay_out(structure, chosen.ccd)
    features = _tokens(structure, layout)
    features |= _atoms(structure, layout)
    features |= _frames(structure, layout, features)
    entities = _entities(structure)
    places = _places(structure, layout, entities)
    tokens = len(layout.token_residue)
    features |= stack(
        features["restype"],
        places,
        read_alignments(msas or {}, structure, entities),
        max(1, min(chosen.max_msa_rows, chosen.max_msa_tokens // tokens)),
    )
    features |= _templates(structure, templates or {}, entities, places, tokens, chosen.max_templates)
    features["resolution"] = np.array(structure.resolution, np.float32)
    return features


def _entities(structure: Structure) -> list[int]:
    """The entity of each unit: kind and names of the residues."""
    known: dict[tuple[str, ...], int] = {}
    unit = structure.residue_unit
    return [
        known.setdefault((kind, *structure.residue_name[unit == number].tolist()), len(known))
        for number, kind in enumerate(structure.unit_kind)
    ]


def _tokens(structure: Structure, layout: Layout) -> dict[str, np.ndarray]:
    count = len(layout.token_residue)
    unit = structure.residue_unit[layout.token_residue]
    entities = _entities(structure)
    used = dict.fromkeys(unit.tolist())  # units that have tokens, in order: waters have none
    asym = {number: place for place, number in enumerate(used)}
    entity: dict[int, int] = {}
    copies: dict[int, int] = {}
    of_unit, copy_of_unit = {}, {}
    for number in used:
        of_unit[number] = entity.setdefault(entities[number], len(entity))
        copy_of_unit[number] = copies.get(entities[number], 0)
        copies[entities[number]] = copy_of_unit[number] + 1
    kinds = np.where(layout.standard, np.array(structure.unit_kind)[unit], "ligand")
    names = structure.residue_name[layout.token_residue].tolist()
    restype = [RESTYPES.index(name) if inside else UNKNOWN for name, inside in zip(names, layout.standard)]
    bonds = np.zeros((count, count), np.bool_)
    first, second = layout.token[layout.bonds].T
    bonds[first, second] = bonds[second, first] = True

    def each(table: dict[int, int]) -> np.ndarray:
        return np.array([table[number] for number in unit.tolist()], np.int32)

    return {
        "token_mask": np.ones(count, np.bool_),
        "asym_id": each(asym),
        "entity_id": each(of_unit),
        "sym_id": each(copy_of_unit),
        "residue_index": structure.residue_number[layout.token_residue].astype(np.int32),
        "token_index": np.arange(count, dtype=np.int32),
        "restype": np.array(restype, np.int32),
        **{f"is_{kind}": kinds == kind for kind in ("protein", "rna", "dna", "ligand")},
        "token_bonds": bonds,
    }


def _atoms(structure: Structure, layout: Layout) -> dict[str, np.ndarray]:
    count = len(layout.residue)
    resolved = layout.source >= 0
    coords = np.zeros((count, 3), np.float32)
    coords[resolved] = structure.coords[layout.source[resolved]]
    begins = np.append(True, np.diff(layout.residue) != 0)
    return {
        "atom_mask": np.ones(count, np.bool_),
        "atom_token": layout.token,
        "ref_pos": layout.ref_pos,
        "ref_charge": layout.charge,
        "ref_element": np.clip(layout.element, 0, 127),
        "ref_name": np.array([encode_name(name) for name in layout.name.tolist()], np.int32).reshape(count, 4),
        "ref_space": (np.cumsum(begins) - 1).astype(np.int32),
        "coords": coords,
        "resolved": resolved,
        "bonds": layout.bonds,
    }


def _frames(structure: Structure, layout: Layout, features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Central and representative atoms, and the three of each frame."""
    starts = np.searchsorted(layout.token, np.arange(len(layout.token_residue) + 1))
    center, frame = starts[:-1].astype(np.int32), np.repeat(starts[:-1, None], 3, axis=1).astype(np.int32)
    stands = center.copy()
    names = layout.name.tolist()
    residue_names = structure.residue_name[layout.token_residue].tolist()
    for token in np.flatnonzero(layout.standard).tolist():
        at = {names[atom]: atom for atom in range(starts[token], starts[token + 1])}
        protein = bool(features["is_protein"][token])
        center[token] = at["CA" if protein else "C1'"]
        stands[token] = at[representative(residue_names[token])]
        frame[token] = [at[name] for name in (BACKBONE if protein else _SUGAR)]
    single = np.flatnonzero(~layout.standard)
    for residue in dict.fromkeys(layout.token_residue[single].tolist()):
        tokens = single[layout.token_residue[single] == residue]
        atoms = starts[tokens]
        reference = features["ref_pos"][atoms]
        known = bool(reference.any())
        frame[tokens] = atoms[
            atom_frames(
                reference if known else features["coords"][atoms],
                np.ones(len(atoms), np.bool_) if known else features["resolved"][atoms],
            )
        ]
    return {
        "center_atom": center,
        "representative_atom": stands,
        "frame_atoms": frame,
        "has_frame": valid_frames(frame, features["coords"], features["resolved"]),
    }


def _places(
    structure: Structure, layout: Layout, entities: Sequence[int]
) -> dict[int, list[tuple[np.ndarray, np.ndarray]]]:
    """Of each polymer entity, for each of its chains: its tokens, and which residue of the polymer each is of."""
    places: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    unit = structure.residue_unit[layout.token_residue]
    for number in dict.fromkeys(unit.tolist()):
        if structure.unit_kind[number] != "ligand":
            tokens = np.flatnonzero(unit == number)
            first = np.searchsorted(structure.residue_unit, number)
            places.setdefault(entities[number], []).append((tokens, layout.token_residue[tokens] - first))
    return places


def _templates(
    structure: Structure,
    templates: TemplatePaths,
    entities: Sequence[int],
    places: Mapping[int, Sequence[tuple[np.ndarray, np.ndarray]]],
    tokens: int,
    most: int,
) -> dict[str, np.ndarray]:
    found: dict[int, list[Any]] = {}
    for chain, paths in templates.items():
        residues = structure.polymer(chain)
        if not len(residues):
            raise ValueError(f"templates: expected a polymer in chain {chain!r}, found none")
        if isinstance(paths, str | os.PathLike):
            raise ValueError(f"templates[{chain!r}]: expected a list of paths, got {paths!r}")
        entity = entities[structure.residue_unit[residues[0]]]
        sequence = structure.residue_name[residues].tolist()
        found.setdefault(entity, [read_template(path, sequence) for path in list(paths)[:most]])
    count = max(map(len, found.values()), default=0)
    made = {
        "template_mask": np.ones(count, np.bool_),
        "template_restype": np.full((count, tokens), GAP, np.int32),
        "template_pos": np.zeros((count, tokens, 3), np.float32),
        "template_pos_mask": np.zeros((count, tokens), np.bool_),
        "template_frame": np.zeros((count, tokens, 3, 3), np.float32),
        "template_frame_mask": np.zeros((count, tokens), np.bool_),
    }
    for entity, each in found.items():
        for number, template in enumerate(each):
            for at, residues in places[entity]:
                for name in ("restype", "pos", "pos_mask", "frame", "frame_mask"):
                    made[f"template_{name}"][number, at] = getattr(template, name)[residues]
    return made
