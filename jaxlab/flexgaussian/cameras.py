"""Pinhole cameras: orbits around a scene, COLMAP models, `transforms.json`."""

import dataclasses
import math
import os
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.core.untrusted import inside, read_object
from jaxlab.flexgaussian.scene import GaussianScene, SceneFormatError

_GL_TO_CV = np.diag([1.0, -1.0, -1.0, 1.0])
_COLMAP_MODELS = {
    0: ("SIMPLE_PINHOLE", 3),
    1: ("PINHOLE", 4),
    2: ("SIMPLE_RADIAL", 4),
    3: ("RADIAL", 5),
    4: ("OPENCV", 8),
}
_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")


@dataclasses.dataclass(frozen=True)
class Camera:
    """A pinhole camera with OpenCV axes: x right, y down, z forward.

    Attributes:
      viewmat: world to camera, [4, 4] float32.
      fx: focal length in pixels, horizontal.
      fy: vertical.
      cx: principal point in pixels; the centre of the first pixel is at 0.5.
      cy: the same, vertical.
      width: of the image in pixels.
      height: the same.
      name: of the photograph it belongs to, or "".
    """

    viewmat: np.ndarray
    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int
    name: str = ""

    def __post_init__(self):
        viewmat = np.asarray(self.viewmat, np.float32)
        if viewmat.shape != (4, 4) or not np.isfinite(viewmat).all():
            raise ValueError(f"viewmat: expected a finite matrix [4, 4], got {viewmat.shape}: {viewmat}")
        numbers = (self.fx, self.fy, self.cx, self.cy)
        if not all(map(math.isfinite, numbers)) or self.fx <= 0 or self.fy <= 0:
            raise ValueError(f"fx, fy, cx, cy: expected finite numbers, fx and fy above 0, got {numbers}")
        if min(self.width, self.height) < 1:
            raise ValueError(f"width, height: expected at least 1, got {self.width} x {self.height}")
        object.__setattr__(self, "viewmat", viewmat)

    @property
    def center(self) -> np.ndarray:
        """Where it stands in the world, [3] float32."""
        return -self.viewmat[:3, :3].T @ self.viewmat[:3, 3]

    def scaled(self, width: int, height: int) -> "Camera":
        """The same view with another number of pixels."""
        x, y = width / self.width, height / self.height
        return dataclasses.replace(
            self, fx=self.fx * x, fy=self.fy * y, cx=self.cx * x, cy=self.cy * y, width=width, height=height
        )


def orbit_cameras(
    scene: GaussianScene, count: int = 8, width: int = 256, height: int = 192, *, elevation: float = 20.0
) -> list[Camera]:
    """Cameras on a circle around a scene that is upright with y down, all of which see its middle nine tenths.

    Args:
      scene: what to look at; opaque Gaussians count, so that stray ones in the sky do not.
      count: of cameras, evenly spaced.
      width: of the images in pixels.
      height: the same.
      elevation: of the circle above the middle, in degrees.

    Raises:
      ValueError: fewer than one camera; an elevation that is not between -90 and 90.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if not -90 < elevation < 90:
        raise ValueError(f"elevation: expected degrees between -90 and 90, got {elevation}")
    means, solid = np.asarray(scene.means, np.float64), np.asarray(scene.opacity_logit) > 0
    means = means[solid] if solid.any() else means
    low, high = np.quantile(means, [0.05, 0.95], axis=0)
    middle, radius = (low + high) / 2, max(float(np.linalg.norm(high - low)) / 2, 1e-3)
    focal = 1.2 * min(width, height)
    distance = radius * math.hypot(1, 2 * focal / min(width, height))
    cameras = []
    for turn in np.arange(count) * (2 * math.pi / count):
        up = math.radians(elevation)
        offset = np.array([math.cos(up) * math.sin(turn), -math.sin(up), -math.cos(up) * math.cos(turn)])
        view = _looking(middle + distance * offset, middle)
        cameras.append(Camera(view, focal, focal, width / 2, height / 2, width, height))
    return cameras


def cameras_from_transforms(path: str | os.PathLike, *, existing: bool = True) -> list[Camera]:
    """The cameras of a NeRF `transforms.json` (OpenGL axes, camera to world), sorted by file name.

    Args:
      path: of the file.
      existing: leave out frames whose image is not there.

    Raises:
      SceneFormatError: not such a file, or a number is missing. A lens distortion is a warning: it is ignored.
    """
    path = Path(path)
    try:
        content = read_object(path)
        frames = content["frames"]
        cameras = []
        for frame in frames:
            if existing and not inside(path.parent, frame["file_path"], "file_path").is_file():
                continue
            matrix = np.asarray(frame["transform_matrix"], np.float64)
            if matrix.shape != (4, 4):
                raise SceneFormatError(f"{path}: {frame['file_path']}: expected a matrix [4, 4], got {matrix.shape}")
            intrinsics = _intrinsics({**content, **frame})
            cameras.append(Camera(np.linalg.inv(matrix @ _GL_TO_CV), *intrinsics, name=Path(frame["file_path"]).name))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, np.linalg.LinAlgError) as error:
        if isinstance(error, SceneFormatError):
            raise
        raise SceneFormatError(f"{path}: not a transforms.json that is understood ({error!r})") from error
    _warn_of_distortion(path, any(content.get(key) or any(f.get(key) for f in frames) for key in _DISTORTION))
    if not cameras:
        raise SceneFormatError(f"{path}: none of its {len(frames)} frames has an image beside it")
    return sorted(cameras, key=lambda camera: camera.name)


def cameras_from_colmap(folder: str | os.PathLike) -> list[Camera]:
    """The cameras of a COLMAP model, binary or text, sorted by image name.

    Args:
      folder: with `cameras` and `images` (.bin or .txt), or with a `sparse/0` that has them.

    Raises:
      FileNotFoundError: no such files.
      SceneFormatError: damaged; a camera model other than pinhole and radial ones. A lens distortion is a warning.
    """
    folder = Path(folder)
    root = next((f for f in (folder, folder / "sparse" / "0", folder / "sparse") if list(f.glob("cameras.*"))), None)
    if root is None:
        raise FileNotFoundError(f"{folder}: no COLMAP model (cameras.bin or cameras.txt) there or in sparse/0")
    binary = (root / "cameras.bin").is_file()
    try:
        lenses = dict((_binary_lenses if binary else _text_lenses)(root))
        poses = list((_binary_poses if binary else _text_poses)(root))
        cameras = [Camera(_pose(quat, shift), *lenses[lens][:6], name=name) for quat, shift, lens, name in poses]
    except (KeyError, ValueError, IndexError, OverflowError, struct.error) as error:
        if isinstance(error, SceneFormatError):
            raise
        raise SceneFormatError(f"{root}: damaged COLMAP model ({error!r})") from error
    _warn_of_distortion(root, any(any(lenses[lens][6]) for _, _, lens, _ in poses))
    return sorted(cameras, key=lambda camera: camera.name)


def _looking(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross([0.0, 1.0, 0.0], forward)
    right /= np.linalg.norm(right)
    view = np.eye(4)
    view[:3, :3] = [right, np.cross(forward, right), forward]
    view[:3, 3] = -view[:3, :3] @ eye
    return view


def _intrinsics(frame: Mapping[str, Any]) -> tuple[float, float, float, float, int, int]:
    width, height = int(frame["w"]), int(frame["h"])
    fx = float(frame["fl_x"]) if "fl_x" in frame else width / 2 / math.tan(float(frame["camera_angle_x"]) / 2)
    cx, cy = float(frame.get("cx", width / 2)), float(frame.get("cy", height / 2))
    return fx, float(frame.get("fl_y", fx)), cx, cy, width, height


def _warn_of_distortion(where: Path, distorted: bool) -> None:
    if distorted:
        warnings.warn(f"{where}: the lens distortion is ignored, cameras here are pinholes", stacklevel=3)


Lens = tuple[float, float, float, float, int, int, Sequence[float]]
Pose = tuple[np.ndarray, np.ndarray, int, str]


def _lens(model: str, width: int, height: int, parameters: Sequence[float]) -> Lens:
    if model not in {name for name, _ in _COLMAP_MODELS.values()}:
        raise SceneFormatError(f"COLMAP camera model {model!r} is not read, only pinhole and radial ones")
    if model in ("PINHOLE", "OPENCV"):
        fx, fy, cx, cy, *rest = parameters
    else:
        fx, cx, cy, *rest = parameters
        fy = fx
    return fx, fy, cx, cy, width, height, rest


def _binary_lenses(root: Path) -> Iterator[tuple[int, Lens]]:
    data = (root / "cameras.bin").read_bytes()
    (count,), offset = struct.unpack_from("<Q", data), 8
    for _ in range(count):
        identity, model, width, height = struct.unpack_from("<iiQQ", data, offset)
        if model not in _COLMAP_MODELS:
            raise SceneFormatError(f"{root}: COLMAP camera model {model} is not read, only pinhole and radial ones")
        name, length = _COLMAP_MODELS[model]
        parameters = struct.unpack_from(f"<{length}d", data, offset + 24)
        offset += 24 + 8 * length
        yield identity, _lens(name, width, height, parameters)


def _text_lenses(root: Path) -> Iterator[tuple[int, Lens]]:
    for line in (root / "cameras.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            identity, model, width, height, *parameters = line.split()
            yield int(identity), _lens(model, int(width), int(height), [float(p) for p in parameters])


def _binary_poses(root: Path) -> Iterator[Pose]:
    data = (root / "images.bin").read_bytes()
    (count,), offset = struct.unpack_from("<Q", data), 8
    for _ in range(count):
        _, *numbers, lens = struct.unpack_from("<i7di", data, offset)
        offset += 64
        end = data.index(b"\0", offset)
        name = data[offset:end].decode("utf-8", "replace")
        (points,) = struct.unpack_from("<Q", data, end + 1)
        offset = end + 9 + 24 * points
        yield np.array(numbers[:4]), np.array(numbers[4:]), lens, name


def _text_poses(root: Path) -> Iterator[Pose]:
    lines = [line for line in (root / "images.txt").read_text().splitlines() if not line.startswith("#")]
    for line in lines[::2]:  # every other line lists an image's points
        if line.strip():
            _, *numbers, lens, name = line.split(maxsplit=9)
            values = np.array([float(number) for number in numbers])
            yield values[:4], values[4:], int(lens), name


def _pose(quat: np.ndarray, shift: np.ndarray) -> np.ndarray:
    w, x, y, z = quat / np.linalg.norm(quat)
    view = np.eye(4)
    view[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    view[:3, 3] = shift
    return view
