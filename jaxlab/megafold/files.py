"""Structures of a folder and the alignments that are named after them."""

import os
import re
from pathlib import Path

_ENDINGS = (".cif", ".cif.gz")
_CHAIN = re.compile(r"_?([A-Za-z0-9]{1,4})(?:_(?:protein|rna|dna))?")


def paired(folder: str | os.PathLike, msas: str | os.PathLike) -> dict[Path, dict[str, Path]]:
    """Each mmCIF file of a folder, with its A3M files by chain.

    An alignment is a structure's if its name is the structure's and a chain's: of `721p.cif`, `721pA.a3m`, `721p_A.a3m`
    and `721pA_protein.a3m`. Of several structures the one with the longest name has it.

    Raises:
      FileNotFoundError: no such folder, or no structure in it.
    """
    for each in (folder, msas):
        if not Path(each).is_dir():
            raise FileNotFoundError(f"{os.fspath(each)} is no folder")
    structures = {
        path.name.partition(".cif")[0]: path for path in sorted(Path(folder).iterdir()) if path.name.endswith(_ENDINGS)
    }
    if not structures:
        raise FileNotFoundError(f"{os.fspath(folder)} holds no mmCIF file (*.cif, *.cif.gz)")
    found: dict[Path, dict[str, Path]] = {path: {} for path in structures.values()}
    for path in sorted(Path(msas).glob("*.a3m")):
        for name in sorted(structures, key=len, reverse=True):
            chain = _CHAIN.fullmatch(path.stem.removeprefix(name)) if path.stem.startswith(name) else None
            if chain:
                found[structures[name]][chain.group(1)] = path
                break
    return found
