"""Quality by size: FlexGaussian as published, what was added here, and other methods, on views that none has used."""

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxlab.core import image_metrics
from jaxlab.flexgaussian.baselines import baseline
from jaxlab.flexgaussian.bits import allocate, sensitivities
from jaxlab.flexgaussian.cameras import Camera
from jaxlab.flexgaussian.compressed import dequantize, quantize
from jaxlab.flexgaussian.config import QuantConfig
from jaxlab.flexgaussian.container import from_bytes, to_bytes
from jaxlab.flexgaussian.importance import blending, importance_scores
from jaxlab.flexgaussian.pruning import prune
from jaxlab.flexgaussian.rasteriser import render
from jaxlab.flexgaussian.refitting import refit
from jaxlab.flexgaussian.scene import GaussianScene, checked, padded
from jaxlab.flexgaussian.searching import CANDIDATES, GENTLER
from jaxlab.flexgaussian.stepped import StepConfig, quantize_steps

Images = Sequence[Float[Array | np.ndarray, "h w 3"]]
Metric = Callable[[Images, Images], float]
RATES = (*GENTLER[::-1], *CANDIDATES)
PRUNED = (0.0, 0.2, 0.4, 0.6, 0.8)
FACTORS = (0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0, 13.0)
REFIT_STEPS = 32


@dataclasses.dataclass(frozen=True)
class Point:
    """A compressed scene.

    Attributes:
      method: by which.
      setting: of the method.
      bytes: of the file.
      psnr: mean over the views, dB.
      ssim: mean over the views.
      seconds: from the scene to the file and back, scores and fits included, views that are judged excluded.
      extra: further metrics by name.
    """

    method: str
    setting: str
    bytes: int
    psnr: float
    ssim: float
    seconds: float
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Frontier:
    """A scene, the views that methods may use, and those that judge.

    Attributes:
      base: PSNR and SSIM of the scene itself, where the references are photographs.
    """

    def __init__(
        self,
        scene: GaussianScene,
        used: Sequence[Camera],
        judged: Sequence[Camera],
        photographs: Images | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ):
        """Prepares a comparison.

        Args:
          scene: N Gaussians.
          used: for scores, sensitivities and fits.
          judged: others.
          photographs: of the judged views; None: the scene's own renders.
          metrics: further ones, from images and references to a number.
        """
        if not used or not judged:
            raise ValueError(f"used, judged: expected cameras, got {len(used)} and {len(judged)}")
        self.scene, self.used, self.judged = checked(scene), list(used), list(judged)
        self._metrics = dict(metrics or {})
        shown = self._renders(self.scene, self.judged)
        self._references = shown if photographs is None else [np.asarray(p, np.float32) for p in photographs]
        self.base = self._judge(shown)
        self._made: dict[str, tuple[Any, float]] = {}

    def points(self, methods: Sequence[str] | None = None) -> Iterator[Point]:
        """Points of some methods of `METHODS`, or all; a first one of each kind is made and dropped, so that nothing is
        compiled while the clock runs.
        """
        for name in METHODS if methods is None else methods:
            if name not in METHODS:
                raise ValueError(f"methods: expected some of {tuple(METHODS)}, got {name!r}")
            yield from METHODS[name](self, name)

    def point(self, method: str, setting: str, make: Callable[[], tuple[GaussianScene, int]], before: float) -> Point:
        """Runs one, twice; `before` is what was spent on what it stands on."""
        make()
        started = time.monotonic()
        scene, size = make()
        seconds = before + time.monotonic() - started
        psnr, ssim, extra = self._judge(self._renders(scene, self.judged))
        return Point(method, setting, size, psnr, ssim, seconds, extra)

    def scores(self, weights: str) -> tuple[np.ndarray, float]:
        """Scores and the seconds they took: the paper's "opacity", or "alpha_T" without volumes."""
        if weights == "opacity":
            return self._once(weights, lambda: importance_scores(self.scene, self.used))
        return self._once(weights, lambda: blending(self.scene, self.used))

    def refitted(self, rate: float) -> tuple[tuple[GaussianScene, np.ndarray], float]:
        """The scene pruned and fitted to its own renders, its scores, and the seconds both took."""
        scores, seconds = self.scores("alpha_T")

        def make() -> tuple[GaussianScene, np.ndarray]:
            shown = self._renders(self.scene, self.used)
            pruned, kept = prune(self.scene, scores, rate, 0.0)
            return refit(pruned, self.used, shown, steps=REFIT_STEPS), scores[kept]

        made, more = self._once(f"refit {rate}", make)
        return made, seconds + more

    def table(self) -> tuple[Any, float]:
        """Sensitivities, and the seconds they took."""
        return self._once("sensitivities", lambda: sensitivities(self.scene, self.used[:4], _MORTON))

    def _once(self, name: str, make: Callable[[], Any]) -> tuple[Any, float]:
        if name not in self._made:
            make()
            started = time.monotonic()
            self._made[name] = make(), time.monotonic() - started
        return self._made[name]

    def _renders(self, scene: GaussianScene, cameras: Sequence[Camera]) -> list[np.ndarray]:
        scene = jax.device_put(padded(scene, self.scene.num_gaussians))
        return [np.asarray(render(scene, camera)) for camera in cameras]

    def _judge(self, images: Images) -> tuple[float, float, dict[str, float]]:
        pairs = list(zip(images, self._references))
        psnr = float(np.mean([float(image_metrics.psnr(a, b)) for a, b in pairs]))
        ssim = float(np.mean([float(image_metrics.ssim(np.clip(a, 0, 1), b)) for a, b in pairs]))
        return psnr, ssim, {name: metric(images, self._references) for name, metric in self._metrics.items()}


def bytes_at(points: Sequence[Point], psnr: float) -> float | None:
    """Bytes by which a method reaches a quality: between the nearest points of its best curve, on a logarithmic scale.

    None: it does not. Where all its points are better, the smallest's.
    """
    curve = best(points)
    above = [p for p in curve if p.psnr >= psnr]
    below = [p for p in curve if p.psnr < psnr]
    if not above:
        return None
    if not below:
        return float(above[0].bytes)
    low, high = below[-1], above[0]
    share = (psnr - low.psnr) / (high.psnr - low.psnr)
    return float(np.exp(np.log(low.bytes) + share * (np.log(high.bytes) - np.log(low.bytes))))


def best(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats in both size and quality, from the smallest on."""
    curve: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, -p.psnr)):
        if not curve or point.psnr > curve[-1].psnr:
            curve.append(point)
    return curve


_MORTON = QuantConfig(order="morton")
_TARGETS = (25.0, 30.0, 35.0, 40.0)
_BIT_RATES = ((0.0, 0.0), (0.0, 0.3), (0.1, 0.3), (0.2, 0.3), (0.4, 0.3), (0.6, 0.3))


def _by_codes(weights: str, quant: QuantConfig | None, codec: str) -> Callable[["Frontier", str], Iterator[Point]]:
    """The paper's candidates with some scores, settings and codec."""

    def points(frontier: Frontier, name: str) -> Iterator[Point]:
        scores, seconds = frontier.scores(weights)
        for p, s in RATES:
            make = functools.partial(_coded, frontier.scene, scores, p, s, quant, codec)
            yield frontier.point(name, f"{p}, {s}", make, seconds)

    return points


def _chosen_bits(frontier: Frontier, name: str) -> Iterator[Point]:
    scores, seconds = frontier.scores("alpha_T")
    table, more = frontier.table()
    for target in _TARGETS:
        quant = allocate(table, target + 1, _MORTON)  # pruning takes its part of the error
        for p, s in _BIT_RATES:
            make = functools.partial(_coded, frontier.scene, scores, p, s, quant, "zlib")
            yield frontier.point(name, f"{p}, {s}, for {target:g} dB", make, seconds + more)


def _steps(frontier: Frontier, name: str) -> Iterator[Point]:
    scores, seconds = frontier.scores("alpha_T")
    for rate in PRUNED:
        pruned, kept = prune(frontier.scene, scores, rate, 0.0)
        for factor in FACTORS:
            make = functools.partial(_stepped, pruned, scores[kept], factor)
            yield frontier.point(name, f"{rate}, x {factor}", make, seconds)


def _refitted_steps(frontier: Frontier, name: str) -> Iterator[Point]:
    for rate in PRUNED[1:]:
        (pruned, scores), seconds = frontier.refitted(rate)
        for factor in FACTORS:
            make = functools.partial(_stepped, pruned, scores, factor)
            yield frontier.point(name, f"{rate}, x {factor}", make, seconds)


def _other(frontier: Frontier, name: str) -> Iterator[Point]:
    scores, seconds = frontier.scores("opacity")
    pruning = name in ("opacity", "lightgaussian")
    for rate in (0.0, 0.1, 0.2, 0.4, 0.6, 0.8) if pruning else (0.0,):
        make = functools.partial(baseline, name, frontier.scene, scores=scores, prune_rate=rate)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*harmonics.*")
            yield frontier.point(name, f"{rate}" if pruning else "", make, seconds if name == "lightgaussian" else 0.0)


def _coded(
    scene: GaussianScene, scores: np.ndarray, p: float, s: float, quant: QuantConfig | None, codec: str
) -> tuple[GaussianScene, int]:
    content = to_bytes(quantize(prune(scene, scores, p, s)[0], quant), codec=codec)
    return dequantize(from_bytes(content, "memory")), len(content)


def _stepped(scene: GaussianScene, scores: np.ndarray, factor: float) -> tuple[GaussianScene, int]:
    content = to_bytes(quantize_steps(scene, StepConfig().times(factor), scores))
    return dequantize(from_bytes(content, "memory")), len(content)


OURS = ("steps", "steps, refitted")
METHODS: dict[str, Callable[[Frontier, str], Iterator[Point]]] = {
    "FlexGaussian": _by_codes("opacity", None, "none"),
    "FlexGaussian, zlib": _by_codes("opacity", None, "zlib"),
    "blending scores, Morton": _by_codes("alpha_T", _MORTON, "zlib"),
    "bits by attribute": _chosen_bits,
    "steps": _steps,
    "steps, refitted": _refitted_steps,
    **dict.fromkeys(("float16", "uniform8", "opacity", "lightgaussian", "spz", "splat", "palette"), _other),
}
"""By name: the paper's, its bytes as they are and deflated; additions to it; ours; other methods."""
