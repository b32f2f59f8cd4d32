"""Pictures of scenes: a turn around one, and one beside what became of it."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jaxlab.core import progress, replace_file
from jaxlab.core.errors import require
from jaxlab.flexgaussian.cameras import Camera, orbit_cameras
from jaxlab.flexgaussian.metrics import psnr
from jaxlab.flexgaussian.rasteriser import render
from jaxlab.flexgaussian.scene import GaussianScene

WHITE = (1.0, 1.0, 1.0)


def pixels(image: Float[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """An image in [0, 1], clamped to it, as bytes."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def turntable(
    scene: GaussianScene,
    frames: int = 24,
    width: int = 320,
    height: int = 240,
    *,
    elevation: float = 20.0,
    background: tuple[float, float, float] = WHITE,
) -> list[UInt8[np.ndarray, "h w 3"]]:
    """What a camera sees on its way once around a scene, as `orbit_cameras` goes: the last frame leads to the first.

    Args:
      scene: N Gaussians.
      frames: how many, at least 1.
      width: of each in pixels.
      height: the same.
      elevation: of the camera above the middle, in degrees.
      background: red, green, blue in [0, 1].

    Raises:
      ValueError: no frames; an elevation that is not between -90 and 90.
    """
    if frames < 1:
        raise ValueError(f"frames: expected at least 1, got {frames}")
    cameras = orbit_cameras(scene, frames, width, height, elevation=elevation)
    return [pixels(np.asarray(render(scene, camera, background))) for camera in progress(cameras, "rendering")]


def save_animation(path: str | os.PathLike, images: Sequence[UInt8[np.ndarray, "h w 3"]], *, fps: float = 12.0) -> None:
    """Writes images as an animation that repeats for ever, by one rename.

    Args:
      path: .webp, or .gif, which has 256 colours a frame.
      images: of one size.
      fps: frames a second.

    Raises:
      ValueError: another extension; no images, or of several sizes; not a rate.
      MissingExtra: without Pillow (extra `splats`).
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".webp", ".gif"):
        raise ValueError(f"path: expected a name that ends in .webp or .gif, got {path.name!r}")
    shapes = sorted({image.shape for image in images})
    if len(shapes) != 1:
        raise ValueError(f"images: expected at least one, all of one shape, got {shapes or 'none'}")
    if not 0 < fps <= 1000:
        raise ValueError(f"fps: expected more than 0 and at most 1000, got {fps}")
    pillow = require("PIL.Image", "splats")
    first, *rest = (pillow.fromarray(image) for image in images)
    options: dict[str, Any] = {"quality": 85, "method": 4} if kind == ".webp" else {"optimize": False}
    content = io.BytesIO()
    duration = round(1000 / fps)
    first.save(content, kind[1:], save_all=True, append_images=rest, duration=duration, loop=0, **options)
    replace_file(path, content.getvalue())


def side_by_side(
    original: GaussianScene,
    compressed: GaussianScene,
    camera: Camera,
    *,
    background: tuple[float, float, float] = WHITE,
    gain: float = 4.0,
) -> Any:
    """What a camera sees of a scene, of what became of it, and `gain` times the difference, with the PSNR."""
    from matplotlib.figure import Figure

    before, after = (np.clip(np.asarray(render(each, camera, background)), 0, 1) for each in (original, compressed))
    ratio = psnr(after, before)
    panels = {
        f"original: {original.num_gaussians:,} Gaussians": before,
        f"compressed: {compressed.num_gaussians:,}, {ratio:.1f} dB": after,
        f"{gain:g} times the difference": np.clip(gain * np.abs(after - before), 0, 1),
    }
    drawn = Figure(figsize=(10.5, 3.5 * camera.height / camera.width + 0.4), layout="constrained")
    for axes, (title, image) in zip(drawn.subplots(1, 3), panels.items()):
        axes.imshow(image)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    return drawn
