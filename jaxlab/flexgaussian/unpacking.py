"""Decompression within bounds."""

from jaxlab.core.errors import require
from jaxlab.flexgaussian.scene import SceneFormatError

ZSTD_LIMIT = 1 << 15
"""How many times its length a Zstandard frame can grow: a block of one repeated byte."""
_PIECE = 1 << 20


def unpack_zstd(data: bytes, size: int, here: str) -> bytes:
    """At most `size` + 1 bytes of Zstandard data, taken piece by piece; `here` names it in messages.

    Raises:
      SceneFormatError: damaged data.
      MissingExtra: without `zstandard` (extra `splats`).
    """
    zstandard = require("zstandard", "splats")
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data)
    pieces, left = [], size + 1
    try:
        while left and (piece := reader.read(min(left, _PIECE))):
            pieces.append(piece)
            left -= len(piece)
    except zstandard.ZstdError as error:
        raise SceneFormatError(f"{here} is damaged ({error})") from error
    return b"".join(pieces)
