"""Files that a stranger may have written: read within bounds, without pickles, and never beyond their folder."""

import ast
import contextlib
import gzip
import io
import itertools
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxlab.core.errors import require

JSON_BYTES = 1 << 28
"""Of a JSON document at most: a tokenizer with a large vocabulary has some 2^25."""
UNPACKED_BYTES = 1 << 32
"""Of all arrays of an `.npz` file, and of what gzip hides, at most."""
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, struct.error)
"""What `zipfile` raises over damaged archives, encrypted ones, and packings that it does not know."""
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, struct.error)
"""What Pillow raises over damaged images and their metadata, with its own DecompressionBombError."""
_YAML_BYTES, _YAML_NODES, _YAML_DEPTH = 1 << 18, 1 << 18, 64
_PIECE = 1 << 20
_IMAGES = ("PNG", "JPEG", "WEBP", "GIF")
_NPY_HEADER = 10_000


def read_json(path: str | os.PathLike) -> Any:
    """A JSON document.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is not JSON in UTF-8, nested too deeply, or too long.
    """
    if (size := os.stat(path).st_size) > JSON_BYTES:
        raise ValueError(f"{path}: expected at most {JSON_BYTES} bytes of JSON, got {size}")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON document that is an object; errors of `read_json`, and ValueError where it is something else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def read_image(source: str | os.PathLike | bytes, extra: str) -> Any:
    """A Pillow image, its pixels read.

    PNG, JPEG, WebP and GIF alone: Pillow knows some forty formats more, which few use and few attack in tests.

    Args:
      source: a file's path, or its content.
      extra: that brings Pillow, for the message where it is absent.

    Raises:
      FileNotFoundError: no such file.
      ValueError: of another format, damaged, or of more pixels than Pillow's own bound.
      MissingExtra: Pillow is absent.
    """
    pillow = require("PIL.Image", extra)
    content, what = (source, "image") if isinstance(source, bytes) else (Path(source).read_bytes(), os.fspath(source))
    try:
        # In memory: a stream that is asked for 4 GiB which a header claims takes no more than there is.
        with pillow.open(io.BytesIO(content), formats=_IMAGES) as image:
            image.load()
            return image
    except (*IMAGE_ERRORS, pillow.DecompressionBombError) as error:
        told = f" ({error})" if not isinstance(error, pillow.UnidentifiedImageError) else ""
        raise ValueError(f"{what}: expected a PNG, JPEG, WebP or GIF image that Pillow reads{told}") from error


def read_yaml(path: str | os.PathLike) -> Any:
    """A YAML document of plain values, its aliases bounded: a few lines of them can stand for billions of values.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is not YAML in UTF-8, or too large, by itself or with its aliases written out.
    """
    import yaml

    if (size := os.stat(path).st_size) > _YAML_BYTES:
        raise ValueError(f"{path}: expected at most {_YAML_BYTES} bytes of YAML, got {size}")
    try:
        text = Path(path).read_text(encoding="utf-8")
        if _brackets(text) > _YAML_DEPTH:  # its scanner takes seconds over hundreds
            raise ValueError(f"brackets nested more than {_YAML_DEPTH} deep")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    sizes: dict[int, int | None] = {}

    def written_out(value: Any) -> int:
        if not isinstance(value, dict | list):
            return 1
        if id(value) not in sizes:
            sizes[id(value)] = None  # until it is known
            inner = [*value, *value.values()] if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(map(written_out, inner))
        known = sizes[id(value)]
        if known is None:
            raise ValueError(f"{path}: expected YAML that does not contain itself")
        return known

    if (nodes := written_out(content)) > _YAML_NODES:
        raise ValueError(f"{path}: expected at most {_YAML_NODES} values, got {nodes} with all aliases written out")
    return content


def _brackets(text: str) -> int:
    """How deep brackets are nested, those in quotes and comments counted too."""
    change = {"[": 1, "{": 1, "]": -1, "}": -1}
    return max(itertools.accumulate((change.get(letter, 0) for letter in text), initial=0))


@contextlib.contextmanager
def understood(what: str | os.PathLike) -> Iterator[None]:
    """Turns what goes wrong over values of unforeseen types and sizes into one ValueError; a decorator, too.

    For code that takes a parsed document apart; what it says itself (ValueError, NotImplementedError, KeyError) passes.

    Args:
      what: the file, for the message.
    """
    try:
        yield
    except (TypeError, AttributeError, IndexError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(f"{what} is not understood: {error!r}"[:500]) from error


def inside(folder: str | os.PathLike, name: object, what: str = "name") -> Path:
    """The path of a file that another file names, below its folder.

    Args:
      folder: where names lead from.
      name: relative, with slashes.
      what: of the name, for the message.

    Raises:
      ValueError: it is no text, absolute, or leads out of the folder.
    """
    if not isinstance(name, str) or not name or not name.isprintable() or "\\" in name:
        raise ValueError(f"{what}: expected the name of a file, got {str(name)[:80]!r}")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{what}: expected a path below {os.fspath(folder)}, got {name[:80]!r}")
    return Path(folder) / path


def gunzipped(content: bytes, what: str, most: int = UNPACKED_BYTES) -> bytes:
    """What gzip has packed, all members, piece by piece.

    Raises:
      ValueError: damaged, cut off, or more than `most` bytes.
    """
    unpacked = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            while piece := stream.read(_PIECE):
                unpacked += piece
                if len(unpacked) > most:
                    raise ValueError(f"{what}: its gzip data unpacks to more than {most} bytes")
    except EOFError as error:
        raise ValueError(f"{what}: its gzip data is cut off") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{what}: damaged gzip data ({error})") from error
    return bytes(unpacked)


def read_npz(path: str | os.PathLike, most: int = UNPACKED_BYTES) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file.

    Headers are compared with the lengths of their members before memory is taken; arrays of objects, which are pickles,
    are refused.

    Args:
      path: of the file.
      most: bytes of all arrays.

    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged, too large, or with arrays of objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if (total := sum(member.file_size for member in members)) > most:
                raise ValueError(f"{path}: expected at most {most} bytes of arrays, got {total}")
            arrays = {}
            for member in members:
                with archive.open(member) as stream:
                    content = stream.read(member.file_size)
                arrays[member.filename.removesuffix(".npy")] = array_of(content, f"{path}, {member.filename}")
            return arrays
    except FileNotFoundError:
        raise
    except (*ZIP_ERRORS, OSError) as error:
        raise ValueError(f"{path}: expected an .npz file: {error}") from error


def array_of(content: bytes, what: str) -> np.ndarray:
    """The array of an `.npy` file's content.

    Raises:
      ValueError: it is none, of objects, or of another length than its header tells.
    """
    if content[:6] != b"\x93NUMPY" or len(content) < 12:
        raise ValueError(f"{what}: expected an array in NumPy's format")
    start = 10 if content[6] == 1 else 12
    length = int.from_bytes(content[8:start], "little")
    try:
        if length > _NPY_HEADER:
            raise ValueError(f"a header of {length} bytes")
        header = ast.literal_eval(content[start : start + length].decode("latin-1"))
        dtype, shape, fortran = np.dtype(header["descr"]), header["shape"], header["fortran_order"]
        sizes = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        if not sizes or type(fortran) is not bool or dtype.hasobject:
            raise ValueError(f"got {str(header)[:80]}")
        body = content[start + length :]
        if math.prod(shape) * dtype.itemsize != len(body):
            raise ValueError(f"{shape} of {dtype} in {len(body)} bytes")
        array = np.frombuffer(body, dtype, math.prod(shape)) if len(body) else np.zeros(math.prod(shape), dtype)
        return array.reshape(shape, order="F" if fortran else "C").copy()
    except (SyntaxError, KeyError, TypeError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"{what}: expected an array of numbers in NumPy's format: {error}"[:300]) from error
