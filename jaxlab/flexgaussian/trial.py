"""One candidate of a compression tried on test views."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxlab.core import image_metrics
from jaxlab.flexgaussian.cameras import Camera
from jaxlab.flexgaussian.compressed import CompressedScene, dequantize, quantize
from jaxlab.flexgaussian.config import QuantConfig
from jaxlab.flexgaussian.container import to_bytes
from jaxlab.flexgaussian.importance import blending, importance_scores
from jaxlab.flexgaussian.pruning import prune
from jaxlab.flexgaussian.rasteriser import render
from jaxlab.flexgaussian.scene import GaussianScene, checked, padded
from jaxlab.flexgaussian.stepped import StepConfig, SteppedScene

_NUMBER_BYTES, _PLAIN_COLUMNS = 4, 17


@dataclasses.dataclass(frozen=True)
class Choice:
    """Rates of pruning and of dropping harmonics, and bits or steps."""

    prune_rate: float
    sh_rate: float
    quant: QuantConfig | StepConfig


@dataclasses.dataclass(frozen=True)
class Trial:
    """What came of a choice: the compressed scene, mean PSNR over the test views in dB, bytes of the file."""

    choice: Choice
    compressed: CompressedScene | SteppedScene
    psnr: float
    bytes: int


class Bench:
    """A scene, its test views and what they should show.

    With photographs every `test_every`-th camera is a test view, and the others are those that scores are taken over.
    Without, the references are the scene's own renders, every camera is a test view, and scores are taken over all.

    Attributes:
      scene: as numpy arrays.
      scores: those given, or made by `weights`: `blending` for "alpha_T", otherwise `importance_scores`.
      base_psnr: mean over the test views of the scene as it is; infinite where it is its own reference.
      plain_bytes: of the vertices of the scene's .ply, normals as that layout has them.
    """

    def __init__(
        self,
        scene: GaussianScene,
        cameras: Sequence[Camera],
        images: Sequence[Float[Array | np.ndarray, "h w 3"]] | None,
        *,
        scores: Float[np.ndarray, " n"] | None,
        weights: str = "alpha_T",
        test_every: int,
        codec: str,
    ):
        _check(cameras, images, test_every)
        self.scene, self.codec = checked(scene), codec
        self.plain_bytes = _NUMBER_BYTES * (_PLAIN_COLUMNS + 3 * scene.shN.shape[1]) * scene.num_gaussians
        views = range(0, len(cameras), 1 if images is None else test_every)
        self._cameras = [cameras[i] for i in views]
        shown = self._renders(_placed(self.scene))
        if images is None:
            self._references, self.base_psnr = shown, math.inf
        else:
            self._references = [np.asarray(images[i], np.float32) for i in views]
            self.base_psnr = _mean_psnr(shown, self._references)
        if scores is None:
            others = [camera for i, camera in enumerate(cameras) if i not in views]
            views = others or cameras
            by_pixels = weights == "alpha_T"
            scores = blending(self.scene, views) if by_pixels else importance_scores(self.scene, views, weights=weights)
        self.scores = scores

    def attempt(self, choice: Choice) -> Trial:
        """Prunes, quantises, and renders what comes back."""
        if not isinstance(choice.quant, QuantConfig):
            raise ValueError(f"choice.quant: expected bits, got {choice.quant}")
        # Nothing that is as large as the scene keeps a name: it is gone when the images are made.
        compressed = quantize(prune(self.scene, self.scores, choice.prune_rate, choice.sh_rate)[0], choice.quant)
        images = self._renders(_placed(self._filled(dequantize(compressed))))
        psnr = _mean_psnr(images, self._references)
        return Trial(choice, compressed, psnr, len(to_bytes(compressed, codec=self.codec)))

    def judge(self, scene: GaussianScene) -> float:
        """Mean PSNR over the test views."""
        return _mean_psnr(self._renders(_placed(self._filled(scene))), self._references)

    def _filled(self, scene: GaussianScene) -> GaussianScene:
        """Up to the scene's own size, so that all candidates share one program."""
        return padded(scene, self.scene.num_gaussians)

    def _renders(self, scene: GaussianScene) -> list[np.ndarray]:
        return [np.asarray(render(scene, camera)) for camera in self._cameras]


def _placed(scene: GaussianScene) -> GaussianScene:
    """On the device; waited for, since what is copied is held until then."""
    return jax.block_until_ready(jax.device_put(scene))


def _mean_psnr(images: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> float:
    return float(np.mean([float(image_metrics.psnr(a, b)) for a, b in zip(images, references)]))


def _check(cameras: Sequence[Camera], images: Sequence[Array | np.ndarray] | None, test_every: int) -> None:
    if not cameras:
        raise ValueError("cameras: expected at least one")
    if test_every < 1:
        raise ValueError(f"test_every: expected at least 1, got {test_every}")
    if images is None:
        return
    if len(images) != len(cameras):
        raise ValueError(f"images: expected one a camera, {len(cameras)}, got {len(images)}")
    for i, (image, camera) in enumerate(zip(images, cameras)):
        if np.shape(image) != (camera.height, camera.width, 3):
            expected = (camera.height, camera.width, 3)
            raise ValueError(f"images[{i}]: expected the camera's shape {expected}, got {np.shape(image)}")
