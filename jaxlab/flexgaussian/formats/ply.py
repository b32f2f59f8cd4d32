"""The .ply layout of 3D Gaussian Splatting's own code: one float32 property a number, harmonics channel by channel."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxlab.flexgaussian.formats.ply_header import Element, read_rows
from jaxlab.flexgaussian.harmonics import degree_of
from jaxlab.flexgaussian.scene import GaussianScene, SceneFormatError

_POSITION, _NORMAL = ("x", "y", "z"), ("nx", "ny", "nz")
_SH0 = ("f_dc_0", "f_dc_1", "f_dc_2")
_SCALE, _ROTATION = ("scale_0", "scale_1", "scale_2"), ("rot_0", "rot_1", "rot_2", "rot_3")


def read(path: Path, elements: dict[str, Element]) -> GaussianScene:
    """The scene of a .ply, its properties in any order, others ignored.

    Raises:
      SceneFormatError: a property is missing, which the message names.
      ValueError: a number of `f_rest` properties that no degree has.
    """
    vertex = elements["vertex"]
    names = vertex.dtype.names or ()
    rest = rest_names(names)
    needed = (*_POSITION, *_SH0, *_SCALE, *_ROTATION, "opacity", *rest)
    missing = [name for name in needed if name not in names]
    if missing:
        raise SceneFormatError(f"{path}: the vertices have no property {', '.join(map(repr, missing))}")
    rows = read_rows(path, vertex)
    if {vertex.dtype[name] for name in names} == {np.dtype("<f4")}:
        table = rows.view("<f4").reshape(len(rows), len(names))
        place = {name: i for i, name in enumerate(names)}

        def columns(wanted: Sequence[str]) -> np.ndarray:
            places = [place[name] for name in wanted]
            if places == list(range(places[0], places[0] + len(places))):
                return table[:, places[0] : places[-1] + 1]
            return table[:, places]
    else:

        def columns(wanted: Sequence[str]) -> np.ndarray:
            return np.stack([rows[name] for name in wanted], axis=1)

    harmonics = np.zeros((len(rows), 0, 3), np.float32)
    if rest:
        harmonics = columns(rest).reshape(len(rows), 3, -1).transpose(0, 2, 1)
    return GaussianScene(
        means=_contiguous(columns(_POSITION)),
        log_scales=_contiguous(columns(_SCALE)),
        quats=_contiguous(columns(_ROTATION)),
        opacity_logit=_contiguous(rows["opacity"]),
        sh0=_contiguous(columns(_SH0)),
        shN=_contiguous(harmonics),
    )


def rest_names(names: Sequence[str]) -> list[str]:
    """The names of the higher harmonics, `f_rest_0` on, as many as there are.

    Raises:
      ValueError: a number of them that no degree has.
    """
    count = sum(name.startswith("f_rest_") for name in names)
    if count % 3:
        raise ValueError(f"f_rest: expected 3 x 0, 3, 8 or 15 properties, got {count}")
    degree_of(count // 3)
    return [f"f_rest_{i}" for i in range(count)]


def write(scene: GaussianScene) -> bytes:
    """The file's content, normals as zeros: 4 (17 + 3 K) bytes a Gaussian and a header."""
    count, higher = scene.num_gaussians, 3 * scene.shN.shape[1]
    names = (*_POSITION, *_NORMAL, *_SH0, *(f"f_rest_{i}" for i in range(higher)), "opacity", *_SCALE, *_ROTATION)
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    lines += [f"property float {name}" for name in names]
    table = np.empty((count, len(names)), "<f4")
    parts = [scene.means, np.zeros((count, 3)), scene.sh0, scene.shN.transpose(0, 2, 1).reshape(count, higher)]
    parts += [scene.opacity_logit[:, None], scene.log_scales, scene.quats]
    np.concatenate(parts, axis=1, out=table, casting="same_kind")
    return "\n".join([*lines, "end_header", ""]).encode() + table.tobytes()


def _contiguous(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)
