"""Sequences to fold: FASTA, and the JSON jobs of AlphaFold3."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.megafold.data.mmcif import unit_name
from jaxlab.megafold.data.structure import ONE_LETTER, End, Structure
from jaxlab.megafold.features import RESTYPES

_UNKNOWN = {"protein": "UNK", "rna": "N", "dna": "DN"}
_STANDARD = {"protein": RESTYPES[:20], "rna": ("A", "G", "C", "U"), "dna": ("DA", "DG", "DC", "DT")}
_FIELDS = {
    **{
        kind: {"id", "sequence", "modifications", "unpairedMsaPath", "description"}
        for kind in ("protein", "rna", "dna")
    },
    "ligand": {"id", "ccdCodes", "description"},
}


@dataclasses.dataclass(frozen=True)
class Chain:
    """One molecule of a job: its name, its kind ("protein", "rna", "dna" or "ligand"), and its residues' names."""

    name: str
    kind: str
    residues: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What is to be folded.

    Attributes:
      name: of the job.
      structure: its molecules, without coordinates.
      seeds: one prediction each.
      msas: A3M files by chain, for `featurize`.
    """

    name: str
    structure: Structure
    seeds: tuple[int, ...] = (0,)
    msas: Mapping[str, Path] = dataclasses.field(default_factory=dict)


def residues_of(sequence: str, kind: str) -> tuple[str, ...]:
    """The residues that a sequence's letters stand for; letters without one are unknown residues.

    Raises:
      ValueError: an unknown kind, no letters, or something else than letters.
    """
    if kind not in _STANDARD:
        raise ValueError(f"kind: expected one of {sorted(_STANDARD)}, got {kind!r}")
    letters = "".join(sequence.split()).upper()
    if not (letters.isascii() and letters.isalpha()):
        raise ValueError(f"sequence: expected letters, got {letters[:40]!r}")
    names = {ONE_LETTER[name]: name for name in _STANDARD[kind]}
    return tuple(names.get(letter, _UNKNOWN[kind]) for letter in letters)


def from_sequences(
    chains: Mapping[str, str] | Sequence[Chain],
    *,
    bonds: Sequence[tuple[tuple[str, int, str], tuple[str, int, str]]] = (),
) -> Structure:
    """A structure without coordinates.

    Args:
      chains: protein sequences by name, or molecules.
      bonds: covalent bonds between residues; each end is chain, residue (from 1) and atom.

    Raises:
      ValueError: no chain, a chain without residues or named twice, an unknown kind, or a bond to what is not there.
    """
    if isinstance(chains, Mapping):
        chains = [Chain(name, "protein", residues_of(sequence, "protein")) for name, sequence in chains.items()]
    if not chains:
        raise ValueError("chains: expected at least one, got none")
    first: dict[str, int] = {}
    count = 0
    for chain in chains:
        if chain.name in first or not chain.name:
            raise ValueError(f"chains: expected a name of its own for each, got {chain.name!r} twice or none")
        if not chain.residues or chain.kind not in (*_STANDARD, "ligand"):
            raise ValueError(f"chains: expected residues of a known kind, got {chain}")
        first[chain.name] = count
        count += len(chain.residues)
    sizes = {chain.name: len(chain.residues) for chain in chains}

    def end(chain: str, residue: int, atom: str) -> End:
        if chain not in first or not 1 <= residue <= sizes[chain]:
            raise ValueError(f"bonds: expected residues of {sizes}, got {residue} of {chain!r}")
        return first[chain] + residue - 1, atom

    lengths = [len(chain.residues) for chain in chains]
    none = np.array([], np.str_)
    return Structure(
        coords=np.zeros((0, 3), np.float32),
        atom_name=none,
        res_name=none,
        chain_id=none,
        element=none,
        b_factor=np.zeros(0, np.float32),
        occupancy=np.zeros(0, np.float32),
        residue=np.zeros(0, np.int32),
        residue_name=np.array([name for chain in chains for name in chain.residues], np.str_),
        residue_chain=np.repeat([chain.name for chain in chains], lengths),
        residue_unit=np.repeat(np.arange(len(chains), dtype=np.int32), lengths),
        residue_number=np.concatenate([np.arange(1, length + 1, dtype=np.int32) for length in lengths]),
        residue_polymer=np.repeat([chain.kind != "ligand" for chain in chains], lengths),
        unit_kind=tuple(chain.kind for chain in chains),
        bonds=tuple((end(*one), end(*other)) for one, other in bonds),
    )


def read_job(path: str | os.PathLike) -> Job:
    """Reads a job: FASTA, or AlphaFold3's JSON (by its first character).

    FASTA: `>name` or `>name|kind`, kind being protein (default), rna, dna or ligand; a ligand's sequence is the names
    of its components, separated by commas. A chain is named after its record where that is a word of at most four
    letters and digits, else A, B, ... JSON: molecules protein, rna, dna (`id`, `sequence`, `modifications`,
    `unpairedMsaPath`) and ligand (`id`, `ccdCodes`), `modelSeeds`, `bondedAtomPairs`; paths are relative to the file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: what cannot be read, or is not supported (SMILES, alignments inside the file); names file and field.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        return _json(text, path) if text.lstrip()[:1] in ("{", "[") else _fasta(text, path)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error


def _fasta(text: str, path: Path) -> Job:
    chains = []
    for record in text.split(">")[1:]:
        header, _, body = record.partition("\n")
        name, _, kind = (part.strip() for part in header.partition("|"))
        kind = kind.lower() or "protein"
        if kind not in _FIELDS:  # a database's header, with bars of its own
            name, kind = "", "protein"
        name = name if name.isalnum() and len(name) <= 4 else unit_name(len(chains))
        components = tuple(part.strip().upper() for part in body.split(",")) if kind == "ligand" else ()
        chains.append(Chain(name, kind, components or residues_of(body, kind)))
    if not chains or text.lstrip()[:1] != ">":
        raise ValueError("expected FASTA records ('>'), or JSON")
    return Job(path.stem, from_sequences(chains))


def _json(text: str, path: Path) -> Job:
    content = json.loads(text)
    content = content[0] if isinstance(content, list) and len(content) == 1 else content
    if not isinstance(content, dict) or not isinstance(content.get("sequences"), list):
        raise ValueError("expected an object with a list `sequences`")
    chains: list[Chain] = []
    msas: dict[str, Path] = {}
    for place, molecule in enumerate(content["sequences"]):
        where = f"sequences[{place}]"
        if not isinstance(molecule, dict) or len(molecule) != 1 or next(iter(molecule)) not in _FIELDS:
            raise ValueError(f"{where}: expected one of {sorted(_FIELDS)}, got {molecule!r}")
        ((kind, fields),) = molecule.items()
        unknown = {name for name, value in fields.items() if value not in (None, "", [])} - _FIELDS[kind]
        if unknown:
            raise ValueError(f"{where}.{kind}: expected {sorted(_FIELDS[kind])}, got {sorted(unknown)}")
        names = fields["id"] if isinstance(fields["id"], list) else [fields["id"]]
        for name in names:
            chains.append(Chain(name, kind, _residues(fields, kind, where)))
            if fields.get("unpairedMsaPath"):
                msas[name] = path.parent / fields["unpairedMsaPath"]
    bonds = [((a[0], a[1], a[2]), (b[0], b[1], b[2])) for a, b in content.get("bondedAtomPairs") or []]
    seeds = tuple(int(seed) for seed in content.get("modelSeeds") or [0])
    return Job(str(content.get("name") or path.stem), from_sequences(chains, bonds=bonds), seeds, msas)


def _residues(fields: Mapping[str, Any], kind: str, where: str) -> tuple[str, ...]:
    if kind == "ligand":
        return tuple(fields["ccdCodes"])
    residues = list(residues_of(fields["sequence"], kind))
    for change in fields.get("modifications") or []:
        name = change["ptmType"] if kind == "protein" else change["modificationType"]
        position = change["ptmPosition"] if kind == "protein" else change["basePosition"]
        if not 1 <= position <= len(residues):
            raise ValueError(f"{where}.{kind}.modifications: expected positions 1 .. {len(residues)}, got {position}")
        residues[position - 1] = name
    return tuple(residues)
