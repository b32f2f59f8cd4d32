"""The smallest file of whole steps that meets a target (ours): shares to prune, and for each the longest steps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jaxlab.flexgaussian.cameras import Camera
from jaxlab.flexgaussian.container import to_bytes
from jaxlab.flexgaussian.importance import blending
from jaxlab.flexgaussian.pruning import prune
from jaxlab.flexgaussian.rasteriser import render
from jaxlab.flexgaussian.refitting import refit
from jaxlab.flexgaussian.scene import GaussianScene
from jaxlab.flexgaussian.searching import Evaluation, SearchResult, TargetNotMetError
from jaxlab.flexgaussian.stepped import StepConfig, dequantize_steps, quantize_steps
from jaxlab.flexgaussian.trial import Bench, Choice, Trial

FACTORS = (0.25, 16.0)
"""The shortest and the longest steps, times those of the settings."""
_START, _SLOPE, _LEAST_SLOPE = 1.5, -4.0, -1.0
"""The first factor's logarithm, and decibels by it."""
_MOST, _NEAR, _NARROW, _MARGIN = 5, 0.15, 0.1, 0.05
"""Trials of a share; how near to the target is near enough, in dB; differences of logarithms that do not matter."""


def search_steps(
    scene: GaussianScene,
    cameras: Sequence[Camera],
    images: Sequence[Float[Array | np.ndarray, "h w 3"]] | None = None,
    *,
    max_psnr_drop: float = 1.0,
    min_psnr: float = 35.0,
    scores: Float[np.ndarray, " n"] | None = None,
    steps: StepConfig | None = None,
    prune_rates: Sequence[float] = (0.0, 0.2, 0.4),
    refit_steps: int = 0,
    refit_cameras: Sequence[Camera] | None = None,
    test_every: int = 8,
    strict: bool = False,
) -> SearchResult:
    """Finds a small file whose views stay near enough to the reference.

    For each share that is pruned the steps are made as long as the target allows, by bisection; shares that no longer
    pay end the search. A result's `sh_rate` is the share of the scene whose harmonics became 0.

    Args:
      scene: N Gaussians.
      cameras: as in `search`.
      images: photographs, as there.
      max_psnr_drop: with photographs: how much the mean PSNR of the test views may fall, dB.
      min_psnr: without photographs: how high the mean PSNR must stay, dB.
      scores: `blending` of the scene, [N]; None: made here.
      steps: lengths whose proportions are kept; None: the default.
      prune_rates: shares to try, rising.
      refit_steps: of `refit` after pruning.
      refit_cameras: views of the refit; None: all cameras that are not test views, or all.
      test_every: as in `search`.
      strict: raise `TargetNotMetError` where the target is not met.

    Raises:
      ValueError: as `search`; no rates.
      TargetNotMetError: see `strict`.
    """
    if not prune_rates:
        raise ValueError("prune_rates: expected at least one")
    tests = range(0, len(cameras), test_every) if images is not None else ()
    others = [camera for i, camera in enumerate(cameras) if i not in tests] or list(cameras)
    if scores is None:
        scores = blending(scene, others)
    bench = Bench(scene, cameras, images, scores=scores, test_every=test_every, codec="none")
    least = min_psnr if images is None else bench.base_psnr - max_psnr_drop
    views = list(refit_cameras or others)
    shown = [np.asarray(render(bench.scene, camera)) for camera in views] if refit_steps else []
    trace: list[Evaluation] = []
    best: Any = None
    for rate in prune_rates:
        pruned, kept = prune(bench.scene, bench.scores, rate, 0.0)
        if refit_steps and rate > 0:
            pruned = refit(pruned, views, shown, steps=refit_steps)
        trial = _longest(bench, pruned, bench.scores[kept], steps or StepConfig(), rate, least, trace)
        met = best is not None and best.psnr >= least
        if met and not (trial.psnr >= least and trial.bytes < best.bytes):
            break
        best = trial if best is None or trial.psnr >= least or trial.psnr > best.psnr else best
    ratio = bench.plain_bytes / best.bytes
    status = "ok" if best.psnr >= least else "target_not_met"
    result = SearchResult(best.choice, best.compressed, best.psnr, bench.base_psnr, best.bytes, ratio, trace, status)
    if strict and status != "ok":
        raise TargetNotMetError(f"expected at least {least:.2f} dB: the best has {best.psnr:.2f} dB", result)
    return result


def _longest(
    bench: Bench,
    pruned: GaussianScene,
    scores: np.ndarray,
    steps: StepConfig,
    rate: float,
    least: float,
    trace: list[Evaluation],
) -> Trial:
    """The trial with the longest steps that pass, or with the shortest of all.

    PSNR is nearly linear in the logarithm of steps: the next factor is where a line through the last two meets the
    target, within what is known to pass and to fail.
    """
    low, high = np.log2(FACTORS)
    at, slope, tried = _START, _SLOPE, []
    best: Any = None
    for _ in range(_MOST):
        compressed = quantize_steps(pruned, steps.times(float(2**at)), scores)
        psnr = bench.judge(dequantize_steps(compressed))
        tried.append((at, psnr))
        plain = (compressed.num_gaussians - compressed.num_sh) / bench.scene.num_gaussians
        passed = psnr >= least
        trace.append(Evaluation(rate, plain, psnr, len(to_bytes(compressed)), passed))
        if passed or best is None:
            best = Trial(Choice(rate, plain, compressed.config), compressed, psnr, trace[-1].bytes)
        low, high = (at, high) if passed else (low, at)
        if (passed and psnr - least < _NEAR) or high - low < _NARROW:
            break
        if len(tried) > 1 and tried[-1][0] != tried[-2][0]:
            slope = min((tried[-1][1] - tried[-2][1]) / (tried[-1][0] - tried[-2][0]), _LEAST_SLOPE)
        margin = _MARGIN * (high - low)
        at = float(np.clip(at + (least + _NEAR / 2 - psnr) / slope, low + margin, high - margin))
    return best
