"""Alignments of chains to one alignment of all tokens."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxlab.megafold.data.a3m import MSA, parse_a3m
from jaxlab.megafold.data.structure import ONE_LETTER, Structure
from jaxlab.megafold.features import GAP, RESTYPES

_UNSURE = {"B": "ASP", "U": "CYS", "Z": "GLU"}  # as AlphaFold3 counts them; J, O and X are unknown


def _codes(kind: str) -> Int[np.ndarray, " 256"]:
    """Letter to index into RESTYPES."""
    standard = {
        "protein": RESTYPES[:20],
        "rna": [name for name in ONE_LETTER if name in ("A", "G", "C", "U")],
        "dna": [name for name in ONE_LETTER if name in ("DA", "DG", "DC", "DT")],
    }[kind]
    unknown = {"protein": "UNK", "rna": "N", "dna": "DN"}[kind]
    codes = np.full(256, RESTYPES.index(unknown), np.int8)
    for name in standard:
        codes[ord(ONE_LETTER[name])] = RESTYPES.index(name)
    if kind == "protein":
        for letter, name in _UNSURE.items():
            codes[ord(letter)] = RESTYPES.index(name)
    codes[ord("-")] = GAP
    return codes


@dataclasses.dataclass(frozen=True, eq=False)
class ChainAlignment:
    """An alignment of one polymer: rows R without the query, residues L; a column that the query lacks is all gaps.

    Attributes:
      rows: indices into RESTYPES.
      deletions: residues inserted before each column.
    """

    rows: Int[np.ndarray, "R L"]
    deletions: Int[np.ndarray, "R L"]


def read_alignment(path: str | os.PathLike, structure: Structure, chain: str) -> ChainAlignment:
    """Reads a chain's alignment; its query is the chain's sequence, the whole or what the file shows of it.

    Non-standard residues at the ends (ACE, NH2) may be absent from the query; any letter may stand for one.

    Raises:
      ValueError: the query is another sequence, or there is no such chain.
      A3MError: no alignment.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        msa = parse_a3m(file.read(), file=path)
    residues = structure.polymer(chain)
    kinds = {structure.unit_kind[unit] for unit in structure.residue_unit[residues]}
    if len(kinds) != 1:
        raise ValueError(f"msas: expected a polymer in chain {chain!r}, got {sorted(kinds) or 'none'}")
    columns = _columns(msa, structure, chain, residues, os.fspath(path))
    letters = msa.letters()[1:]
    shape = (len(letters), len(residues))
    rows, deletions = np.full(shape, GAP, np.int8), np.zeros(shape, np.int32)
    rows[:, columns] = _codes(kinds.pop())[letters]
    deletions[:, columns] = msa.deletions[1:]
    return ChainAlignment(rows, deletions)


def _columns(msa: MSA, structure: Structure, chain: str, residues: np.ndarray, file: str) -> slice | np.ndarray:
    """Which of the residues the query's columns are."""
    query = msa.sequences[0].upper()
    everything = np.arange(len(residues))
    for candidates in (everything, everything[structure.observed[residues]]):
        sequence = structure.letters(residues[candidates])
        start = len(sequence) - len(sequence.lstrip("X"))
        end = len(sequence.rstrip("X"))
        for first, last in ((0, len(sequence)), (start, end), (0, end), (start, len(sequence))):
            part = sequence[first:last]
            if len(part) == len(query) and all(a in (b, "X") for a, b in zip(part, query)):
                return candidates[first:last]
    sequence = structure.sequence(chain)
    differs = next(
        (place for place, (a, b) in enumerate(zip(sequence, query)) if a != b), min(len(sequence), len(query))
    )
    raise ValueError(
        f"msas: expected the query of {file} to be chain {chain!r}, {len(sequence)} residues, got {len(query)}; "
        f"from residue {differs + 1}: {sequence[differs : differs + 10]!r} and {query[differs : differs + 10]!r}"
    )


def read_alignments(
    msas: Mapping[str, str | os.PathLike], structure: Structure, entities: Sequence[int]
) -> dict[int, ChainAlignment]:
    """The alignments by entity; chains that are the same need only one, and every further one of it adds nothing.

    Args:
      msas: path of each chain's file.
      structure: which has the chains.
      entities: of each unit of it.

    Raises:
      ValueError, A3MError: as `read_alignment`; and two different files for chains that are the same.
    """
    found: dict[int, ChainAlignment] = {}
    paths: dict[int, Path] = {}
    for chain, path in msas.items():
        residues = structure.polymer(chain)
        units = set(structure.residue_unit[residues].tolist())
        if len(units) != 1:
            raise ValueError(f"msas: expected one polymer in chain {chain!r}, got {len(units)}")
        entity = entities[units.pop()]
        if entity not in found:
            found[entity], paths[entity] = read_alignment(path, structure, chain), Path(path)
        elif Path(path).read_bytes() != paths[entity].read_bytes():
            both = f"{paths[entity]} and {path} (chain {chain!r})"
            raise ValueError(f"msas: expected one alignment for chains of one sequence, got {both}")
    return found


def shares(sizes: Sequence[int], rows: int) -> list[int]:
    """How many rows of each alignment to take so that they are at most `rows` together: the shorter ones whole.

    The rest of the room is divided equally among the longer ones.
    """
    taken, room = [0] * len(sizes), rows
    for left, index in zip(range(len(sizes), 0, -1), sorted(range(len(sizes)), key=lambda index: sizes[index])):
        taken[index] = min(sizes[index], room // left)
        room -= taken[index]
    return taken


def stack(
    restype: Int[np.ndarray, " N"],
    places: Mapping[int, Sequence[tuple[np.ndarray, np.ndarray]]],
    alignments: Mapping[int, ChainAlignment],
    max_rows: int,
) -> dict[str, np.ndarray]:
    """One alignment: the sequence itself, then the rows of one entity after the other, all its chains side by side.

    Args:
      restype: the sequence itself.
      places: of each entity, for each of its chains: the tokens that are residues of it, and which residues they are.
      alignments: of the entities that have one.
      max_rows: cap on all rows together; the profile counts every row.

    Returns:
      `msa` (int8 [S, N]), `msa_mask`, `deletion_value`, `profile`, `deletion_mean` of FEATURES. A row counts
      (mask) only where its entity is, there with its gaps; row 0 everywhere.
    """
    tokens = len(restype)
    taken = dict(zip(alignments, shares([len(found.rows) for found in alignments.values()], max_rows - 1)))
    count = 1 + sum(taken.values())
    msa = np.full((count, tokens), GAP, np.int8)
    mask = np.zeros((count, tokens), np.bool_)
    deletion_value = np.zeros((count, tokens), np.float32)
    profile = np.eye(32, dtype=np.float32)[restype]
    deletion_mean = np.zeros(tokens, np.float32)
    msa[0], mask[0] = restype, True
    first = 1
    for entity, found in alignments.items():
        rows = slice(first, first + taken[entity])
        first = rows.stop
        values = np.zeros((taken[entity], found.rows.shape[1]), np.float32)
        some = np.nonzero(found.deletions[: taken[entity]])
        values[some] = 2 / np.pi * np.arctan(found.deletions[some] / 3)
        mean = found.deletions.sum(axis=0, dtype=np.int64) / (len(found.rows) + 1)
        counts = _counts(found.rows)
        for at, residues in places[entity]:
            whole = len(residues) == found.rows.shape[1] and (np.diff(residues) == 1).all() and (np.diff(at) == 1).all()
            target = slice(int(at[0]), int(at[-1]) + 1) if whole else at  # slices are copied much faster
            source = slice(None) if whole else residues
            msa[rows, target] = found.rows[: taken[entity], source]
            mask[rows, target] = True
            deletion_value[rows, target] = values[:, source]
            deletion_mean[at] = mean[residues]
            profile[at] = (counts[residues] + profile[at]) / (len(found.rows) + 1)
    return {
        "msa": msa,
        "msa_mask": mask,
        "deletion_value": deletion_value,
        "profile": profile,
        "deletion_mean": deletion_mean,
    }


def _counts(rows: Int[np.ndarray, "R L"]) -> Int[np.ndarray, "L 32"]:
    """How often each type stands in each column."""
    width = rows.shape[1]
    flat = rows.astype(np.int32) + 32 * np.arange(width, dtype=np.int32)
    return np.bincount(flat.ravel(), minlength=32 * width).reshape(width, 32)
