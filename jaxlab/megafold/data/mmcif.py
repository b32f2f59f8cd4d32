"""Structures from and to mmCIF, the format of the Protein Data Bank; read through gemmi (extra `folding`)."""

import collections
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxlab.core.errors import require
from jaxlab.core.untrusted import gunzipped
from jaxlab.megafold.data.structure import End, Structure, kind_of

_COLUMNS = ("type_symbol", "label_atom_id", "label_comp_id", "label_asym_id", "Cartn_x", "Cartn_y", "Cartn_z")
_OPTIONAL = {
    **{"label_alt_id": ".", "label_seq_id": ".", "label_entity_id": ".", "auth_asym_id": "", "auth_seq_id": "."},
    **{"pdbx_PDB_ins_code": ".", "occupancy": "1", "B_iso_or_equiv": "0", "pdbx_PDB_model_num": "1"},
}
_RESOLUTION = ("_refine.ls_d_res_high", "_em_3d_reconstruction.resolution", "_reflns.d_resolution_high")
_POLYMERS = {"protein": "polypeptide(L)", "dna": "polydeoxyribonucleotide", "rna": "polyribonucleotide"}


class MMCIFError(ValueError):
    """Not an mmCIF file with a structure; the message names the file and what is wrong."""


def read_mmcif(path: str | os.PathLike) -> Structure:
    """Reads the first model of a structure; of alternative places the likeliest, residue by residue.

    A residue belongs to a polymer if `_pdbx_poly_seq_scheme` lists it (residues it lists and no atom shows are there,
    without atoms), and without that table, if its entity is a polymer. Assemblies may give ligands the chain of a
    polymer: each residue of such is a unit of its own. Hydrogens and waters are kept.

    Args:
      path: plain or gzip-compressed, whatever its name.

    Raises:
      MMCIFError: not mmCIF, or without atoms or entities.
      FileNotFoundError: no such file.
      MissingExtra: gemmi is not installed.
    """
    return parse_mmcif(Path(path).read_bytes(), file=os.fspath(path))


def parse_mmcif(content: bytes, *, file: str = "mmCIF") -> Structure:
    """`read_mmcif` of a file's content; `file` is for errors."""
    cif = require("gemmi", "folding").cif
    try:
        text = gunzipped(content, file) if content[:2] == b"\x1f\x8b" else content
        block = cif.read_string(text.decode("utf-8", "replace"))[0]
    except (ValueError, RuntimeError, IndexError, OSError, EOFError) as error:
        raise MMCIFError(f"{file}: not an mmCIF file: {error}") from error
    atoms = _atoms(block, file)
    entities = {row[0]: row[1] for row in _rows(block, "_entity.", ("id", "type"))}
    if not entities:
        raise MMCIFError(f"{file}: expected entities (_entity), found none")
    scheme = _rows(block, "_pdbx_poly_seq_scheme.", ("asym_id", "seq_id", "mon_id"))
    table = _residues(atoms, scheme, entities)
    order = table.pop("order")
    names, chains = table["residue_name"], table["residue_chain"]
    residue = table["of_atom"][order]
    bonds = _bonds(block, table.pop("found"))
    del table["of_atom"]
    listed = collections.defaultdict(list)
    for component, first, second in _rows(block, "_chem_comp_bond.", ("comp_id", "atom_id_1", "atom_id_2")):
        listed[component].append((first, second))
    return Structure(
        coords=np.stack([atoms[f"Cartn_{axis}"] for axis in "xyz"], axis=1)[order].astype(np.float32),
        atom_name=atoms["label_atom_id"][order],
        res_name=names[residue],
        chain_id=chains[residue],
        element=_elements(atoms)[order],
        b_factor=atoms["B_iso_or_equiv"][order].astype(np.float32),
        occupancy=atoms["occupancy"][order].astype(np.float32),
        residue=residue,
        **table,
        bonds=bonds,
        component_bonds=dict(listed),
        resolution=_resolution(block),
    )


def _rows(block: Any, category: str, tags: tuple[str, ...]) -> list[tuple[str, ...]]:
    """A table's rows, quotes taken off; none where a column is absent."""
    as_string = require("gemmi", "folding").cif.as_string
    return [tuple(as_string(value) for value in row) for row in block.find(category, list(tags))]


def _column(block: Any, tag: str) -> np.ndarray:
    """A column as strings, quotes taken off once for each value there is."""
    as_string = require("gemmi", "folding").cif.as_string
    values = list(block.find_values(tag))
    plain = {value: as_string(value) if value[:1] in ("'", '"', ";") else value for value in set(values)}
    return np.array([plain[value] for value in values], dtype=np.str_)


def _atoms(block: Any, file: str) -> dict[str, np.ndarray]:
    """The columns of `_atom_site`, of the first model and the likeliest alternatives."""
    atoms = {name: _column(block, f"_atom_site.{name}") for name in _COLUMNS}
    count = len(atoms["Cartn_x"])
    if not count:
        raise MMCIFError(f"{file}: expected atoms (_atom_site), found none")
    for name, column in atoms.items():
        if len(column) != count:
            raise MMCIFError(f"{file}: expected a column _atom_site.{name}, found none")
    for name, default in _OPTIONAL.items():
        column = _column(block, f"_atom_site.{name}")
        atoms[name] = column if len(column) == count else np.full(count, default)
    if not atoms["auth_asym_id"][0]:
        atoms["auth_asym_id"] = atoms["label_asym_id"]
    for name in ("Cartn_x", "Cartn_y", "Cartn_z", "occupancy", "B_iso_or_equiv"):
        column = np.where(np.isin(atoms[name], (".", "?")), _OPTIONAL.get(name, "nan"), atoms[name])
        try:
            atoms[name] = column.astype(np.float64)
        except ValueError as error:
            raise MMCIFError(f"{file}: expected numbers in _atom_site.{name}: {error}") from error
    if not np.isfinite(np.stack([atoms[f"Cartn_{axis}"] for axis in "xyz"])).all():
        raise MMCIFError(f"{file}: expected finite coordinates of every atom in _atom_site")
    models = atoms["pdbx_PDB_model_num"]
    first = {name: column[models == models[0]] for name, column in atoms.items()}
    kept = _likeliest(first)
    return {name: column[kept] for name, column in first.items()}


def _elements(atoms: dict[str, np.ndarray]) -> np.ndarray:
    """Upper-case symbols; of an atom that is named as its component is, an ion, that name.

    Some assemblies keep only the first letter of a symbol.
    """
    element = require("gemmi", "folding").Element
    symbols, names = np.char.upper(atoms["type_symbol"]), np.char.upper(atoms["label_atom_id"])
    alone = (names == atoms["label_comp_id"]) & (symbols != names)
    known = {name for name in set(names[alone].tolist()) if element(name).atomic_number}
    return np.where(alone & np.isin(names, list(known)), names, symbols)


def _place(atoms: dict[str, np.ndarray], index: int) -> tuple[str, ...]:
    """What tells one residue of the file from the next; alternatives of one residue share it."""
    tags = ("label_asym_id", "label_seq_id", "auth_seq_id", "pdbx_PDB_ins_code")
    return tuple(str(atoms[tag][index]) for tag in tags)


def _likeliest(atoms: dict[str, np.ndarray]) -> np.ndarray:
    """Atoms without alternatives, and of each residue's alternatives the one with the highest mean occupancy."""
    labels = atoms["label_alt_id"]
    kept = np.isin(labels, (".", "?", ""))
    choices: dict[tuple[str, ...], dict[str, list[int]]] = {}
    for index in np.flatnonzero(~kept).tolist():
        choices.setdefault(_place(atoms, index), {}).setdefault(str(labels[index]), []).append(index)
    for alternatives in choices.values():
        kept[max(alternatives.values(), key=lambda members: atoms["occupancy"][members].mean())] = True
    return kept


def _residues(atoms: dict[str, np.ndarray], scheme: list[tuple[str, ...]], entities: dict[str, str]) -> dict[str, Any]:
    """The residues, grouped into units in the order in which the file shows them, and each atom's residue."""
    listed: dict[str, dict[str, str]] = collections.defaultdict(dict)  # asym, number, first name given
    for asym, number, name in scheme:
        listed[asym].setdefault(number, name)
    place = [atoms[tag] for tag in ("label_asym_id", "label_seq_id", "auth_seq_id", "pdbx_PDB_ins_code")]
    place.append(atoms["label_comp_id"])
    begins = np.ones(len(place[0]), np.bool_)
    begins[1:] = np.any([column[1:] != column[:-1] for column in place], axis=0)
    starts = np.flatnonzero(begins)
    run = np.cumsum(begins) - 1
    rows = list(zip(*(column[starts].tolist() for column in (*place, atoms["auth_asym_id"], atoms["label_entity_id"]))))
    if scheme:  # a residue may go by another name there, but a number belongs to one only
        holder: dict[tuple[str, str], tuple[str, ...]] = {}
        for row in sorted(rows, key=lambda row: listed[row[0]].get(row[1]) != row[4]):
            holder.setdefault((row[0], row[1]), row)
        polymer = {row: row[1] in listed[row[0]] and holder[row[0], row[1]] == row for row in rows}
    else:
        polymer = {row: entities.get(row[6]) == "polymer" for row in rows}
    mixed = {row[0] for row in rows if polymer[row]}
    units: dict[tuple[str, ...], dict[tuple[str, ...], tuple[str, ...] | None]] = {}
    author: dict[tuple[str, ...], str] = {}
    for row in rows:
        alone = () if polymer[row] or row[0] not in mixed else row[1:4]
        unit = ("polymer" if polymer[row] else "other", row[0], *alone)
        author.setdefault(unit, row[5])
        if unit not in units:  # a polymer begins with all that the table lists, seen or not
            units[unit] = {(number,): None for number in listed[row[0]]} if polymer[row] else {}
        units[unit][(row[1],) if polymer[row] and scheme else row[1:5]] = row
    table: dict[str, list] = {name: [] for name in ("name", "chain", "unit", "number", "polymer")}
    kinds, found = [], {}
    for number, (unit, members) in enumerate(units.items()):
        is_polymer = unit[0] == "polymer"
        names = [row[4] if row else listed[unit[1]][key[0]] for key, row in members.items()]
        kinds.append(kind_of(names) if is_polymer else "ligand")
        for position, (key, row) in enumerate(members.items(), start=1):
            if row is not None:
                found[row] = len(table["name"])
            place_in_unit = int(key[0]) if is_polymer and key[0].isdigit() else position
            for name, value in zip(table, (names[position - 1], author[unit], number, place_in_unit, is_polymer)):
                table[name].append(value)
    of_atom = np.array([found[row] for row in rows], np.int32)[run]
    return {
        "residue_name": np.array(table["name"], np.str_),
        "residue_chain": np.array(table["chain"], np.str_),
        "residue_unit": np.array(table["unit"], np.int32),
        "residue_number": np.array(table["number"], np.int32),
        "residue_polymer": np.array(table["polymer"], np.bool_),
        "unit_kind": tuple(kinds),
        "of_atom": of_atom,
        "order": np.argsort(of_atom, kind="stable"),
        "found": found,
    }


def _bonds(block: Any, found: dict[tuple[str, ...], int]) -> tuple[tuple[End, End], ...]:
    """The covalent bonds of `_struct_conn`, by the author's or the file's own names, whichever it has."""
    by_author: dict[tuple[str, ...], int] = {(row[5], row[2], row[4]): residue for row, residue in found.items()}
    by_label: dict[tuple[str, ...], int] = {
        (row[0], row[1], row[4]): residue for row, residue in found.items() if row[1].isdigit()
    }
    bonds: dict[tuple[End, End], None] = {}
    category = "_struct_conn."
    for naming, known in (("auth", by_author), ("label", by_label)):
        tags = ["conn_type_id"]
        for end in (1, 2):
            component = "auth" if list(block.find_values(f"{category}ptnr{end}_auth_comp_id")) else "label"
            tags += [f"ptnr{end}_{naming}_asym_id", f"ptnr{end}_{naming}_seq_id", f"ptnr{end}_{component}_comp_id"]
            tags.append(f"ptnr{end}_label_atom_id")
        for kind, *ends in _rows(block, category, tuple(tags)):
            first, second = known.get(tuple(ends[:3])), known.get(tuple(ends[4:7]))
            if kind.startswith(("covale", "disulf")) and first is not None and second is not None:
                bonds[(first, ends[3]), (second, ends[7])] = None
        if bonds:
            break
    return tuple(bonds)


def _resolution(block: Any) -> float:
    for tag in _RESOLUTION:
        try:
            value = float(block.find_value(tag) or "?")
        except ValueError:
            continue
        if value > 0:
            return value
    return 0.0


def write_mmcif(
    structure: Structure,
    path: str | os.PathLike,
    *,
    coords: Float[np.ndarray, "A 3"] | None = None,
    b_factor: Float[np.ndarray, " A"] | None = None,
) -> None:
    """Writes a structure so that `read_mmcif` and gemmi read it back; every unit gets a chain name of its own.

    Args:
      structure: what to write.
      path: where; replaced if it is there.
      coords: other coordinates for its atoms, Å.
      b_factor: other temperature factors, such as the pLDDT of a prediction.

    Raises:
      ValueError: no atoms, or arrays that do not fit.
      MissingExtra: gemmi is not installed.
    """
    cif = require("gemmi", "folding").cif
    coords = structure.coords if coords is None else np.asarray(coords)
    b_factor = structure.b_factor if b_factor is None else np.asarray(b_factor)
    count = len(structure.residue)
    if not count:
        raise ValueError("structure: expected atoms, got none")
    if coords.shape != (count, 3) or b_factor.shape != (count,):
        raise ValueError(
            f"coords, b_factor: expected shapes {(count, 3)} and {(count,)}, got {coords.shape} and {b_factor.shape}"
        )
    document = cif.Document()
    block = document.add_new_block(Path(path).name.partition(".")[0] or "structure")

    def loop(category: str, columns: dict[str, list]) -> None:
        made = block.init_loop(category, list(columns))
        made.set_all_values([[_quoted(cif, value) for value in column] for column in columns.values()])

    unit = structure.residue_unit
    asym = [unit_name(number) for number in range(len(structure.unit_kind))]
    members = [structure.residue_name[unit == number].tolist() for number in range(len(asym))]
    keys = [(kind, *names) for kind, names in zip(structure.unit_kind, members)]
    entity = {key: str(number) for number, key in enumerate(dict.fromkeys(keys), start=1)}
    types = {key: "non-polymer" if key[0] == "ligand" else "polymer" for key in entity}
    block.set_pair("_entry.id", block.name)
    if structure.resolution:
        block.set_pair("_refine.ls_d_res_high", f"{structure.resolution:g}")
    loop("_entity.", {"id": list(entity.values()), "type": list(types.values())})
    polymers = {key: number for key, number in entity.items() if types[key] == "polymer"}
    if polymers:
        kinds = [_POLYMERS[key[0]] for key in polymers]
        loop("_entity_poly.", {"entity_id": list(polymers.values()), "type": kinds})
    loop("_struct_asym.", {"id": asym, "entity_id": [entity[key] for key in keys]})
    listed = np.flatnonzero(structure.residue_polymer)
    if len(listed):
        loop(
            "_pdbx_poly_seq_scheme.",
            {
                "asym_id": [asym[unit[row]] for row in listed],
                "entity_id": [entity[keys[unit[row]]] for row in listed],
                "seq_id": structure.residue_number[listed].tolist(),
                "mon_id": structure.residue_name[listed].tolist(),
            },
        )
    row, is_polymer = structure.residue, structure.residue_polymer[structure.residue]
    numbers = structure.residue_number[row].tolist()
    loop(
        "_atom_site.",
        {
            "group_PDB": np.where(is_polymer, "ATOM", "HETATM").tolist(),
            "id": list(range(1, count + 1)),
            "type_symbol": structure.element.tolist(),
            "label_atom_id": structure.atom_name.tolist(),
            "label_alt_id": ["."] * count,
            "label_comp_id": structure.res_name.tolist(),
            "label_asym_id": [asym[number] for number in unit[row]],
            "label_entity_id": [entity[keys[number]] for number in unit[row]],
            "label_seq_id": [number if inside else "." for number, inside in zip(numbers, is_polymer)],
            "pdbx_PDB_ins_code": ["?"] * count,
            **{f"Cartn_{axis}": [f"{value:.3f}" for value in coords[:, place]] for place, axis in enumerate("xyz")},
            "occupancy": [f"{value:.2f}" for value in structure.occupancy],
            "B_iso_or_equiv": [f"{value:.2f}" for value in b_factor],
            "auth_seq_id": numbers,
            "auth_asym_id": structure.chain_id.tolist(),
            "pdbx_PDB_model_num": [1] * count,
        },
    )
    if structure.bonds:
        ends = list(zip(*structure.bonds))
        columns = {"id": [f"covale{number}" for number in range(1, len(structure.bonds) + 1)]}
        columns["conn_type_id"] = ["covale"] * len(structure.bonds)
        for place, end in enumerate(ends, start=1):
            residues = [residue for residue, _ in end]
            columns[f"ptnr{place}_label_asym_id"] = [asym[unit[residue]] for residue in residues]
            columns[f"ptnr{place}_label_comp_id"] = structure.residue_name[residues].tolist()
            columns[f"ptnr{place}_label_seq_id"] = structure.residue_number[residues].tolist()
            columns[f"ptnr{place}_label_atom_id"] = [name for _, name in end]
            columns[f"ptnr{place}_auth_asym_id"] = structure.residue_chain[residues].tolist()
            columns[f"ptnr{place}_auth_seq_id"] = structure.residue_number[residues].tolist()
        loop("_struct_conn.", columns)
    document.write_file(os.fspath(path))


def unit_name(number: int) -> str:
    """A, B, ... Z, AA, BA, ...: names of units."""
    name = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        name += chr(ord("A") + digit)
    return name


def _quoted(cif: Any, value: object) -> str:
    """A value as it stands in a file; "." and "?" are what they mean there: nothing, and unknown."""
    text = str(value)
    return text if text in (".", "?") else cif.quote(text)
