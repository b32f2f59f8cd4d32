"""Reading and writing a scene in any of the formats."""

import os
from pathlib import Path

from jaxlab.core.folders import replace_file
from jaxlab.flexgaussian.formats import compressed_ply, ply, sog, splat, spz
from jaxlab.flexgaussian.formats.ply_header import read_header
from jaxlab.flexgaussian.scene import GaussianScene, SceneFormatError, checked

_WRITERS = {".ply": ply.write, ".splat": splat.write, ".spz": spz.write}


def load_scene(path: str | os.PathLike, *, sanitize: bool = False) -> GaussianScene:
    """A scene from .ply, compressed .ply, .splat, .spz or .sog, in the frame of 3D Gaussian Splatting (y down).

    The content decides; the extension only where the content cannot tell, which is .splat. Headers are checked against
    the file's length before anything is allocated.

    Args:
      path: of the file.
      sanitize: drop Gaussians with NaN or infinite numbers, with a warning, where they are an error otherwise.

    Returns:
      The scene, numpy arrays, with the file's own degree of harmonics.

    Raises:
      FileNotFoundError: no such file.
      SceneFormatError: not a scene; damaged; a property is missing.
      ValueError: no Gaussians; NaN or infinite numbers; a number of harmonics that no degree has.
      MissingExtra: a format that needs a package of the extra `splats`.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(b"ply"):
        elements = read_header(path)
        if "vertex" not in elements:
            raise SceneFormatError(f"{path}: the PLY file has no element 'vertex', only {sorted(elements)}")
        reader = compressed_ply.read if "chunk" in elements else ply.read
        scene = reader(path, elements)
    elif start.startswith((b"\x1f\x8b", spz.MAGIC)):
        scene = spz.read(path.read_bytes(), str(path))
    elif start.startswith(b"PK"):
        scene = sog.read(path.read_bytes(), str(path))
    elif path.suffix.lower() == ".splat":
        scene = splat.read(path.read_bytes(), str(path))
    else:
        raise SceneFormatError(f"{path}: expected .ply, .splat, .spz or .sog, got a file that starts with {start!r}")
    return checked(scene, sanitize=sanitize)


def save_scene(path: str | os.PathLike, scene: GaussianScene) -> None:
    """Writes a scene as .ply, .splat or .spz, by one rename.

    .splat drops the harmonics (with a warning) and rounds colours and rotations to 8 bits; .spz rounds everything.

    Raises:
      ValueError: another extension; an invalid scene; coordinates that .spz cannot hold.
    """
    path = Path(path)
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None or path.name.lower().endswith(".compressed.ply"):
        raise ValueError(f"path: expected a name that ends in {', '.join(_WRITERS)}, got {path.name!r}")
    replace_file(path, writer(checked(scene)))
