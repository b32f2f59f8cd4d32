import numpy as np
import pytest
import scipy.stats

from jaxlab.core import statistics
from tests.timing import within

_SKEWED = np.random.default_rng(3).exponential(size=40)


@pytest.mark.latest
@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("level", [0.9, 0.99])
def test_intervals_are_those_of_scipy(method, level):
    theirs = scipy.stats.bootstrap(
        (_SKEWED,), np.mean, n_resamples=50_000, confidence_level=level, method=method, rng=np.random.default_rng(1)
    ).confidence_interval
    ours = statistics.bootstrap_ci(_SKEWED, n_resamples=50_000, level=level, method=method)
    assert ours.mean == pytest.approx(_SKEWED.mean())
    # Two sets of draws: the ends differ by the noise of a quantile.
    assert (ours.low, ours.high) == pytest.approx(theirs, abs=0.03 * _SKEWED.std())


def test_bca_leans_to_the_long_tail():
    plain, corrected = (statistics.bootstrap_ci(_SKEWED, method=method) for method in ("percentile", "bca"))
    assert plain.low < corrected.low < corrected.mean < plain.high < corrected.high


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_clusters_are_drawn_whole(method):
    values = np.repeat(_SKEWED, 5)
    labels = np.repeat([f"image {number}" for number in range(40)], 5)
    order = np.random.default_rng(0).permutation(200)
    single = statistics.bootstrap_ci(_SKEWED, method=method, n_resamples=20_000)
    clustered = statistics.bootstrap_ci(values[order], clusters=labels[order], method=method, n_resamples=20_000)
    assert (clustered.low, clustered.high) == pytest.approx((single.low, single.high), abs=0.05)
    blind = statistics.bootstrap_ci(values, method=method)
    assert blind.high - blind.low < 0.6 * (clustered.high - clustered.low)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_clusters_of_different_sizes(method):
    """Against all 27 equally likely samples of three clusters, the mean taken over the values drawn."""
    groups = [np.array([1.0]), np.array([0.0, 0.5, 0.25]), np.array([2.0, 4.0])]
    samples = [np.concatenate([a, b, c]).mean() for a in groups for b in groups for c in groups]
    interval = statistics.bootstrap_ci(
        np.concatenate(groups), clusters=[0, 1, 1, 1, 2, 2], level=0.5, method=method, n_resamples=50_000
    )
    assert interval.mean == pytest.approx(np.concatenate(groups).mean())
    if method == "percentile":
        exact = np.quantile(np.repeat(samples, 1000), [0.25, 0.75])
        assert (interval.low, interval.high) == pytest.approx(exact, abs=1e-9)
    else:
        theirs = scipy.stats.bootstrap(
            (np.arange(3),),
            lambda drawn: np.concatenate([groups[i] for i in drawn]).mean(),
            vectorized=False,
            n_resamples=3000,
            confidence_level=0.5,
            method="BCa",
            rng=np.random.default_rng(0),
        ).confidence_interval
        assert (interval.low, interval.high) == pytest.approx(theirs, abs=0.15)


def test_coverage():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        correct = generator.random(100) < 0.3
        interval = statistics.bootstrap_ci(correct, n_resamples=500, seed=generator, method="bca")
        covered += interval.low <= 0.3 <= interval.high
    assert 0.91 <= covered / 400 <= 0.98  # 0.95, and four standard errors


def test_pairing_removes_what_items_share():
    generator = np.random.default_rng(1)
    shared = generator.normal(size=200) * 10
    a, b = shared + 1 + generator.normal(size=200) * 0.1, shared
    interval = statistics.paired_bootstrap_ci(a, b, level=0.9, seed=4)
    assert interval == statistics.bootstrap_ci(a - b, level=0.9, seed=4)
    assert 0.97 < interval.low < interval.mean < interval.high < 1.03


def test_seeds_and_equal_values():
    assert statistics.bootstrap_ci(_SKEWED, seed=1) == statistics.bootstrap_ci(_SKEWED, seed=np.random.default_rng(1))
    assert statistics.bootstrap_ci(_SKEWED, seed=1) != statistics.bootstrap_ci(_SKEWED, seed=2)
    for method in ("percentile", "bca"):
        assert statistics.bootstrap_ci([True] * 5, method=method) == statistics.Interval(1.0, 1.0, 1.0)
        extreme = statistics.bootstrap_ci([0.0] * 9 + [1e6], method=method, level=0.9999, n_resamples=100)
        assert 0 <= extreme.low <= extreme.high <= 1e6


def test_ten_thousand_samples_of_two_thousand_questions_are_quick():
    correct = np.random.default_rng(0).random(2000) < 0.5
    with within(2.0):
        statistics.bootstrap_ci(correct)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (0, 1), (1, 6), (5, 5), (12, 3), (700, 620)])
def test_mcnemar_is_the_binomial_test(wins, losses):
    a = np.array([1] * wins + [0] * losses + [1] * 4 + [0] * 3)
    b = np.array([0] * wins + [1] * losses + [1] * 4 + [0] * 3)
    expected = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert statistics.mcnemar_exact(a, b) == pytest.approx(expected, rel=1e-9)
    assert statistics.mcnemar_exact(a.astype(bool), b.astype(bool)) == statistics.mcnemar_exact(b, a)


def test_holm():
    # By hand: 4 * 0.005, 3 * 0.01, 2 * 0.03, and 0.04 raised to the one before it.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.9]).tolist() == [1.0, 1.0]
    assert statistics.holm([]).tolist() == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: statistics.bootstrap_ci([1.0]), "values: expected at least 2 to draw from, got 1"),
        (lambda: statistics.bootstrap_ci([]), "values: expected at least 2"),
        (lambda: statistics.bootstrap_ci([1.0, np.nan]), "values: expected finite values"),
        (lambda: statistics.bootstrap_ci([[1.0, 2.0]]), r"values: expected one dimension, got shape \(1, 2\)"),
        (lambda: statistics.bootstrap_ci([1.0, 2.0], clusters=[0]), r"clusters: .* shape \(2,\), got \(1,\)"),
        (lambda: statistics.bootstrap_ci([1.0, 2.0], clusters=[0, 0]), "clusters: expected at least 2"),
        (lambda: statistics.bootstrap_ci([1.0, 2.0], n_resamples=0), "n_resamples: expected at least 1, got 0"),
        (lambda: statistics.bootstrap_ci([1.0, 2.0], level=95), r"level: expected a value in \(0, 1\), got 95"),
        (lambda: statistics.bootstrap_ci([1.0, 2.0], method="t"), "method: expected one of percentile, bca, got 't'"),
        (lambda: statistics.paired_bootstrap_ci([1.0, 2.0], [1.0]), "b: expected as many values as a, 2, got 1"),
        (lambda: statistics.mcnemar_exact([1, 0], [1]), "b: expected as many values as a, 2, got 1"),
        (lambda: statistics.mcnemar_exact([1, 0.5], [1, 0]), "a: expected outcomes 0 and 1, got 0.5"),
        (lambda: statistics.holm([0.1, 1.5]), "pvalues: expected probabilities"),
    ],
)
def test_bad_inputs(unchecked, call, words):
    with pytest.raises(ValueError, match=words):
        call()
