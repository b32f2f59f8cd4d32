"""Alignments in A3M: upper-case letters and '-' are columns of the query, lower-case letters are insertions."""

import dataclasses
import os

import numpy as np
from jaxtyping import Int


class A3MError(ValueError):
    """An alignment that is none; `file` (None where it came as text) and `line`, counted from 1, say where."""

    def __init__(self, file: str | None, line: int, problem: str):
        super().__init__(f"{file or 'a3m'}, line {line}: {problem}")
        self.file, self.line, self.problem = file, line, problem

    def __reduce__(self):
        return A3MError, (self.file, self.line, self.problem)


@dataclasses.dataclass(frozen=True, eq=False)
class MSA:
    """A multiple sequence alignment; row 0 is the query.

    Attributes:
      names: what stands after each '>'.
      sequences: the rows, upper-case, '-' where a row has no residue; insertions are left out.
      deletions: how many residues each row inserts right before each column; those after the last column do not count.
    """

    names: list[str]
    sequences: list[str]
    deletions: Int[np.ndarray, "R L"]

    def letters(self) -> np.ndarray:
        """The rows as codes of their letters, uint8 [R, L]."""
        return np.frombuffer("".join(self.sequences).encode("ascii"), np.uint8).reshape(self.deletions.shape)


def parse_a3m(text: str, *, file: str | os.PathLike | None = None) -> MSA:
    """Reads an alignment: every row, duplicates too; a sequence may go over several lines, blank lines do not count.

    Args:
      text: the content.
      file: where it comes from, for errors.

    Raises:
      A3MError: no sequence, text before the first '>', a row without a sequence or of another length than the query's,
        or a character that is neither a letter nor '-'.
    """
    name = None if file is None else os.fspath(file)
    lines = text.split("\n")
    starts = [number for number, line in enumerate(lines) if line.startswith(">")]
    first = next((number for number, line in enumerate(lines) if line.strip()), None)
    if first is None:
        raise A3MError(name, 1, "expected sequences, got nothing")
    if not starts or first < starts[0]:
        raise A3MError(name, first + 1, f"expected '>' and a name, got {lines[first].strip()[:40]!r}")
    ends = [*starts[1:], len(lines)]
    rows = ["".join(map(str.strip, lines[start + 1 : end])) for start, end in zip(starts, ends)]
    sizes = np.array([len(row) for row in rows])
    joined = "".join(rows)
    data = np.frombuffer(joined.encode("latin-1", "replace"), np.uint8)  # what is not Latin becomes '?'
    lower = (data >= ord("a")) & (data <= ord("z"))
    column = ((data >= ord("A")) & (data <= ord("Z"))) | (data == ord("-"))
    if not (lower | column).all():
        place = int(np.argmin(lower | column))
        row = int(np.searchsorted(np.cumsum(sizes), place, side="right"))
        line = _line_of(lines, starts[row], place - int(sizes[:row].sum()))
        raise A3MError(name, line, f"expected letters and '-', got {joined[place]!r} in {lines[starts[row]][:40]!r}")
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    counted = np.concatenate([[0], np.cumsum(column, dtype=np.int64)])
    columns = counted[offsets[1:]] - counted[offsets[:-1]]
    width = int(columns[0])
    wrong = np.flatnonzero((columns != width) | (columns == 0))
    if len(wrong):
        row = int(wrong[0])
        problem = f"expected {width or 'at least 1'} columns, as the query has, got {columns[row]}"
        raise A3MError(name, starts[row] + 1, f"{problem} in {lines[starts[row]][:40]!r}")
    aligned = data[column].tobytes().decode("ascii")
    deletions = np.zeros((len(rows), width), np.int32)
    inserted = np.flatnonzero(lower)
    row = np.searchsorted(offsets, inserted, side="right") - 1
    before = counted[inserted] - counted[offsets[row]]
    inside = before < width
    np.add.at(deletions, (row[inside], before[inside]), 1)
    sequences = [aligned[at : at + width] for at in range(0, len(aligned), width)]
    return MSA([lines[start][1:].strip() for start in starts], sequences, deletions)


def _line_of(lines: list[str], start: int, place: int) -> int:
    """Number, from 1, of the line with this character of the sequence whose header is at `start`."""
    number = start + 1
    while place >= len(lines[number].strip()):
        place -= len(lines[number].strip())
        number += 1
    return number + 1
