"""Fast online adaptation (FOA, section 3.3 of the paper): the harshest compression that still meets a target."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jaxlab.flexgaussian.cameras import Camera
from jaxlab.flexgaussian.compressed import CompressedScene
from jaxlab.flexgaussian.config import QuantConfig
from jaxlab.flexgaussian.scene import GaussianScene
from jaxlab.flexgaussian.stepped import SteppedScene
from jaxlab.flexgaussian.trial import Bench, Choice, Trial

CANDIDATES = (
    *((0.2, 0.3), (0.1, 0.5), (0.2, 0.4), (0.3, 0.3), (0.1, 0.6), (0.2, 0.5), (0.3, 0.4), (0.4, 0.3), (0.2, 0.6)),
    *((0.3, 0.5), (0.4, 0.4), (0.3, 0.6), (0.4, 0.5), (0.5, 0.4), (0.6, 0.3), (0.5, 0.5), (0.6, 0.4), (0.7, 0.3)),
    *((0.8, 0.2), (0.9, 0.1)),
)
"""Rates of pruning and of dropping harmonics that are tried, in the order of the official code."""
GENTLER = ((0.1, 0.3), (0.1, 0.1), (0.0, 0.6), (0.0, 0.3), (0.0, 0.0))
"""Ours: what is tried after the gentlest of `CANDIDATES`; then `BITS` without any pruning."""
BITS: tuple[dict[str, Any], ...] = (
    {"shN": 8, "opacity": 8},
    {"shN": 8, "opacity": 16, "scale": 16, "sh0": 16, "rotation": 16, "position": "fixed24"},
    {"shN": 16, "opacity": 16, "scale": 16, "sh0": 16, "rotation": 16, "position": "fixed24"},
)
METHODS = ("bisect", "walk")


class TargetNotMetError(ValueError):
    """No candidate meets the target; `result` has the best attempt."""

    def __init__(self, message: str, result: "SearchResult"):
        super().__init__(message)
        self.result = result


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A candidate that was tried: rates, mean PSNR over the test views in dB, bytes of its file, and the verdict."""

    prune_rate: float
    sh_rate: float
    psnr: float
    bytes: int
    passed: bool


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What `search` found.

    Attributes:
      config: rates and bits of the candidate, or its steps.
      compressed: the scene by it.
      psnr: mean over the test views, images clamped to [0, 1], one mean square an image, dB.
      base_psnr: the same of the scene as it was; infinite where it is its own reference.
      bytes: of the file.
      ratio: bytes of the vertices of the scene's plain .ply, over `bytes`.
      trace: all candidates in the order in which they were tried.
      status: "ok", or "target_not_met", in which case the rest is the best attempt.
    """

    config: Choice
    compressed: CompressedScene | SteppedScene
    psnr: float
    base_psnr: float
    bytes: int
    ratio: float
    trace: list[Evaluation]
    status: str


def search(
    scene: GaussianScene,
    cameras: Sequence[Camera],
    images: Sequence[Float[Array | np.ndarray, "h w 3"]] | None = None,
    *,
    max_psnr_drop: float | None = 1.0,
    min_psnr: float | None = 35.0,
    max_bytes: int | None = None,
    min_ratio: float | None = None,
    method: str = "bisect",
    scores: Float[np.ndarray, " n"] | None = None,
    weights: str = "alpha_T",
    quant: QuantConfig | None = None,
    test_every: int = 8,
    codec: str = "zlib",
    strict: bool = False,
) -> SearchResult:
    """Finds the smallest candidate whose views stay near enough to the reference.

    With a target of quality the smallest candidate that meets it is taken, and then has to meet the target of size, if
    there is one; with a target of size alone the gentlest one that meets it. Where the gentlest of `CANDIDATES` misses
    the quality, `GENTLER` rates and more `BITS` follow; the target is never missed silently.

    Args:
      scene: N Gaussians.
      cameras: all views; scores are taken over all of them where they are not given.
      images: photographs in [0, 1], one a camera; None: the reference is the scene's own renders, and every camera a
        test view.
      max_psnr_drop: with photographs: how much the mean PSNR of the test views may fall, dB; None: no such target.
      min_psnr: without photographs: how high the mean PSNR must stay, dB; None: no such target.
      max_bytes: largest file; None: no such target.
      min_ratio: smallest ratio; None: no such target.
      method: "bisect" over candidates sorted by size, or "walk", the official code's from the middle of its own order.
      scores: of `importance_scores`, [N]; None: made here from all cameras but the test views, or all.
      weights: by which they are made: "alpha_T" (ours: `importance_scores` without volumes, pixels by what they owe to
        a Gaussian), or "opacity" (the paper's score) or "count" with volumes.
      quant: bits of the candidates; None: the paper's.
      test_every: with photographs: every how many cameras one is a test view, from the first.
      codec: of the file.
      strict: raise `TargetNotMetError` where the target is not met.

    Raises:
      ValueError: no camera; images that do not fit the cameras; no target; options that are not known.
      TargetNotMetError: see `strict`.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    for name, value in (("max_bytes", max_bytes), ("min_ratio", min_ratio)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected more than 0, got {value}")
    drop = max_psnr_drop if images is not None else min_psnr
    if drop is None and max_bytes is None and min_ratio is None:
        raise ValueError("max_psnr_drop, min_psnr, max_bytes, min_ratio: expected a target")
    quant = quant or QuantConfig()
    bench = Bench(scene, cameras, images, scores=scores, weights=weights, test_every=test_every, codec=codec)
    target = _Target(
        psnr=drop if drop is None or images is None else bench.base_psnr - drop,
        bytes=min(max_bytes or np.inf, bench.plain_bytes / min_ratio if min_ratio else np.inf),
    )
    trials: list[Trial] = []

    def passes(choice: Choice) -> bool:
        trials.append(bench.attempt(choice))
        return target.leads(trials[-1])

    if target.psnr is not None:
        chosen = _harshest(bench.scene, quant, method, passes)
    else:
        chosen = _gentlest(bench.scene, quant, passes)
    best = next((trial for trial in trials if trial.choice == chosen), None) or max(trials, key=target.nearness)
    met = chosen is not None and best.bytes <= target.bytes
    result = _result(bench, best, trials, target, "ok" if met else "target_not_met")
    if strict and not met:
        found = f"the best of {len(trials)} candidates has {result.psnr:.2f} dB in {result.bytes} bytes"
        raise TargetNotMetError(f"expected {target}: {found}", result)
    return result


def fixed_rates(
    scene: GaussianScene,
    cameras: Sequence[Camera],
    images: Sequence[Float[Array | np.ndarray, "h w 3"]] | None,
    prune_rate: float,
    sh_rate: float,
    *,
    scores: Float[np.ndarray, " n"] | None = None,
    weights: str = "alpha_T",
    quant: QuantConfig | None = None,
    test_every: int = 8,
    codec: str = "zlib",
) -> SearchResult:
    """The result of one candidate, without a target."""
    bench = Bench(scene, cameras, images, scores=scores, weights=weights, test_every=test_every, codec=codec)
    trial = bench.attempt(Choice(prune_rate, sh_rate, quant or QuantConfig()))
    return _result(bench, trial, [trial], _Target(None, np.inf), "ok")


@dataclasses.dataclass(frozen=True)
class _Target:
    """Least PSNR in dB, or None, and most bytes."""

    psnr: float | None
    bytes: float

    def leads(self, trial: Trial) -> bool:
        """Whether a trial meets what the search goes by: the quality where there is one to meet."""
        return bool(trial.bytes <= self.bytes if self.psnr is None else trial.psnr >= self.psnr)

    def nearness(self, trial: Trial) -> float:
        return -trial.bytes if self.psnr is None else trial.psnr

    def __str__(self) -> str:
        parts = [] if self.psnr is None else [f"at least {self.psnr:.2f} dB"]
        return " and ".join(parts + ([f"at most {int(self.bytes)} bytes"] if np.isfinite(self.bytes) else []))


def _result(bench: Bench, best: Trial, trials: Sequence[Trial], target: _Target, status: str) -> SearchResult:
    trace = [Evaluation(t.choice.prune_rate, t.choice.sh_rate, t.psnr, t.bytes, target.leads(t)) for t in trials]
    ratio = bench.plain_bytes / best.bytes
    return SearchResult(best.choice, best.compressed, best.psnr, bench.base_psnr, best.bytes, ratio, trace, status)


def estimated_bytes(count: int, terms: int, prune_rate: float, sh_rate: float, quant: QuantConfig) -> float:
    """The size law (section 3.2 of the paper) for any bits: bytes of codes and positions of N Gaussians."""
    bits = 3 * quant.sh0 + quant.opacity + 3 * quant.scale + 4 * quant.rotation
    position = 6 if quant.position == "fp16" else 9
    shaded = 3 * terms * quant.shN / 8
    return count * ((position + bits / 8) * (1 - prune_rate) + shaded * (1 - prune_rate - sh_rate))


def _harshest(scene: GaussianScene, quant: QuantConfig, method: str, passes: Callable[[Choice], bool]) -> Choice | None:
    """The smallest candidate that passes; None: none does."""
    choices = [Choice(p, s, quant) for p, s in CANDIDATES]
    chosen = _walk(choices, passes) if method == "walk" else _bisect(_by_size(scene, choices), passes)
    if chosen is not None:
        return chosen
    gentler = [Choice(p, s, quant) for p, s in GENTLER]
    gentler += [Choice(0.0, 0.0, dataclasses.replace(quant, **bits)) for bits in BITS]
    return next((choice for choice in gentler if passes(choice)), None)


def _gentlest(scene: GaussianScene, quant: QuantConfig, fits: Callable[[Choice], bool]) -> Choice | None:
    """The largest candidate that fits; None: none does."""
    choices = _by_size(scene, [Choice(p, s, quant) for p, s in (*CANDIDATES, *GENTLER)])[::-1]  # harshest first
    return _bisect(choices, fits)


def _by_size(scene: GaussianScene, choices: Sequence[Choice]) -> list[Choice]:
    """Sorted from the largest file to the smallest."""
    count, terms = scene.shN.shape[:2]

    def size(choice: Any) -> float:
        return estimated_bytes(count, terms, choice.prune_rate, choice.sh_rate, choice.quant)

    return sorted(choices, key=size, reverse=True)


def _bisect(choices: Sequence[Choice], passes: Callable[[Choice], bool]) -> Choice | None:
    """The last that passes, as if all before it did: at most ceil(log2(n + 1)) are tried."""
    low, high = -1, len(choices)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(choices[middle]) else (low, middle)
    return choices[low] if low >= 0 else None


def _walk(choices: Sequence[Choice], passes: Callable[[Choice], bool]) -> Choice | None:
    """From the middle: on while they pass, or back until one does (the official code)."""
    i = len(choices) // 2
    if not passes(choices[i]):
        return next((choice for choice in reversed(choices[:i]) if passes(choice)), None)
    while i + 1 < len(choices) and passes(choices[i + 1]):
        i += 1
    return choices[i]
