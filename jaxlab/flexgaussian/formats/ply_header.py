"""The header of a PLY file, read within bounds: elements, their scalar properties, and where their rows lie."""

import dataclasses
import os
from pathlib import Path

import numpy as np

from jaxlab.flexgaussian.scene import SceneFormatError

_LIMIT = 1 << 16
_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8",
}  # fmt: skip
_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">"}


@dataclasses.dataclass(frozen=True)
class Element:
    """Rows of one kind: their dtype (a structured one), number, and byte offset in the file."""

    name: str
    dtype: np.dtype
    count: int
    offset: int

    def column(self, rows: np.ndarray, name: str) -> np.ndarray:
        """One property of rows that were read."""
        if name not in (self.dtype.names or ()):
            raise SceneFormatError(f"the element {self.name!r} has no property {name!r}")
        return rows[name]


def read_header(path: Path) -> dict[str, Element]:
    """The elements of a PLY file by name, all of whose rows are inside of the file.

    Raises:
      SceneFormatError: no PLY header; text form; lists; rows that reach beyond the end of the file.
    """
    with path.open("rb") as file:
        start = file.read(_LIMIT)
    end = start.find(b"end_header\n")
    length = end + len(b"end_header\n")
    if end < 0:
        end, length = start.find(b"end_header\r\n"), start.find(b"end_header\r\n") + len(b"end_header\r\n")
    if not start.startswith(b"ply") or end < 0:
        raise SceneFormatError(f"{path}: expected a PLY header of at most {_LIMIT} bytes")
    order, kinds = "", []
    for line in start[:end].decode("ascii", "replace").splitlines()[1:]:
        words = line.split()
        if not words or words[0] in ("comment", "obj_info"):
            continue
        if words[0] == "format" and len(words) == 3:
            if words[1] not in _ORDERS:
                raise SceneFormatError(f"{path}: expected the PLY form {' or '.join(_ORDERS)}, got {words[1]}")
            order = _ORDERS[words[1]]
        elif words[0] == "element" and len(words) == 3 and words[2].isdecimal():
            kinds.append((words[1], int(words[2]), []))
        elif words[0] == "property" and len(words) == 3 and words[1] in _TYPES and kinds:
            kinds[-1][2].append((words[2], _TYPES[words[1]]))
        else:
            raise SceneFormatError(f"{path}: the PLY header has a line that is not understood: {line[:80]!r}")
    if not order:
        raise SceneFormatError(f"{path}: the PLY header has no format line")
    return _laid_out(path, kinds, order, length)


def read_rows(path: Path, element: Element) -> np.ndarray:
    """All rows of an element as a structured array."""
    return np.fromfile(path, element.dtype, element.count, offset=element.offset)


def _laid_out(
    path: Path, kinds: list[tuple[str, int, list[tuple[str, str]]]], order: str, offset: int
) -> dict[str, Element]:
    size, elements = os.path.getsize(path), {}
    for name, count, properties in kinds:
        names = [property for property, _ in properties]
        if len(set(names)) != len(names) or name in elements:
            raise SceneFormatError(f"{path}: the PLY header names something of {name!r} twice")
        dtype = np.dtype([(property, order + kind) for property, kind in properties])
        elements[name] = Element(name, dtype, count, offset)
        offset += count * dtype.itemsize
        if offset > size:
            raise SceneFormatError(
                f"{path}: {count} rows of {name!r} need {offset} bytes, the file ends at byte {size}"
            )
    return elements
