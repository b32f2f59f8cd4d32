"""The frame of a compressed file: a header that tells every stream's length and checksum, then the streams.

    bytes   content
    4       magic JXFG
    2       version: 1, the paper's codes; 2, whole steps
    4       length of the header
    4       CRC-32 of the header
    ...     the header, JSON: settings, numbers, and one entry a stream
    ...     the streams, one after the other

Nothing in it depends on time or place: the same scene gives the same bytes.
"""

import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any

from jaxlab.flexgaussian.scene import SceneFormatError

MAGIC, VERSION = b"JXFG", 2
_START = struct.Struct("<4sHII")
_HEADER_LIMIT = 1 << 20


def framed(version: int, header: dict[str, Any], streams: Sequence[tuple[str, bytes]]) -> bytes:
    """The content of a file."""
    entries = [[name, len(data), zlib.crc32(data)] for name, data in streams]
    text = json.dumps({**header, "streams": entries}, sort_keys=True, separators=(",", ":")).encode()
    start = _START.pack(MAGIC, version, len(text), zlib.crc32(text))
    return b"".join([start, text, *(data for _, data in streams)])


def opened(content: bytes, where: str) -> tuple[int, Any, int]:
    """Version, header, whose values may be anything, and where the streams begin; `where` names the file in messages.

    Raises:
      SceneFormatError: another kind of file; a newer version; a damaged header.
    """
    if len(content) < _START.size or content[:4] != MAGIC:
        raise SceneFormatError(f"{where}: not a file of compressed Gaussians (no {MAGIC.decode()} at its start)")
    _, version, length, checksum = _START.unpack_from(content)
    if version > VERSION:
        raise SceneFormatError(f"{where}: version {version} is newer than what this library reads ({VERSION})")
    text = content[_START.size : _START.size + length]
    if length > _HEADER_LIMIT or len(text) < length or zlib.crc32(text) != checksum:
        raise SceneFormatError(f"{where}: the header at byte {_START.size} is damaged or cut off")
    try:
        return version, json.loads(text), _START.size + length
    except (ValueError, RecursionError) as error:
        raise not_understood(where, error) from error


def not_understood(where: str, error: Exception) -> SceneFormatError:
    """A header in which something is missing or of another kind."""
    return SceneFormatError(f"{where}: the header is not understood ({error!r})")


def stream_at(content: bytes, offset: int, entry: Sequence[Any], where: str) -> tuple[bytes, str]:
    """A stream by its header's entry, and how messages call it.

    Raises:
      SceneFormatError: cut off or damaged, with the byte at which.
    """
    name, length, checksum = entry
    here = f"{where}: stream {name!r} at byte {offset}"
    data = content[offset : offset + length]
    if len(data) < length:
        raise SceneFormatError(f"{here} needs {length} bytes, the file ends at byte {len(content)}")
    if zlib.crc32(data) != checksum:
        raise SceneFormatError(f"{here} is damaged: its checksum differs")
    return data, here


def check_end(content: bytes, offset: int, where: str) -> None:
    """Raises SceneFormatError where something follows the last stream."""
    if offset != len(content):
        raise SceneFormatError(f"{where}: expected the file to end at byte {offset}, it has {len(content)}")
