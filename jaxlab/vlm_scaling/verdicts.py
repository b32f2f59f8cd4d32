"""How good verdicts are, and how much those of two inputs agree."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxlab.vlm_scaling.select import Score

_BINS = 10


@dataclasses.dataclass(frozen=True)
class VerdictMetrics:
    """Of verdicts on samples; a verdict is yes if it is True or above the threshold, and one that is None is no yes.

    Attributes:
      count: verdicts.
      unread: of them, None.
      accept_rate: share of yes: a verifier that says yes to all selects at random.
      base_rate: share of right samples.
      accuracy: share of verdicts that are right.
      balanced_accuracy: mean of the shares on right and on wrong samples; NaN without one of them.
      auroc: probability that a right sample has a higher score than a wrong one, ties half, None below all; NaN too.
      false_accept: share of wrong samples with a yes; NaN without any.
      false_reject: share of right samples without a yes.
      calibration_error: expected, over ten bins of the scores that are probabilities; NaN without any.
    """

    count: int
    unread: int
    accept_rate: float
    base_rate: float
    accuracy: float
    balanced_accuracy: float
    auroc: float
    false_accept: float
    false_reject: float
    calibration_error: float


def metrics(scores: Sequence[Score], right: Sequence[bool], *, threshold: float = 0.5) -> VerdictMetrics:
    """How good verdicts are.

    Args:
      scores: verdicts, or probabilities.
      right: whether each sample is.
      threshold: a score above it is a yes.

    Raises:
      ValueError: no verdicts, or another number of outcomes.
    """
    if not len(scores):
        raise ValueError("scores: expected at least one verdict, got none")
    if len(right) != len(scores):
        raise ValueError(f"right: expected one for each of {len(scores)} verdicts, got {len(right)}")
    values = _values(scores)
    truth = np.asarray(right, bool)
    yes = values > threshold
    false_accept, false_reject = _mean(yes[~truth]), 1 - _mean(yes[truth])
    return VerdictMetrics(
        count=len(values),
        unread=int(np.isneginf(values).sum()),
        accept_rate=float(yes.mean()),
        base_rate=float(truth.mean()),
        accuracy=float((yes == truth).mean()),
        balanced_accuracy=(2 - false_accept - false_reject) / 2,
        auroc=_auroc(values, truth),
        false_accept=false_accept,
        false_reject=false_reject,
        calibration_error=_calibration_error(values, truth),
    )


def agreement(first: Sequence[Score], second: Sequence[Score], *, threshold: float = 0.5) -> float:
    """Share of samples on which two verdicts are both yes or both not; with and without images, how little is seen.

    Raises:
      ValueError: no verdicts, or different numbers.
    """
    if not len(first) or len(first) != len(second):
        raise ValueError(f"expected two equally long lists of verdicts, got {len(first)} and {len(second)}")
    return float(np.mean((_values(first) > threshold) == (_values(second) > threshold)))


def _values(scores: Sequence[Score]) -> np.ndarray:
    return np.array([-math.inf if score is None or math.isnan(score) else float(score) for score in scores])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _auroc(values: np.ndarray, truth: np.ndarray) -> float:
    positive = int(truth.sum())
    if positive in (0, len(truth)):
        return math.nan
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * (len(truth) - positive)))


def _calibration_error(values: np.ndarray, truth: np.ndarray) -> float:
    known = (values >= 0) & (values <= 1)
    if not known.any():
        return math.nan
    values, truth = values[known], truth[known]
    bins = np.minimum((values * _BINS).astype(int), _BINS - 1)
    gaps = np.abs(np.bincount(bins, values - truth, _BINS))
    return float(gaps.sum() / len(values))
