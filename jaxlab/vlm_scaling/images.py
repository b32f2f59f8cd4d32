"""Images as arrays, as data URLs, as grey or black stand-ins, and as labels that tell one from another."""

import base64
import hashlib
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.core.untrusted import read_image

_MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}


def pixels(image: Any) -> np.ndarray:
    """uint8 [H, W, 3] of an array, a path, or the bytes of an image file (which take Pillow, extra `images`).

    Files are PNG, JPEG, WebP or GIF.

    Raises:
      MissingExtra: Pillow is needed and not installed.
      ValueError: an array of another shape or dtype, or a file that is no image.
      FileNotFoundError: no such file.
    """
    if isinstance(image, bytes | str | os.PathLike):
        return np.asarray(read_image(image, "images").convert("RGB"))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(f"image: expected uint8 of shape [H, W, 3], got {array.dtype} of shape {array.shape}")
    return array


def uniform(image: Any, value: int) -> np.ndarray:
    """An image of the same size in one grey: 128 for the grey control, 0 for zero pixels."""
    return np.full_like(pixels(image), value)


def data_url(image: Any) -> str:
    """An image as a `data:` URL; files go as they are, arrays as PNG.

    Raises:
      ValueError: bytes of no known image format, or an array of another shape or dtype.
    """
    if isinstance(image, str | os.PathLike):
        image = Path(image).read_bytes()
    if not isinstance(image, bytes):
        image = _png(pixels(image))
    kind = next((kind for magic, kind in _MAGIC.items() if image.startswith(magic)), None)
    if kind is None:
        raise ValueError(f"image: expected a PNG, JPEG, GIF or WebP file, got bytes that begin with {image[:8]!r}")
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


def label(images: Sequence[Any]) -> str:
    """A digest that equal images share; "" without images."""
    if not images:
        return ""
    state = hashlib.blake2b(digest_size=8)
    for image in images:
        if isinstance(image, bytes):
            content = image
        elif isinstance(image, str | os.PathLike):
            content = os.fspath(image).encode()
        else:
            array = pixels(image)
            content = repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()
        state.update(struct.pack("<q", len(content)) + content)
    return state.hexdigest()


def _png(array: np.ndarray) -> bytes:
    """Eight bits, three channels, no filter."""
    height, width, _ = array.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)
    rows[:, 1:] = array.reshape(height, -1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)
