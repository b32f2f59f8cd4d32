"""antimatter15's .splat: 32 bytes a Gaussian, no view-dependent colour."""

import warnings

import numpy as np

from jaxlab.flexgaussian.formats.values import byte, logit, sigmoid
from jaxlab.flexgaussian.harmonics import C0
from jaxlab.flexgaussian.scene import GaussianScene, SceneFormatError

_ROW = np.dtype([("means", "<f4", 3), ("scales", "<f4", 3), ("rgba", "u1", 4), ("quats", "u1", 4)])


def read(content: bytes, where: str) -> GaussianScene:
    """The scene of a .splat file.

    Raises:
      SceneFormatError: a length that is not a multiple of 32 bytes.
    """
    if len(content) % _ROW.itemsize:
        whole = len(content) // _ROW.itemsize * _ROW.itemsize
        raise SceneFormatError(f"{where}: expected rows of 32 bytes, the file ends inside of the one at byte {whole}")
    rows = np.frombuffer(content, _ROW)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_scales = np.log(rows["scales"])
    rgba = rows["rgba"] / 255
    return GaussianScene(
        means=rows["means"].copy(),
        log_scales=np.maximum(log_scales, -40).astype(np.float32),  # flat Gaussians are stored with a scale of 0
        quats=((rows["quats"].astype(np.float32) - 128) / 128).astype(np.float32),
        opacity_logit=logit(rgba[:, 3]),
        sh0=((rgba[:, :3] - 0.5) / C0).astype(np.float32),
        shN=np.zeros((len(rows), 0, 3), np.float32),
    )


def write(scene: GaussianScene) -> bytes:
    """The file's content; a warning where view-dependent colour is lost."""
    if np.any(scene.shN):
        warnings.warn(f".splat: the harmonics of degree 1 to {scene.degree} are lost", stacklevel=2)
    rows = np.empty(scene.num_gaussians, _ROW)
    rows["means"], rows["scales"] = scene.means, np.exp(scene.log_scales)
    rows["rgba"][:, :3] = byte((0.5 + C0 * scene.sh0) * 255)
    rows["rgba"][:, 3] = byte(sigmoid(scene.opacity_logit) * 255)
    quats = scene.quats / np.linalg.norm(scene.quats, axis=1, keepdims=True)
    rows["quats"] = byte(quats * 128 + 128)
    return rows.tobytes()
