"""Features as bytes: a `.npz` without compression, and what a manifest must know to read it in one piece.

Integers are stored in the narrowest type that keeps them, and what follows from other features, or is mostly nothing,
in short: token bonds, the alignment's mask (runs of equal rows), its deletions (where there are any).
"""

import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.megafold.features import FEATURES

_SHORT = ("msa_mask", "deletion_value", "token_bonds")
_LOCAL_HEADER = 30  # bytes before a member's name in a zip file; the last four of them are two lengths


def write_record(path: Path, features: dict[str, np.ndarray]) -> dict[str, Any]:
    """Writes the arrays; returns what tells where they are, and a checksum."""
    arrays = _pack(features)
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, np.ascontiguousarray(value), allow_pickle=False)
        members = archive.infolist()
    buffer = np.fromfile(path, np.uint8)
    entries = {}
    for member, (name, value) in zip(members, arrays.items()):
        lengths = buffer[member.header_offset + _LOCAL_HEADER - 4 :][:4].view("<u2")
        end = member.header_offset + _LOCAL_HEADER + int(lengths.sum()) + member.file_size
        entries[name] = {"dtype": value.dtype.str, "shape": list(value.shape), "offset": end - value.nbytes}
    return {"checksum": checksum(buffer, entries), "arrays": entries}


def read_record(path: Path, manifest: dict[str, Any]) -> tuple[dict[str, np.ndarray], int]:
    """The features, and the bytes read.

    Raises:
      ValueError, KeyError, TypeError, IndexError, OSError: it is not what the manifest says.
    """
    buffer = np.fromfile(path, np.uint8)
    entries = manifest["arrays"]
    if checksum(buffer, entries) != manifest["checksum"]:
        raise ValueError(f"{os.fspath(path)} has another checksum than its manifest")
    arrays = {}
    for name, entry in entries.items():
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        offset, size = entry["offset"], dtype.itemsize * math.prod(shape)
        if not all(type(number) is int and number >= 0 for number in (offset, *shape)) or offset + size > buffer.nbytes:
            raise ValueError(f"{name}: {shape} of {dtype} at byte {offset} of {buffer.nbytes}")
        arrays[name] = buffer[offset : offset + size].view(dtype).reshape(shape)
    return _unpack(arrays), buffer.nbytes


def checksum(buffer: np.ndarray, entries: dict[str, Any]) -> int:
    """CRC-32 of the bytes and of what is said about them."""
    return zlib.crc32(buffer.data, zlib.crc32(repr(sorted(entries.items())).encode()))


def _pack(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    made = {name: narrow(features[name]) for name in FEATURES if name not in _SHORT}
    mask, values = features["msa_mask"], features["deletion_value"]
    begins = np.flatnonzero(np.append(True, (mask[1:] != mask[:-1]).any(axis=1)))
    made["mask_rows"] = mask[begins]
    made["mask_repeats"] = np.diff(np.append(begins, len(mask)))
    deleted = np.flatnonzero(values)
    made["deletions_at"] = narrow(deleted)
    made["deletions_kinds"], kind = np.unique(values.ravel()[deleted], return_inverse=True)
    made["deletions_kind"] = narrow(kind)
    return made


def _unpack(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    features = {}
    for name, feature in FEATURES.items():
        if name == "msa":
            features[name] = arrays[name]  # the largest by far: it stays where it is, and narrow
        elif name not in _SHORT:
            features[name] = arrays[name].astype(feature.dtype)
    repeats = arrays["mask_repeats"]
    if repeats.min(initial=0) < 0 or repeats.sum() != len(features["msa"]):
        raise ValueError(f"{repeats.sum()} rows of the alignment's mask, expected {len(features['msa'])}")
    features["msa_mask"] = np.repeat(arrays["mask_rows"], repeats, axis=0)
    values = np.zeros(features["msa"].shape, np.float32)
    values.ravel()[arrays["deletions_at"]] = arrays["deletions_kinds"][arrays["deletions_kind"]]
    features["deletion_value"] = values
    bonded = np.zeros((len(features["restype"]),) * 2, np.bool_)
    first, second = features["atom_token"][features["bonds"]].T
    bonded[first, second] = bonded[second, first] = True
    features["token_bonds"] = bonded
    return {name: features[name] for name in FEATURES}


def narrow(value: np.ndarray) -> np.ndarray:
    """The same integers in the narrowest type."""
    if value.dtype.kind not in "iu" or not value.size:
        return value
    low, high = int(value.min()), int(value.max())
    return value.astype(next(t for t in ("i1", "u1", "i2", "u2", "i4", "i8") if _holds(t, low, high)))


def _holds(name: str, low: int, high: int) -> bool:
    limits = np.iinfo(name)
    return limits.min <= low and high <= limits.max
