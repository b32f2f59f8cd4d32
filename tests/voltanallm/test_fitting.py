"""Least squares against SciPy's, planes found again among outliers, and segments that have too few points."""

import numpy as np
import pytest
import scipy.optimize

from jaxlab.voltanallm import fit_decode, fit_prefill
from jaxlab.voltanallm.fitting import BOUNDARIES, nnls
from tests.voltanallm import tables


def scipy_nnls(features, targets):
    """Coefficients >= 0 and a free intercept: its two signs are two columns."""
    ones = np.ones((len(targets), 1))
    solution, _ = scipy.optimize.nnls(np.concatenate([features, ones, -ones], axis=1), targets)
    return solution[:-2], solution[-2] - solution[-1]


@pytest.mark.parametrize("count", [1, 2])
def test_least_squares_is_scipys(count):
    rng = np.random.default_rng(count)
    features = rng.random((40, 12, count)) * np.array([100.0, 1e4])[:count]
    targets = features @ rng.normal(size=count) + rng.normal(size=(40, 12))
    targets *= rng.choice([-1, 1], size=(40, 1))  # so that every set of bounds is active somewhere
    coefficients, intercepts = nnls(features, targets)
    for index in range(40):
        wanted, intercept = scipy_nnls(features[index], targets[index])
        np.testing.assert_allclose(coefficients[index], wanted, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(intercepts[index], intercept, rtol=1e-6, atol=1e-6)
    assert ((coefficients == 0).any(axis=1)).any()


def test_constant_and_collinear_features_get_no_weight_of_their_own():
    x = np.arange(10.0)
    coefficients, intercept = nnls(np.stack([np.full(10, 7.0), x], axis=1), 3 * x + 1)
    np.testing.assert_allclose([*coefficients, intercept], [0, 3, 1], atol=1e-12)
    coefficients, intercept = nnls(np.stack([x, 2 * x], axis=1), 3 * x + 1)
    np.testing.assert_allclose(np.stack([x, 2 * x], axis=1) @ coefficients + intercept, 3 * x + 1, atol=1e-9)


def samples(rng, count, outliers=0.0):
    table = tables.decode_table()
    freq = rng.choice([1005, 1410], count)
    batch, tokens = rng.integers(1, 257, count), rng.integers(1, 200_000, count)
    itl = table.predict(freq, batch, tokens)
    return table, freq, batch, tokens, np.where(rng.random(count) < outliers, itl * rng.uniform(1.5, 4, count), itl)


@pytest.mark.latest
@pytest.mark.parametrize("outliers", [0.0, 0.2])
def test_decode_planes_are_found_again(outliers):
    table, *columns = samples(np.random.default_rng(3), 1500, outliers)
    fitted = fit_decode(*columns, boundaries=tables.ENDS)
    assert fitted.segments == ((1, 64), (65, 128), (129, 192), (193, 256))
    freq, batch, tokens, _ = columns
    np.testing.assert_allclose(fitted.predict(freq, batch, tokens), table.predict(freq, batch, tokens), rtol=1e-9)
    scores = [plane.r2 for plane in fitted.planes]
    assert max(scores) < 0.9 if outliers else min(scores) == pytest.approx(1)
    assert fit_decode(*columns, boundaries=tables.ENDS).planes == fitted.planes  # the same seed


def test_noise_is_averaged_and_outliers_do_not_count():
    rng = np.random.default_rng(5)
    tokens = rng.integers(2000, 20_000, 3000)
    truth = 0.05 * tokens + 12
    measured = truth * rng.lognormal(0, 0.02, 3000)
    measured = np.where(rng.random(3000) < 0.2, measured * rng.uniform(1.3, 3, 3000), measured)
    fitted = fit_prefill(np.full(3000, 1410), tokens, measured)
    error = np.abs(fitted.predict(1410, 1, tokens) / truth - 1)
    assert error.max() < 0.02
    naive = np.polyval(np.polyfit(tokens, measured, 1), tokens)
    assert np.abs(naive / truth - 1).min() > 0.1


def test_a_line_among_many_outliers():
    rng = np.random.default_rng(6)
    tokens = np.linspace(2000, 20_000, 200)
    ttft = np.where(np.arange(200) % 5 < 3, 0.05 * tokens + 12, rng.uniform(0, 9e4, 200))
    (line,) = fit_prefill(np.full(200, 1410), tokens, ttft).planes
    assert (line.tokens, line.intercept) == pytest.approx((0.05, 12))
    assert line.r2 < 0  # outliers stay in the score


def decode(batches, boundaries, clock=1410):
    batches = np.asarray(batches)
    tokens = np.arange(1, len(batches) + 1) * 100
    return fit_decode(np.full(len(batches), clock), batches, tokens, batches + 0.01 * tokens, boundaries=boundaries)


@pytest.mark.parametrize(
    ("counts", "segments"),
    [
        ({4: 8, 8: 8}, ((1, 4), (5, 8))),
        ({4: 7, 8: 8}, ((1, 8),)),  # thin: joins the next
        ({4: 5, 8: 5, 16: 8}, ((1, 16),)),  # which must have enough by itself
        ({8: 8}, ((1, 8),)),  # the first start is 1
        ({4: 8, 8: 3, 24: 2}, ((1, 24),)),  # trailing thin ones, with what lies between
        ({4: 8, 24: 8}, ((1, 4), (5, 24))),
    ],
)
def test_thin_segments(counts, segments):
    table = decode([b for b, count in counts.items() for _ in range(count)], (4, 8, 16, 24, 32))
    assert table.segments == segments
    assert np.isnan(table.predict(1410, segments[-1][1] + 1, 1000))


def test_a_batch_that_never_varies_has_no_slope():
    (plane,) = decode([8] * 20, (8,)).planes
    assert plane.batch == 0
    assert plane.tokens == pytest.approx(0.01)
    assert plane.intercept == pytest.approx(8)


def test_default_boundaries():
    assert BOUNDARIES[:4] == (4, 8, 16, 24)
    assert BOUNDARIES[16:19] == (128, 256, 384)
    assert BOUNDARIES[-1] == 2048


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"freq": [1410] * 7}, "columns of one length"),
        ({"itl_ms": [np.nan] * 8}, "itl_ms: expected finite numbers, got nan in row 0"),
        ({"freq": [1410.5] * 8}, "freq: expected positive whole"),
        ({"batch": [0] * 8}, "batch: expected at least 1"),
        ({"batch": [99] * 8}, "at most the last boundary, 8"),
        ({"boundaries": (8, 4)}, "boundaries: expected ascending"),
        ({"batch": [1, 2, 3, 4, 5, 6, 7, 8], "boundaries": (4, 8)}, "at least 8 points, got 4"),
    ],
)
def test_what_cannot_be_fitted(change, message):
    columns = {"freq": [1410] * 8, "batch": [1] * 8, "tokens": [1] * 8, "itl_ms": [1.0] * 8, "boundaries": (8,)}
    with pytest.raises(ValueError, match=message):
        fit_decode(**{**columns, **change})


def test_a_line_needs_two_points():
    with pytest.raises(ValueError, match="at least 2 points of every clock, got 1 at 1005 MHz"):
        fit_prefill([1410, 1410, 1005], [1, 2, 3], [1.0, 2.0, 3.0])
