"""Images in and out: of any mode or size to RGB numbers, and back to bytes."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from jaxlab.core import untrusted
from jaxlab.core.errors import require

MULTIPLE = 8  # of both sides: what the autoencoder shrinks by


def prepare_image(
    image: Any, *, size: int | tuple[int, int] | None = None, multiple: int = MULTIPLE
) -> Float[np.ndarray, "H W 3"]:
    """An image as float32 RGB in [0, 1].

    Args:
      image: a PIL image of any mode, turned as its EXIF data say, or an array `[H, W]`, `[H, W, 1]`, `[H, W, 3]` or
        `[H, W, 4]`: uint8, uint16 (divided by 65535), or floats in [0, 1]. Transparent pixels are put on white, with a
        warning.
      size: (H, W), or the side of a square, to resize to (bicubic, as Pillow does, not keeping proportions); None: as
        it is.
      multiple: both sides must be multiples of it afterwards.

    Raises:
      ValueError: another shape or dtype, damaged EXIF data, pixels that are not finite or outside [0, 1], or a size
        that does not fit.
      MissingExtra: resizing, without Pillow.
    """
    pixels = _from_pil(image) if _is_pil(image) else np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or 0 in pixels.shape:
        came = pixels.shape if np.shape(image) else type(image).__name__
        raise ValueError(f"image: expected a PIL image, or an array [H, W] or [H, W, 1, 3 or 4], got {came}")
    if pixels.dtype != np.uint8 or pixels.shape[-1] == 4:
        pixels = _on_white(_to_unit(pixels))
    if size is not None:
        pixels = _resized(pixels, (size, size) if isinstance(size, int) else size)
    pixels = np.broadcast_to(_to_unit(pixels), (*pixels.shape[:2], 3))
    height, width, _ = pixels.shape
    if height % multiple or width % multiple:
        raise ValueError(
            f"image: expected height and width in multiples of {multiple}, got {height}x{width}; "
            "give a size to resize to"
        )
    return np.ascontiguousarray(pixels, np.float32)


def to_uint8(image: Float[Array | np.ndarray, "H W *channels"]) -> UInt8[np.ndarray, "H W *channels"]:
    """Numbers in [0, 1], others cut off, as bytes, rounded to even."""
    return np.rint(np.clip(np.asarray(image, np.float32), 0, 1) * 255).astype(np.uint8)


def read_image(path: str | os.PathLike[str]) -> Any:
    """The PIL image of a PNG, JPEG, WebP or GIF file, read completely.

    Raises:
      FileNotFoundError: no such file.
      ValueError: of another format, or damaged.
      MissingExtra: Pillow is absent.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"image: {path} does not exist")
    return untrusted.read_image(path, "images")


def write_image(path: str | os.PathLike[str], image: Shaped[Array | np.ndarray, "H W *channels"]) -> None:
    """Writes bytes, or floats in [0, 1], in the format that the path's ending names.

    Raises:
      ValueError: an ending that Pillow does not know.
      MissingExtra: Pillow is absent.
    """
    pil = require("PIL.Image", "images")
    pixels = np.asarray(image)
    picture = pil.fromarray(pixels if pixels.dtype == np.uint8 else to_uint8(pixels))
    if Path(path).suffix.lower() not in pil.registered_extensions():
        raise ValueError(f"path: {str(path)!r} does not end like an image file, for example in .png")
    picture.save(path)


def _is_pil(image: Any) -> bool:
    return hasattr(image, "getbands") and hasattr(image, "convert")


def _from_pil(image: Any) -> np.ndarray:
    from PIL import ImageOps

    try:
        image = ImageOps.exif_transpose(image)
    except untrusted.IMAGE_ERRORS as error:
        raise ValueError(f"image: its EXIF data are damaged ({error})") from error
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode in ("I", "F"):
        raise ValueError(f"image: mode {image.mode!r} does not say its range; give an array of floats in [0, 1]")
    return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _to_unit(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"image: expected uint8, uint16 or floats, got {pixels.dtype}")
    pixels = pixels.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError(f"image: {int((~np.isfinite(pixels)).sum())} values are not finite")
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        raise ValueError(f"image: expected floats in [0, 1], got {low:.6g} to {high:.6g}")
    return pixels


def _on_white(pixels: np.ndarray) -> np.ndarray:
    if pixels.shape[-1] != 4:
        return pixels
    warnings.warn("image: its transparent pixels are put on white", stacklevel=3)
    alpha = pixels[..., 3:]
    return pixels[..., :3] * alpha + (1 - alpha)


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if min(size) < 1:
        raise ValueError(f"size: expected at least 1 pixel each way, got {size[0]}x{size[1]}")
    if pixels.shape[:2] == tuple(size):
        return pixels
    pil = require("PIL.Image", "images")
    # Bytes as Pillow resizes them; of floats, for which it has no colours, one channel after the other.
    if pixels.dtype == np.uint8:
        parts = [pixels[..., 0] if pixels.shape[-1] == 1 else pixels]
    else:
        parts = list(np.moveaxis(pixels, -1, 0))
    resized = [
        np.asarray(pil.fromarray(np.ascontiguousarray(part)).resize((size[1], size[0]), pil.Resampling.BICUBIC))
        for part in parts
    ]
    if pixels.dtype == np.uint8:
        return resized[0].reshape(*size, -1)
    return np.clip(np.stack(resized, axis=-1), 0, 1)
