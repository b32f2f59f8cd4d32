"""Compressed scenes as files; `framing` has what their bytes are."""

import dataclasses
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.core.errors import require
from jaxlab.core.folders import replace_file
from jaxlab.flexgaussian.compressed import CODED, Codes, CompressedScene, bounds_of
from jaxlab.flexgaussian.config import QuantConfig
from jaxlab.flexgaussian.framing import MAGIC, VERSION, check_end, framed, not_understood, opened, stream_at
from jaxlab.flexgaussian.scene import SceneFormatError
from jaxlab.flexgaussian.stepped import SteppedScene
from jaxlab.flexgaussian.stepped_file import read_stepped, write_stepped
from jaxlab.flexgaussian.unpacking import ZSTD_LIMIT, unpack_zstd

__all__ = ["CODECS", "MAGIC", "VERSION", "file_size", "from_bytes", "load_compressed", "save_compressed", "to_bytes"]

CODECS = ("none", "zlib", "zstd")
_MOST = {"none": 1, "zlib": 1032, "zstd": ZSTD_LIMIT}
"""How many times its length a stream of a codec can grow at most."""
_CHANNELS = {"sh0": 3, "opacity": 1, "scale": 3, "rotation": 4}


def save_compressed(
    path: str | os.PathLike, compressed: CompressedScene | SteppedScene, *, codec: str = "zlib"
) -> None:
    """Writes a compressed scene by one rename.

    Args:
      path: of the file.
      compressed: what `quantize` or `quantize_steps` made.
      codec: of each stream: "none", "zlib", or "zstd" (needs `zstandard`, extra `splats`). Whole steps have an entropy
        coder of their own instead.

    Raises:
      ValueError: another codec.
      MissingExtra: "zstd" without its package.
    """
    replace_file(path, to_bytes(compressed, codec=codec))


def load_compressed(path: str | os.PathLike) -> CompressedScene | SteppedScene:
    """The compressed scene of a file.

    Raises:
      SceneFormatError: another kind of file; a newer version; damaged, with the byte at which.
    """
    path = Path(path)
    return from_bytes(path.read_bytes(), str(path))


def to_bytes(compressed: CompressedScene | SteppedScene, *, codec: str = "zlib") -> bytes:
    """The content of the file."""
    if codec not in CODECS:
        raise ValueError(f"codec: expected one of {CODECS}, got {codec!r}")
    if isinstance(compressed, SteppedScene):
        return write_stepped(compressed)
    header = {
        "codec": codec,
        "config": dataclasses.asdict(compressed.config),
        "degree": compressed.degree,
        "num_gaussians": compressed.num_gaussians,
        "num_sh": compressed.num_sh,
        "position": "fixed24" if compressed.positions.dtype == np.uint8 else "fp16",
        "origin": compressed.origin.tolist(),
        "step": compressed.step.tolist(),
    }
    return framed(1, header, [(name, _packed(array.tobytes(), codec)) for name, array in _streams(compressed)])


def from_bytes(content: bytes, where: str) -> CompressedScene | SteppedScene:
    """The compressed scene of a file's content; `where` names it in messages."""
    version, header, offset = opened(content, where)
    if version == VERSION:
        return read_stepped(header, content, offset, where)
    _check_header(header, len(content), where)
    codec, count, num_sh, degree = (header[key] for key in ("codec", "num_gaussians", "num_sh", "degree"))
    layout = list(_layout(header))
    if [entry[0] for entry in header["streams"]] != [name for name, *_ in layout]:
        raise SceneFormatError(
            f"{where}: expected the streams {[name for name, *_ in layout]}, got {header['streams']}"
        )
    arrays = {}
    for (name, dtype, shape), entry in zip(layout, header["streams"]):
        data, here = stream_at(content, offset, entry, where)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > _MOST[codec] * (len(data) + 1):
            raise SceneFormatError(f"{here}: {len(data)} bytes cannot hold {size}")
        arrays[name] = np.frombuffer(_unpacked(data, codec, size, here), dtype).reshape(shape).T
        offset += len(data)
    check_end(content, offset, where)
    config: QuantConfig = header["config"]
    codes = {}
    for name in CODED:
        bits, rows = getattr(config, name), num_sh if name == "shN" else count
        packed = _joined(arrays[f"{name}.codes"]) if bits == 16 else arrays[f"{name}.codes"]
        tables = (arrays[f"{name}.minimum"], arrays[f"{name}.scale"])
        codes[name] = Codes(bits, packed, bounds_of(rows, bits, config), *tables)
    positions = arrays["positions"]
    if header["position"] == "fp16":
        positions = _joined(positions)
    origin, step = (np.asarray(header[key], np.float64) for key in ("origin", "step"))
    return CompressedScene(config, degree, num_sh, positions, origin, step, codes)


def file_size(compressed: CompressedScene) -> int:
    """Bytes of the file without a codec."""
    return len(to_bytes(compressed, codec="none"))


def _streams(compressed: CompressedScene) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays as they are stored, transposed: what belongs to one channel is alike and lies together."""
    yield "positions", _planes(compressed.positions).T
    for name, part in compressed.codes.items():
        yield f"{name}.codes", _planes(part.packed).T
        yield f"{name}.minimum", part.minimum.T
        yield f"{name}.scale", part.scale.T


def _layout(header: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Name, dtype and shape of each stream of a file, by its header alone."""
    config, count = header["config"], header["num_gaussians"]
    yield "positions", "u1", (6 if header["position"] == "fp16" else 9, count)
    for name in CODED:
        bits, rows = getattr(config, name), header["num_sh"] if name == "shN" else count
        channels = _CHANNELS.get(name, 3 * ((header["degree"] + 1) ** 2 - 1))
        segments = 0 if bits == 16 or rows == 0 else len(bounds_of(rows, bits, config)) - 1
        yield f"{name}.codes", "u1", (2 * channels, rows) if bits == 16 else (channels, -(-rows * bits // 8))
        yield f"{name}.minimum", "<f4", (channels, segments)
        yield f"{name}.scale", "<f4", (channels, segments)


def _planes(array: np.ndarray) -> np.ndarray:
    """Bytes as they are; a float16 as two bytes, in two columns."""
    return array if array.dtype == np.uint8 else np.ascontiguousarray(array, "<f2").view(np.uint8)


def _joined(planes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(planes).view("<f2")


def _packed(raw: bytes, codec: str) -> bytes:
    if codec == "zlib":
        return zlib.compress(raw, 6)
    if codec == "zstd":
        return require("zstandard", "splats").ZstdCompressor(level=12).compress(raw)
    return raw


def _unpacked(data: bytes, codec: str, size: int, here: str) -> bytes:
    """Exactly `size` bytes, taken piece by piece, so that no more memory is used than is told."""
    raw = data
    if codec == "zlib":
        unpacker = zlib.decompressobj()
        try:
            raw = unpacker.decompress(data, size + 1)
        except zlib.error as error:
            raise SceneFormatError(f"{here} is damaged ({error})") from error
    elif codec == "zstd":
        raw = unpack_zstd(data, size, here)
    if len(raw) != size:
        raise SceneFormatError(f"{here}: expected {size} bytes, got {len(raw)}")
    return raw


def _check_header(header: Any, size: int, where: str) -> None:
    """Raises SceneFormatError for numbers that cannot be; turns the settings into a `QuantConfig`."""
    try:
        header["config"] = QuantConfig(**header["config"])
        whole = [header["num_gaussians"], header["num_sh"], header["degree"]]
        lengths = [entry[1] for entry in header["streams"]]
        fits = all(type(number) is int and number >= 0 for number in [*whole, *lengths])
        fits &= 0 <= whole[1] <= whole[0] and whole[0] > 0 and whole[2] <= 3
        fits &= header["codec"] in CODECS and header["position"] in ("fp16", "fixed24")
        fits &= all(np.shape(header[key]) == (3,) and np.isfinite(header[key]).all() for key in ("origin", "step"))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise not_understood(where, error) from error
    if not fits:
        raise SceneFormatError(f"{where}: the header has numbers that cannot be: {str(header)[:200]}")
    # Tables are made for as many segments as the settings ask for: they must be there.
    if whole[0] > max(lengths, default=0) * _MOST[header["codec"]]:
        raise SceneFormatError(f"{where}: {size} bytes cannot hold {whole[0]} Gaussians")
