"""Files in, files out: `compress` and `decompress`."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxlab.flexgaussian.cameras import Camera, orbit_cameras
from jaxlab.flexgaussian.compressed import dequantize
from jaxlab.flexgaussian.container import MAGIC, load_compressed, save_compressed
from jaxlab.flexgaussian.formats import load_scene, save_scene
from jaxlab.flexgaussian.scene import GaussianScene
from jaxlab.flexgaussian.searching import SearchResult, fixed_rates, search


@dataclasses.dataclass(frozen=True)
class CompressionReport:
    """What `compress` did.

    Attributes:
      status: "ok", or "target_not_met": the file has the best attempt.
      psnr: mean over the test views, dB.
      base_psnr: the same of the scene as it was; infinite where it is its own reference.
      bytes: of the file.
      ratio: bytes of the scene's plain .ply over `bytes`.
      num_gaussians: before and after.
      search: everything that was tried.
    """

    status: str
    psnr: float
    base_psnr: float
    bytes: int
    ratio: float
    num_gaussians: tuple[int, int]
    search: SearchResult


def compress(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    cameras: Sequence[Camera] | None = None,
    images: Sequence[Float[Array | np.ndarray, "h w 3"]] | None = None,
    prune_rate: float | None = None,
    sh_rate: float | None = None,
    codec: str = "zlib",
    **search_options: Any,
) -> CompressionReport:
    """Compresses a scene of any readable format into one file.

    Args:
      src: of the scene.
      dst: of the compressed file, written by one rename.
      cameras: views that matter; None: `orbit_cameras(scene, 8, 256, 192)`.
      images: photographs, one a camera; None: the scene's own renders are the reference.
      prune_rate: together with `sh_rate`: these rates, without a search.
      sh_rate: see there.
      codec: of the file.
      **search_options: of `search`: targets, method, bits.

    Raises:
      ValueError: one rate without the other; photographs without cameras; what `search` and `load_scene` raise.
    """
    if (prune_rate is None) != (sh_rate is None):
        raise ValueError(f"prune_rate, sh_rate: expected both or none, got {prune_rate} and {sh_rate}")
    if images is not None and cameras is None:
        raise ValueError("images: photographs need the cameras that took them")
    scene = jax.device_put(load_scene(src))  # on a CPU numpy and programs then read the same memory
    cameras = orbit_cameras(scene, 8, 256, 192) if cameras is None else cameras
    if prune_rate is None or sh_rate is None:
        result = search(scene, cameras, images, codec=codec, **search_options)
    else:
        result = fixed_rates(scene, cameras, images, prune_rate, sh_rate, codec=codec, **search_options)
    save_compressed(dst, result.compressed, codec=codec)
    sizes = scene.num_gaussians, result.compressed.num_gaussians
    return CompressionReport(result.status, result.psnr, result.base_psnr, result.bytes, result.ratio, sizes, result)


def decompress(src: str | os.PathLike, dst: str | os.PathLike) -> None:
    """Turns a compressed file back into a scene that any viewer opens: .ply, .splat or .spz by the name of `dst`."""
    save_scene(Path(dst), dequantize(load_compressed(src)))


def open_scene(path: str | os.PathLike, *, sanitize: bool = False) -> GaussianScene:
    """`load_scene`, of compressed files too."""
    return dequantize(load_compressed(path)) if is_compressed(path) else load_scene(path, sanitize=sanitize)


def is_compressed(path: str | os.PathLike) -> bool:
    """Whether a file begins as `compress` writes them."""
    with Path(path).open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
