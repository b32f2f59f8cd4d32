"""From pixels to patches: sizes that patches tile, and the rows that the encoder reads."""

import math

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxlab.core.errors import require

_PATCH, _MERGE, _FRAMES = 14, 2, 2
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_MAX_RATIO = 200
MIN_PIXELS, MAX_PIXELS = 3136, 1003520


def smart_resize(
    h: int, w: int, *, factor: int = _PATCH * _MERGE, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """The size to which an image is scaled: multiples of `factor`, about its shape, an area within bounds.

    Args:
        h: height in pixels.
        w: width.
        factor: pixels of a token, either side.
        min_pixels: smaller areas are scaled up to about this.
        max_pixels: larger ones down to at most this.

    Raises:
        ValueError: a side below 1, or one over 200 times the other.
    """
    if min(h, w) < 1:
        raise ValueError(f"image sides: expected at least 1, got {h} x {w}")
    if max(h, w) / min(h, w) > _MAX_RATIO:
        raise ValueError(f"image sides: expected a ratio of at most {_MAX_RATIO}, got {h} x {w}")
    rounded = round(h / factor) * factor, round(w / factor) * factor
    area = rounded[0] * rounded[1]
    if area > max_pixels:
        shrink = math.sqrt(h * w / max_pixels)
        h, w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (h, w))
        return h, w
    if area < min_pixels:
        stretch = math.sqrt(min_pixels / (h * w))
        h, w = (math.ceil(side * stretch / factor) * factor for side in (h, w))
        return h, w
    return rounded


def preprocess_image(
    image: UInt8[np.ndarray, "h w 3"], *, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[Float[np.ndarray, "n 1176"], Int[np.ndarray, "1 3"]]:
    """Scales (bicubic, antialiased, on 8 bits), normalises and cuts an image.

    Args:
        image: `[H,W,3]` uint8, RGB.
        min_pixels: of `smart_resize`.
        max_pixels: of `smart_resize`.

    Returns:
        pixel_values `[n, 1176]` float32: rows run over (h/28, w/28, 2, 2), columns over (channel, frame, y, x), the
        frame repeated; and grid_thw `[1,3]`, the patches along (time, height, width).

    Raises:
        ValueError: not three colours of 8 bits, or sides that `smart_resize` refuses.
        MissingExtra: Pillow is absent (extra "images").
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected uint8 [H, W, 3], got {image.dtype} {image.shape}")
    height, width = smart_resize(*image.shape[:2], min_pixels=min_pixels, max_pixels=max_pixels)
    pillow = require("PIL.Image", "images")
    scaled = np.asarray(pillow.fromarray(image).resize((width, height), pillow.Resampling.BICUBIC))
    pixels = (scaled.astype(np.float32) / 255 - _MEAN) / _STD
    rows, columns = height // _PATCH, width // _PATCH
    tiled = pixels.reshape(rows // _MERGE, _MERGE, _PATCH, columns // _MERGE, _MERGE, _PATCH, 3)
    patches = tiled.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    patches = np.broadcast_to(patches, (*patches.shape[:5], _FRAMES, _PATCH, _PATCH))
    grid = np.array([[1, rows, columns]], np.int32)
    return np.ascontiguousarray(patches.reshape(rows * columns, -1)), grid
