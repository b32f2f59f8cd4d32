"""How sure a comparison is: bootstrap intervals of a mean, the exact McNemar test, Holm's correction.

    from jaxlab.core import statistics
    statistics.bootstrap_ci(correct)                              # accuracy over questions
    statistics.paired_bootstrap_ci(ours, theirs, clusters=image)  # difference on the same questions, several an image
    statistics.holm([statistics.mcnemar_exact(ours, other) for other in others])

Plain NumPy in float64.
"""

import dataclasses
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

_CHUNK = 4_000_000  # draws held in memory at a time


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval.

    Attributes:
      mean: of the sample.
      low: lower end.
      high: upper end.
    """

    mean: float
    low: float
    high: float


def bootstrap_ci(
    values: ArrayLike,
    *,
    n_resamples: int = 10_000,
    level: float = 0.95,
    method: Literal["percentile", "bca"] = "percentile",
    clusters: ArrayLike | None = None,
    seed: int | np.random.Generator = 0,
) -> Interval:
    """The bootstrap interval of a mean (Efron & Tibshirani 1993, sections 13.3 and 14.3).

    Args:
      values: [Q] independent observations: a question, an image, a seed each. Booleans count as 0 and 1.
      n_resamples: samples drawn with replacement.
      level: probability that the interval is to cover the true mean with, in (0, 1).
      method: "percentile", or "bca": corrected for bias and acceleration, better for skewed values.
      clusters: [Q] labels of what is independent where single values are not, such as the image of a question: whole
        clusters are drawn, and the mean stays that of the values drawn.
      seed: of the draws, or a generator to draw from.

    Raises:
      ValueError: an argument out of range, values that are not finite, or fewer than two values or clusters.
    """
    values = _vector("values", values)
    if n_resamples < 1:
        raise ValueError(f"n_resamples: expected at least 1, got {n_resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a value in (0, 1), got {level}")
    if method not in ("percentile", "bca"):
        raise ValueError(f"method: expected one of percentile, bca, got {method!r}")
    sums, counts = values, None
    if clusters is not None:
        labels = np.asarray(clusters)
        if labels.shape != values.shape:
            raise ValueError(f"clusters: expected a label for each value, shape {values.shape}, got {labels.shape}")
        _, member = np.unique(labels, return_inverse=True)
        sums, counts = np.bincount(member, values), np.bincount(member).astype(np.float64)
    if len(sums) < 2:
        raise ValueError(
            f"{'values' if clusters is None else 'clusters'}: expected at least 2 to draw from, got {len(sums)}"
        )
    mean = float(values.mean())
    means = _resampled_means(sums, counts, n_resamples, np.random.default_rng(seed))
    tail = (1 - level) / 2
    tails = (tail, 1 - tail) if method == "percentile" else _corrected(tail, mean, means, sums, counts)
    low, high = np.quantile(means, tails)
    return Interval(mean, float(low), float(high))


def paired_bootstrap_ci(a: ArrayLike, b: ArrayLike, **options: Any) -> Interval:
    """The interval of the mean of `a - b`, both [Q] and measured on the same items; the options are `bootstrap_ci`'s.

    Raises:
      ValueError: different lengths, and whatever `bootstrap_ci` does not take.
    """
    a, b = _pair(a, b)
    return bootstrap_ci(a - b, **options)


def mcnemar_exact(a: ArrayLike, b: ArrayLike) -> float:
    """The two-sided p-value that two methods are right equally often, from outcomes on the same items.

    The exact test: of the items where they differ, the number won by one is binomial with probability 1/2 (McNemar
    1947); 1.0 where they never differ.

    Args:
      a: [Q] outcomes of one method, each 0 or 1.
      b: [Q] outcomes of the other.

    Raises:
      ValueError: different lengths, or outcomes other than 0 and 1.
    """
    a, b = _pair(a, b)
    for name, outcomes in (("a", a), ("b", b)):
        if not np.isin(outcomes, (0, 1)).all():
            raise ValueError(f"{name}: expected outcomes 0 and 1, got {outcomes[~np.isin(outcomes, (0, 1))][0]:g}")
    wins, losses = int(np.sum(a > b)), int(np.sum(a < b))
    number = wins + losses
    term = total = 1  # integers, so that the tail is exact
    for k in range(min(wins, losses)):
        term = term * (number - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / 2**number)


def holm(pvalues: ArrayLike) -> np.ndarray:
    """Holm's adjusted p-values for a family of tests (Holm 1979), [M] in the order given.

    Those at most alpha may be rejected together: the probability of any false rejection is then at most alpha.

    Raises:
      ValueError: values that are not probabilities.
    """
    pvalues = _vector("pvalues", pvalues)
    if not ((pvalues >= 0) & (pvalues <= 1)).all():
        raise ValueError(f"pvalues: expected probabilities, got {pvalues}")
    order = np.argsort(pvalues, kind="stable")
    adjusted = np.empty_like(pvalues)
    factors = np.arange(len(pvalues), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * pvalues[order]))
    return adjusted


def _resampled_means(
    sums: np.ndarray, counts: np.ndarray | None, number: int, generator: np.random.Generator
) -> np.ndarray:
    """Means of `number` samples of clusters, given each cluster's sum and count; None: clusters of one."""
    size = len(sums)
    means = np.empty(number)
    step = max(1, _CHUNK // size)
    for start in range(0, number, step):
        drawn = generator.integers(size, size=(min(step, number - start), size), dtype=np.int32)
        total = sums[drawn].sum(axis=1)
        means[start : start + step] = total / (size if counts is None else counts[drawn].sum(axis=1))
    return means


def _corrected(
    tail: float, mean: float, means: np.ndarray, sums: np.ndarray, counts: np.ndarray | None
) -> tuple[float, float]:
    """Where BCa reads the distribution of the resampled means instead of at `tail` and `1 - tail`."""
    normal = NormalDist()
    below = (np.sum(means < mean) + np.sum(means <= mean)) / (2 * len(means))
    bias = normal.inv_cdf(float(np.clip(below, 0.5 / len(means), 1 - 0.5 / len(means))))
    counts = np.ones_like(sums) if counts is None else counts
    without = (sums.sum() - sums) / (counts.sum() - counts)
    deviations = without.mean() - without
    spread = np.sum(deviations**2) ** 1.5
    acceleration = float(np.sum(deviations**3) / (6 * spread)) if spread > 0 else 0.0

    def place(probability: float) -> float:
        shifted = bias + normal.inv_cdf(probability)
        return normal.cdf(bias + shifted / max(1 - acceleration * shifted, 1e-12))

    return place(tail), place(1 - tail)


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = _vector("a", a), _vector("b", b)
    if a.shape != b.shape:
        raise ValueError(f"b: expected as many values as a, {len(a)}, got {len(b)}")
    return a, b


def _vector(name: str, values: ArrayLike) -> np.ndarray:
    vector = np.asarray(values, np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name}: expected finite values, got {vector[~np.isfinite(vector)]}")
    return vector
