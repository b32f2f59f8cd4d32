"""Accuracies of k of n samples against counting, closed forms against adding up all outcomes."""

import math

import numpy as np
import pytest

from jaxlab.vlm_scaling import stats
from tests.oracles import voting as oracle


@pytest.mark.latest
def test_pass_at_k():
    for n, c, k in [(1, 0, 1), (5, 2, 1), (5, 2, 3), (5, 5, 5), (5, 0, 5), (64, 3, 20), (200, 100, 64)]:
        assert stats.pass_at_k(n, c, k) == pytest.approx(oracle.pass_at_k(n, c, k), abs=1e-12)
    got = stats.pass_at_k([5, 6], [[0], [2], [5]], np.array([1, 4]))
    assert got.shape == (3, 2)
    assert got[1, 1] == pytest.approx(oracle.pass_at_k(6, 2, 4))
    assert isinstance(stats.pass_at_k(5, 2, 1), float)
    for n, c, k in [(3, 1, 4), (3, 1, 0), (3, -1, 1), (3, 4, 1)]:
        with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
            stats.pass_at_k([9, n], [1, c], k if k else [1, 0])


def test_majority_at_k():
    answers = ["1", "2", None, "1.0", "3", "3", None]
    keys = ["1", "2", None, "1", "3", "3", None]
    for k in range(1, 8):
        assert stats.majority_at_k(answers, "1", k) == pytest.approx(oracle.majority_over_subsets(keys, "1", k))
    assert stats.majority_at_k([None, None], "1", 2) == 0
    assert stats.majority_at_k(["red", "A", "B"], "A", 3, choices={"A": "red", "B": "blue"}) == 1
    long = ["1"] * 9 + ["2"] * 8 + ["3"] * 7
    drawn = stats.majority_at_k(long, "1", 7, seed=1)
    assert drawn == stats.majority_at_k(long, "1", 7, seed=1)
    exact = 0.0  # over the counts of the three answers in a draw of 7
    for a in range(8):
        for b in range(8 - a):
            c = 7 - a - b
            share = (a == max(a, b, c)) / [a, b, c].count(max(a, b, c))
            exact += share * math.comb(9, a) * math.comb(8, b) * math.comb(7, c) / math.comb(24, 7)
    assert abs(drawn - exact) < 4 * math.sqrt(exact * (1 - exact) / 20_000)
    for k in (0, 8):
        with pytest.raises(ValueError, match=f"k: expected 1 <= k <= n, got n=7, k={k}"):
            stats.majority_at_k(answers, "1", k)
    with pytest.raises(ValueError, match="answers: expected at least one"):
        stats.majority_at_k([], "1", 1)


def test_stability():
    got = stats.stability([[1, 0], [1, 1, 0], [0], [1, 1]])
    assert got["expected_accuracy"] == pytest.approx(5 / 8)
    assert got["consensus_accuracy"] == 2 / 4  # one of two is no consensus
    assert got["internal_variance"] == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert got["consistency_rate"] == 2 / 4
    assert math.isnan(stats.stability([[1], [0]])["internal_variance"])
    for scores, message in (([], "at least one question"), ([[1], []], "none of question 1")):
        with pytest.raises(ValueError, match=message):
            stats.stability(scores)


@pytest.mark.parametrize(("p", "n_wrong", "n"), [(0.4, 1, 5), (0.4, 2, 6), (0.3, 3, 5), (0.2, 4, 4), (0.0, 2, 3)])
def test_closed_form_of_majority(p, n_wrong, n):
    assert stats.majority_accuracy(p, n_wrong, n) == pytest.approx(oracle.majority_accuracy(p, n_wrong, n), abs=1e-12)


def test_majority_of_many():
    assert stats.majority_accuracy(1.0, 0, 8) == 1
    assert stats.majority_accuracy(0.3, 7, 1) == pytest.approx(0.3)
    assert stats.majority_accuracy(0.5, 1, 200) == pytest.approx(0.5)
    assert stats.majority_accuracy(0.3, 9, 256) > 0.999
    binomial = sum(math.comb(31, c) * 0.6**c * 0.4 ** (31 - c) for c in range(16, 32))
    assert stats.majority_accuracy(0.6, 1, 31) == pytest.approx(binomial, abs=1e-12)


@pytest.mark.parametrize(
    "rates", [(0.4, 0.9, 0.2, 4), (0.4, 0.2, 0.9, 3), (0.7, 0.5, 0.5, 5), (0.5, 0, 0, 3), (0.5, 1, 1, 3)]
)
def test_closed_form_of_best_of_n(rates):
    got = stats.best_of_n_accuracy(*rates)
    assert got == pytest.approx(oracle.best_of_n_accuracy(*rates), abs=1e-12)
    p, tpr, fpr, _ = rates
    assert (got > p + 1e-9) == (tpr > fpr)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.majority_accuracy(1.5, 2, 3), "p: expected a probability, got 1.5"),
        (lambda: stats.majority_accuracy(0.5, 0, 3), "n_wrong: expected at least 1, got 0"),
        (lambda: stats.majority_accuracy(0.5, 2, 0), "n: expected at least 1"),
        (lambda: stats.best_of_n_accuracy(0.5, -1, 0, 3), "tpr: expected a probability"),
        (lambda: stats.best_of_n_accuracy(0.5, 1, 0, 0), "n: expected at least 1"),
    ],
)
def test_bad_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_shared():
    right = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    interval = stats.bootstrap_ci(right, n_resamples=200, method="bca")
    assert interval.low < interval.mean < interval.high
    assert stats.mcnemar_exact([1] * 6, [0] * 6) == pytest.approx(2 / 64)
    assert stats.holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
