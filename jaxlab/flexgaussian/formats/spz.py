"""Niantic's .spz, versions 1 to 4: byte-quantised planes, gzip or Zstandard, axes right-up-back."""

import struct
import zlib

import numpy as np

from jaxlab.flexgaussian.formats.quaternions import from_smallest_three, smallest_three
from jaxlab.flexgaussian.formats.values import byte, logit, sigmoid
from jaxlab.flexgaussian.harmonics import FLIP_YZ
from jaxlab.flexgaussian.scene import GaussianScene, SceneFormatError
from jaxlab.flexgaussian.unpacking import ZSTD_LIMIT, unpack_zstd

MAGIC = b"NGSP"
_HEADER = struct.Struct("<4sIIBBBB")
_FRACTIONAL_BITS = 12
FURTHEST = (1 << 23 - _FRACTIONAL_BITS) - 2.0**-_FRACTIONAL_BITS
"""Coordinates below this can be written."""
_COLOR_SCALE = 0.15
_GZIP_LIMIT = 1032
"""Deflate cannot shrink anything further than that."""
_FLIP = np.array([1, -1, -1], np.float32)
_LEVELS_10 = (1 << 9) - 1
_BUCKETS = (8, 16)
"""What a byte of a harmonic is rounded to, of degree 1 and above: five bits and four."""


def read(content: bytes, where: str) -> GaussianScene:
    """The scene of an .spz file, turned into the frame of .ply (y down, z forward).

    Raises:
      SceneFormatError: another version; damaged; shorter than its header promises.
      MissingExtra: version 4 without the package `zstandard` (extra `splats`).
    """
    if content[:2] == b"\x1f\x8b":
        content = _gunzipped(content, where)
    version, count, degree, fractional_bits, streams = _header(content, where)
    sizes = _sizes(version, count, degree)
    if version == 4:
        planes = _decompressed(content, where, sizes, streams)
    else:
        planes, offset = [], _HEADER.size
        for size in sizes:
            planes.append(content[offset : offset + size])
            offset += size
        if len(content) < offset:
            raise SceneFormatError(
                f"{where}: {count} Gaussians need {offset} bytes, the data ends at byte {len(content)}"
            )
    positions, alphas, colors, scales, rotations, harmonics = (np.frombuffer(plane, np.uint8) for plane in planes)
    shN = (harmonics.reshape(count, -1, 3).astype(np.float32) - 128) / 128
    return GaussianScene(
        means=_positions(positions.reshape(count, -1), version, fractional_bits) * _FLIP,
        log_scales=scales.reshape(count, 3).astype(np.float32) / 16 - 10,
        quats=_rotations(rotations.reshape(count, -1), version) * np.array([1, 1, -1, -1], np.float32),
        opacity_logit=logit(alphas / 255),
        sh0=((colors.reshape(count, 3) / 255 - 0.5) / _COLOR_SCALE).astype(np.float32),
        shN=shN * FLIP_YZ[: shN.shape[1], None],
    )


def write(scene: GaussianScene) -> bytes:
    """The file's content, version 3: positions in steps of 1/4096, harmonics of 5 bits (degree 1) and 4 bits.

    Raises:
      ValueError: a coordinate of 2048 or more, which the form cannot hold.
    """
    fixed = np.rint(np.asarray(scene.means, np.float64) * _FLIP * (1 << _FRACTIONAL_BITS)).astype(np.int64)
    if np.abs(fixed).max() >= 1 << 23:
        furthest = float(np.abs(scene.means).max())
        raise ValueError(f"scene.means: .spz holds coordinates below 2048, got one of {furthest:g}")
    positions = fixed[..., None] >> np.array([0, 8, 16]) & 255
    flipped = scene.shN * FLIP_YZ[: scene.shN.shape[1], None]
    planes = [
        positions.astype(np.uint8),
        byte(sigmoid(scene.opacity_logit) * 255),
        byte(scene.sh0 * (_COLOR_SCALE * 255) + 127.5),
        byte((scene.log_scales + 10) * 16),
        _packed_rotations(scene.quats * np.array([1, 1, -1, -1], np.float32)),
        _packed_harmonics(flipped),
    ]
    header = _HEADER.pack(MAGIC, 3, scene.num_gaussians, scene.degree, _FRACTIONAL_BITS, 0, 0)
    raw = header + b"".join(plane.tobytes() for plane in planes)
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)  # gzip without a time stamp
    return packer.compress(raw) + packer.flush()


def _header(content: bytes, where: str) -> tuple[int, int, int, int, int]:
    if len(content) < _HEADER.size or content[:4] != MAGIC:
        raise SceneFormatError(f"{where}: expected the magic NGSP and {_HEADER.size} bytes of header")
    _, version, count, degree, fractional_bits, _, streams = _HEADER.unpack_from(content)
    if not 1 <= version <= 4:
        raise SceneFormatError(f"{where}: .spz version {version} is not known, expected 1 to 4")
    if degree > 3:
        raise SceneFormatError(f"{where}: harmonics of degree {degree} are not known, expected 0 to 3")
    if fractional_bits > 23:
        raise SceneFormatError(f"{where}: expected at most 23 fractional bits, got {fractional_bits}")
    return version, count, degree, fractional_bits, streams


def _sizes(version: int, count: int, degree: int) -> list[int]:
    position, rotation = (6 if version == 1 else 9), (3 if version < 3 else 4)
    return [count * size for size in (position, 1, 3, 3, rotation, 3 * ((degree + 1) ** 2 - 1))]


def _gunzipped(content: bytes, where: str) -> bytes:
    """No more of a gzip member than its own .spz header asks for."""
    unpacker = zlib.decompressobj(31)
    try:
        raw = unpacker.decompress(content, _HEADER.size)
        version, count, degree, *_ = _header(raw, where)
        expected = _HEADER.size + sum(_sizes(version, count, degree))
        if expected > _GZIP_LIMIT * len(content):
            raise SceneFormatError(f"{where}: {len(content)} bytes cannot hold the {count} Gaussians of the header")
        return raw + unpacker.decompress(unpacker.unconsumed_tail, expected - len(raw)) if expected > len(raw) else raw
    except zlib.error as error:
        raise SceneFormatError(f"{where}: damaged gzip data ({error})") from error


def _decompressed(content: bytes, where: str, sizes: list[int], streams: int) -> list[bytes]:
    present = [size for size in sizes if size]
    if streams != len(present):
        raise SceneFormatError(f"{where}: expected {len(present)} streams, the header tells {streams}")
    if len(content) < 32 + 16 * streams:
        raise SceneFormatError(f"{where}: the file ends at byte {len(content)}, inside of its header")
    (table,) = struct.unpack_from("<I", content, 16)
    offset = table + 16 * streams
    if offset > len(content):
        raise SceneFormatError(f"{where}: the table of streams ends at byte {offset}, the file at {len(content)}")
    planes = []
    for stream, size in enumerate(present):
        packed, raw = struct.unpack_from("<QQ", content, table + 16 * stream)
        if raw != size or packed > len(content) - offset:
            raise SceneFormatError(
                f"{where}: stream {stream} at byte {offset}: expected {size} bytes, told {raw} in {packed}"
            )
        if size > ZSTD_LIMIT * max(packed, 1):
            raise SceneFormatError(f"{where}: stream {stream} at byte {offset}: {packed} bytes cannot hold {size}")
        plane = unpack_zstd(content[offset : offset + packed], size, f"{where}: stream {stream} at byte {offset}")
        if len(plane) != size:
            raise SceneFormatError(
                f"{where}: stream {stream} at byte {offset}: expected {size} bytes, got {len(plane)}"
            )
        planes.append(plane)
        offset += packed
    rest = iter(planes)
    return [next(rest) if size else b"" for size in sizes]


def _positions(planes: np.ndarray, version: int, fractional_bits: int) -> np.ndarray:
    if version == 1:
        return np.ascontiguousarray(planes).view("<f2").astype(np.float32)
    low, middle, high = np.moveaxis(planes.reshape(len(planes), 3, 3).astype(np.int32), -1, 0)
    fixed = (high << 24 | middle << 16 | low << 8) >> 8  # the shift back carries the sign
    return (fixed / (1 << fractional_bits)).astype(np.float32)


def _rotations(planes: np.ndarray, version: int) -> np.ndarray:
    if version < 3:
        xyz = planes.astype(np.float64) / 127.5 - 1
        return from_smallest_three(xyz, np.zeros(len(xyz), np.intp))
    words = np.ascontiguousarray(planes).view("<u4")[:, 0]
    fields = (words[:, None] >> np.array([20, 10, 0], np.uint32)) & np.uint32(1023)
    parts = (fields & _LEVELS_10) / _LEVELS_10 * np.sqrt(0.5) * np.where(fields >> 9, -1, 1)
    xyzw = from_smallest_three(parts, (words >> 30).astype(np.intp))
    return xyzw[:, [3, 0, 1, 2]]


def _packed_rotations(quats: np.ndarray) -> np.ndarray:
    parts, largest = smallest_three(quats[:, [1, 2, 3, 0]])
    levels = np.minimum(np.rint(np.abs(parts) / np.sqrt(0.5) * _LEVELS_10), _LEVELS_10).astype(np.uint32)
    fields = levels | (parts < 0).astype(np.uint32) << 9
    words = largest.astype(np.uint32) << 30 | fields[:, 0] << 20 | fields[:, 1] << 10 | fields[:, 2]
    return words.astype("<u4").view(np.uint8)


def _packed_harmonics(shN: np.ndarray) -> np.ndarray:
    bucket = np.where(np.arange(shN.shape[1]) < 3, *_BUCKETS)[:, None]
    return byte(np.rint(np.rint(shN * 128 + 128) / bucket) * bucket)
