"""Chemical components: the atoms, charges, bonds and reference conformer of a residue's or ligand's kind.

They come from records of the wwPDB Chemical Component Dictionary, files `<NAME>.cif`: those in a folder of the user's,
then the library's own data files `af3/ccd`, which cover the standard residues.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxlab.core.data import data_path, registry
from jaxlab.core.errors import require
from jaxlab.megafold.data.structure import HYDROGEN


@dataclasses.dataclass(frozen=True, eq=False)
class Component:
    """The heavy atoms K of a component, in the order of its record.

    Attributes:
      names: of the atoms.
      elements: atomic numbers.
      charges: formal.
      positions: the ideal conformer, Å, the model's where the record has no ideal one; zero where it has neither.
      leaving: atoms that go when the component is bonded to another.
      bonds: pairs of names.
    """

    names: tuple[str, ...]
    elements: Int[np.ndarray, " K"]
    charges: Float[np.ndarray, " K"]
    positions: Float[np.ndarray, "K 3"]
    leaving: Bool[np.ndarray, " K"]
    bonds: tuple[tuple[str, str], ...]


def atomic_numbers(elements: np.ndarray) -> Int[np.ndarray, " A"]:
    """Atomic numbers of element symbols; 0 where there is no such element."""
    element = require("gemmi", "folding").Element
    known = {symbol: element(symbol).atomic_number for symbol in set(elements.tolist())}
    return np.array([known[symbol] for symbol in elements.tolist()], np.int32)


def find_component(name: str, folder: str | os.PathLike | None = None) -> Component | None:
    """The record of a component; None where there is none.

    Args:
      name: such as "ALA", "DA", "GNP".
      folder: where to look first.

    Raises:
      DataUnavailable: a standard residue's record is nowhere.
      MissingExtra: gemmi is not installed.
    """
    if not name.isalnum():
        return None
    own = None if folder is None else Path(folder) / f"{name}.cif"
    if own is not None and own.is_file():
        return _read(own, own.stat().st_mtime_ns)
    path = _registered(name)
    return None if path is None else _read(path, 0)


@functools.cache
def _registered(name: str) -> Path | None:
    known = f"af3/ccd/{name}.cif"
    return data_path(known) if known in registry() else None


@functools.lru_cache(maxsize=4096)
def _read(path: Path, changed_ns: int) -> Component:
    """A record in its present state; the time is there for the cache."""
    del changed_ns
    cif = require("gemmi", "folding").cif
    try:
        block: Any = cif.read(os.fspath(path)).sole_block()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"ccd: expected the record of one component in {path}: {error}") from error
    tags = ["atom_id", "type_symbol", "?charge", "?pdbx_leaving_atom_flag"]
    tags += [f"?pdbx_model_Cartn_{axis}_ideal" for axis in "xyz"] + [f"?model_Cartn_{axis}" for axis in "xyz"]
    table = block.find("_chem_comp_atom.", tags)
    rows = [[cif.as_string(row[i]) if row.has(i) else "?" for i in range(len(tags))] for row in table]
    rows = [row for row in rows if row[1].upper() not in HYDROGEN]
    names = tuple(row[0] for row in rows)
    ideal, model = (np.array([[_number(cell) for cell in row[at : at + 3]] for row in rows]) for at in (4, 7))
    positions = ideal if len(rows) and np.isfinite(ideal).all() else model
    if not len(rows) or not np.isfinite(positions).all():
        positions = np.zeros((len(rows), 3))
    bonds = tuple(
        (cif.as_string(first), cif.as_string(second))
        for first, second in block.find("_chem_comp_bond.", ["atom_id_1", "atom_id_2"])
    )
    return Component(
        names=names,
        elements=atomic_numbers(np.array([row[1].upper() for row in rows], np.str_)),
        charges=np.nan_to_num(np.array([_number(row[2]) for row in rows], np.float32)),
        positions=positions.astype(np.float32),
        leaving=np.array([row[3] == "Y" for row in rows], np.bool_),
        bonds=tuple(pair for pair in bonds if pair[0] in names and pair[1] in names),
    )


def _number(cell: str) -> float:
    return float("nan") if cell in ("?", ".", "") else float(cell)
