"""Photographs with known poses, straightened so that pinhole cameras fit them."""

import os
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxlab.core import untrusted
from jaxlab.core.errors import require
from jaxlab.flexgaussian.cameras import Camera, cameras_from_transforms
from jaxlab.flexgaussian.scene import SceneFormatError

_LENS = ("k1", "k2", "p1", "p2")
_MOST_BENT = 1e6  # of a real lens they are below 10


def load_photographs(
    path: str | os.PathLike, width: int, height: int
) -> tuple[list[Float[np.ndarray, "h w 3"]], list[Camera]]:
    """The photographs of a NeRF `transforms.json` at one size, and their cameras, sorted by name.

    The radial and tangential distortion that the file tells (OpenCV's k1, k2, p1, p2) is taken out; what then lies
    beyond the photograph repeats its border.

    Args:
      path: of the file; frames without an image beside it are left out.
      width: in pixels of what is returned.
      height: the same.

    Returns:
      Images [height, width, 3] in [0, 1], float32, and one camera each.

    Raises:
      SceneFormatError: not such a file; an image that cannot be read.
      MissingExtra: without Pillow (extra `splats`).
    """
    path = Path(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lens distortion is ignored.*")
        cameras = [camera.scaled(width, height) for camera in cameras_from_transforms(path)]
    content = untrusted.read_object(path)
    frames = {Path(frame["file_path"]).name: {**content, **frame} for frame in content["frames"]}
    images = []
    for camera in cameras:
        frame = frames[camera.name]
        lens = [frame.get(key, 0.0) for key in _LENS]
        if not all(isinstance(number, int | float) and abs(number) < _MOST_BENT for number in lens):
            raise SceneFormatError(
                f"{path}: {camera.name}: expected numbers as its lens' {', '.join(_LENS)}, got {lens}"
            )
        images.append(straightened(read_image(path.parent / frame["file_path"], width, height), camera, lens))
    return images, cameras


def straightened(image: Float[np.ndarray, "h w 3"], camera: Camera, lens: list[float]) -> Float[np.ndarray, "h w 3"]:
    """The image that a camera without distortion would have taken, by bilinear interpolation.

    Args:
      image: [H, W, 3].
      camera: of the image, in its pixels.
      lens: OpenCV's k1, k2, p1, p2.
    """
    if not any(lens):
        return image
    k1, k2, p1, p2 = lens
    height, width = image.shape[:2]
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x, y = (u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy
    squared = x * x + y * y
    radial = 1 + squared * (k1 + squared * k2)
    bent_x = x * radial + 2 * p1 * x * y + p2 * (squared + 2 * x * x)
    bent_y = y * radial + p1 * (squared + 2 * y * y) + 2 * p2 * x * y
    # Cameras of strange numbers bend beyond all bounds, to infinity less infinity.
    column = np.nan_to_num(np.clip(bent_x * camera.fx + camera.cx - 0.5, 0, width - 1))
    row = np.nan_to_num(np.clip(bent_y * camera.fy + camera.cy - 0.5, 0, height - 1))
    left, top = (np.floor(part).astype(int) for part in (column, row))
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    across, down = (column - left)[..., None], (row - top)[..., None]
    upper = image[top, left] * (1 - across) + image[top, right] * across
    lower = image[bottom, left] * (1 - across) + image[bottom, right] * across
    return (upper * (1 - down) + lower * down).astype(np.float32)


def read_image(path: Path, width: int, height: int) -> Float[np.ndarray, "h w 3"]:
    """A photograph (PNG, JPEG, WebP or GIF) at one size, in [0, 1]; box filtered.

    Raises:
      SceneFormatError: not an image that can be read.
      MissingExtra: without Pillow (extra `splats`).
    """
    pillow = require("PIL.Image", "splats")
    try:
        image = untrusted.read_image(path, "splats")
    except (OSError, ValueError) as error:
        raise SceneFormatError(f"{path}: not an image that can be read ({error})") from error
    return np.asarray(image.convert("RGB").resize((width, height), pillow.Resampling.BOX), np.float32) / 255
