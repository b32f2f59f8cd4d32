"""Accuracy of k samples out of n, its closed forms under simple models, and how sure a difference is.

`bootstrap_ci`, `paired_bootstrap_ci`, `mcnemar_exact` and `holm` are those of `jaxlab.core.statistics`.
"""

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxlab.core.statistics import Interval, bootstrap_ci, holm, mcnemar_exact, paired_bootstrap_ci
from jaxlab.vlm_scaling.grade import answer_key

__all__ = [
    "Interval",
    "best_of_n_accuracy",
    "bootstrap_ci",
    "holm",
    "majority_accuracy",
    "majority_at_k",
    "mcnemar_exact",
    "paired_bootstrap_ci",
    "pass_at_k",
    "stability",
]

_ENUMERATED = 5000  # subsets
_DRAWS = 20_000


def pass_at_k(n: ArrayLike, c: ArrayLike, k: ArrayLike) -> Any:
    """Probability that k of n samples, drawn without replacement, hold a right one (Chen et al. 2021, section 2.1).

    1 - C(n-c, k) / C(n, k), as a product; 1 where n - c < k.

    Args:
      n: samples.
      c: right ones among them.
      k: drawn; all three broadcast.

    Returns:
      A float, or float64 of the broadcast shape.

    Raises:
      ValueError: k < 1, k > n, c < 0 or c > n.
    """
    n, c, k = np.broadcast_arrays(*(np.asarray(value) for value in (n, c, k)))
    for name, wrong, expected in (
        ("k", (k < 1) | (k > n), "1 <= k <= n"),
        ("c", (c < 0) | (c > n), "0 <= c <= n"),
    ):
        if wrong.any():
            n_, c_, k_ = (array[wrong].flat[0] for array in (n, c, k))
            raise ValueError(f"{name}: expected {expected}, got n={n_}, c={c_}, k={k_}")
    none = np.ones(n.shape)
    for drawn in range(int(k.max(initial=0))):
        none = np.where(drawn < k, none * np.maximum(n - c - drawn, 0) / np.maximum(n - drawn, 1), none)
    return 1 - none if n.ndim else float(1 - none)


def majority_at_k(
    answers: Sequence[str | None], gold: str, k: int, *, seed: int = 0, choices: Mapping[str, str] | None = None
) -> float:
    """Expected accuracy of a majority vote over k of n samples; of tied groups each wins equally often.

    Exact over all subsets where there are at most 5000, else over 20 000 drawn ones.

    Args:
      answers: [n], None for a sample without one, which does not vote.
      gold: the right answer.
      k: samples of a vote.
      seed: of the draws.
      choices: letter -> text of the option.

    Raises:
      ValueError: no answers, or not 1 <= k <= n.
    """
    count = len(answers)
    if not count:
        raise ValueError("answers: expected at least one sample, got none")
    if not 1 <= k <= count:
        raise ValueError(f"k: expected 1 <= k <= n, got n={count}, k={k}")
    numbers: dict[Hashable, int] = {answer_key(gold, choices=choices): 0}
    votes = np.zeros((count, 1 + count))
    for index, answer in enumerate(answers):
        if answer is not None:
            votes[index, numbers.setdefault(answer_key(answer, choices=choices), len(numbers))] = 1
    votes = votes[:, : len(numbers)]
    if math.comb(count, k) <= _ENUMERATED:
        subsets = np.array(list(itertools.combinations(range(count), k)))
        counts = votes[subsets].sum(axis=1)
    else:
        order = np.random.default_rng(seed).random((_DRAWS, count))
        members = order <= np.partition(order, k - 1, axis=1)[:, k - 1 : k]
        counts = members @ votes
    most = counts.max(axis=1, keepdims=True)
    won = (counts == most) & (most > 0)
    return float(np.mean(won[:, 0] / np.maximum(won.sum(axis=1), 1)))


def stability(scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """How much the samples of a question agree, as lmms-eval 0.7 counts it.

    Args:
      scores: of the samples of each question.

    Returns:
      `expected_accuracy`: mean of all scores. `consensus_accuracy`: share of questions whose scores sum to strictly
      more than half their number. `internal_variance`: mean of the questions' variances with n - 1, NaN where no
      question has two samples. `consistency_rate`: share of questions whose scores are all the same.

    Raises:
      ValueError: no questions, or one without samples.
    """
    if not len(scores):
        raise ValueError("scores: expected at least one question, got none")
    if (empty := [index for index, row in enumerate(scores) if not len(row)]) != []:
        raise ValueError(f"scores: expected samples of every question, got none of question {empty[0]}")
    rows = [np.asarray(row, np.float64) for row in scores]
    variances = [row.var(ddof=1) for row in rows if len(row) > 1]
    return {
        "expected_accuracy": float(np.concatenate(rows).mean()),
        "consensus_accuracy": float(np.mean([row.sum() > len(row) / 2 for row in rows])),
        "internal_variance": float(np.mean(variances)) if variances else math.nan,
        "consistency_rate": float(np.mean([np.ptp(row) == 0 for row in rows])),
    }


def majority_accuracy(p: float, n_wrong: int, n: int) -> float:
    """Accuracy of a majority of n independent samples, right with p and else one of `n_wrong` equally likely answers.

    A tie is broken at random. Exact up to rounding: given the number of right ones, counts of the wrong answers are
    independent Poisson variables given their sum.

    Raises:
      ValueError: p outside [0, 1], `n_wrong` < 1 (0 is allowed with p = 1), or n < 1.
    """
    _check_probability("p", p)
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    if n_wrong < 1 and p < 1:
        raise ValueError(f"n_wrong: expected at least 1, got {n_wrong}")
    total = 0.0
    for right in range(1, n + 1):
        weight = math.comb(n, right) * p**right * (1 - p) ** (n - right)
        total += weight * _wins(right, n - right, n_wrong) if weight else 0.0
    return total


def _wins(right: int, wrong: int, kinds: int) -> float:
    """Probability that `right` votes win against `wrong` spread evenly over `kinds`, ties shared."""
    if wrong < right:
        return 1.0
    pmf = [math.exp(-wrong / kinds)]
    for votes in range(1, right + 1):
        pmf.append(pmf[-1] * wrong / kinds / votes)
    total = 0.0
    for tied in range(min(kinds, wrong // right) + 1):
        rest = _power(np.array(pmf[:right]), kinds - tied, wrong + 1)
        place = wrong - tied * right
        total += math.comb(kinds, tied) * pmf[right] ** tied * (rest[place] if place < len(rest) else 0.0) / (1 + tied)
    return total / math.exp(wrong * math.log(wrong) - wrong - math.lgamma(wrong + 1))


def _power(coefficients: np.ndarray, exponent: int, length: int) -> np.ndarray:
    """A polynomial to a power, its first `length` coefficients."""
    result = np.ones(1)
    while exponent:
        if exponent & 1:
            result = np.convolve(result, coefficients)[:length]
        coefficients = np.convolve(coefficients, coefficients)[:length]
        exponent >>= 1
    return result


def best_of_n_accuracy(p: float, tpr: float, fpr: float, n: int) -> float:
    """Accuracy of one of n independent samples, taken evenly from those accepted, or from all where none is.

    Above p exactly where `tpr` > `fpr` (for n > 1 and 0 < p < 1).

    Args:
      p: probability that a sample is right.
      tpr: that a right one is accepted.
      fpr: that a wrong one is.
      n: samples.

    Raises:
      ValueError: values that are no probabilities, or n < 1.
    """
    for name, value in {"p": p, "tpr": tpr, "fpr": fpr}.items():
        _check_probability(name, value)
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    accepted = p * tpr + (1 - p) * fpr
    none = (1 - accepted) ** n
    return (p * tpr / accepted * (1 - none) if accepted else 0.0) + (
        p * (1 - tpr) / (1 - accepted) * none if accepted < 1 else 0.0
    )


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a probability, got {value}")
