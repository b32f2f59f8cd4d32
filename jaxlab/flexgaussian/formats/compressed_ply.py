"""SuperSplat's compressed .ply: chunks of 256 Gaussians with bounds, four packed 32-bit words a Gaussian."""

from pathlib import Path

import numpy as np

from jaxlab.flexgaussian.formats.ply import rest_names
from jaxlab.flexgaussian.formats.ply_header import Element, read_rows
from jaxlab.flexgaussian.formats.quaternions import from_smallest_three
from jaxlab.flexgaussian.formats.values import logit
from jaxlab.flexgaussian.harmonics import C0
from jaxlab.flexgaussian.scene import GaussianScene, SceneFormatError

_CHUNK = 256
_AXES, _COLORS = ("x", "y", "z"), ("r", "g", "b")


def read(path: Path, elements: dict[str, Element]) -> GaussianScene:
    """The scene of a compressed .ply.

    Raises:
      SceneFormatError: missing properties; too few chunks or harmonics for its vertices.
    """
    chunk, vertex, harmonics = elements["chunk"], elements["vertex"], elements.get("sh")
    count = vertex.count
    if chunk.count * _CHUNK < count:
        raise SceneFormatError(f"{path}: {chunk.count} chunks of {_CHUNK} are too few for {count} vertices")
    if harmonics is not None and harmonics.count != count:
        raise SceneFormatError(f"{path}: {harmonics.count} rows of harmonics for {count} vertices")
    bounds, words = read_rows(path, chunk), read_rows(path, vertex)

    def column(name: str) -> np.ndarray:
        return vertex.column(words, name).astype(np.uint32)

    def bounded(units: np.ndarray, names: tuple[str, ...], prefix: str = "") -> np.ndarray:
        low, high = (
            np.stack([chunk.column(bounds, f"{side}_{prefix}{name}") for name in names], axis=1).repeat(_CHUNK, axis=0)
            for side in ("min", "max")
        )
        return (low[:count] * (1 - units) + high[:count] * units).astype(np.float32)

    color = _units(column("packed_color"), (8, 8, 8, 8))
    rgb = color[:, :3]
    if "min_r" in (chunk.dtype.names or ()):
        rgb = bounded(rgb, _COLORS)
    rotation = column("packed_rotation")
    smallest = (_units(rotation, (2, 10, 10, 10))[:, 1:] - 0.5) * np.sqrt(2)
    return GaussianScene(
        means=bounded(_units(column("packed_position"), (11, 10, 11)), _AXES),
        log_scales=bounded(_units(column("packed_scale"), (11, 10, 11)), _AXES, "scale_"),
        quats=from_smallest_three(smallest, (rotation >> 30).astype(np.intp)),
        opacity_logit=logit(color[:, 3]),
        sh0=((rgb - 0.5) / C0).astype(np.float32),
        shN=_harmonics(path, harmonics, count),
    )


def _units(words: np.ndarray, bits: tuple[int, ...]) -> np.ndarray:
    """The fields of 32-bit words, the first in the top bits, each as a fraction of its largest value."""
    shifts = 32 - np.cumsum(bits)
    largest = (1 << np.asarray(bits)) - 1
    return ((words[:, None] >> shifts.astype(np.uint32)) & largest.astype(np.uint32)) / largest


def _harmonics(path: Path, element: Element | None, count: int) -> np.ndarray:
    if element is None:
        return np.zeros((count, 0, 3), np.float32)
    names = rest_names(element.dtype.names or ())
    rows = read_rows(path, element)
    codes = np.stack([element.column(rows, name) for name in names], axis=1).astype(np.float32)
    units = np.where(codes == 0, 0, np.where(codes == 255, 1, (codes + 0.5) / 256))
    return np.ascontiguousarray(((units - 0.5) * 8).reshape(count, 3, -1).transpose(0, 2, 1), np.float32)
