import numpy as np
import pytest

from jaxlab.puzzlemoe import dual_mask_merge, reconstruct
from jaxlab.puzzlemoe.gaussian import BEST_TAU, merge_error, similar_share


def test_closed_forms_are_what_merging_does(gaussians):
    w = [np.asarray(x, np.float64) for x in gaussians]
    for tau in (0.0, 0.3, 0.4, 1.0):
        pair = dual_mask_merge(*gaussians, tau=tau)
        similar = np.mean(np.asarray(pair.mask_i & pair.mask_j))
        # bfloat16 has equal magnitudes where real numbers have none.
        assert similar == pytest.approx(similar_share(tau), abs=4e-3)
        error = sum(np.sum((np.asarray(reconstruct(pair, pos), np.float64) - w[pos]) ** 2) for pos in (0, 1))
        assert error / sum(np.sum(x**2) for x in w) == pytest.approx(float(merge_error(tau)), rel=0.01)


def test_the_papers_figures():
    assert similar_share(0.4) == pytest.approx(0.4845, abs=5e-5)
    assert similar_share(0.4, sigma_ratio=2.0) < similar_share(0.4)
    assert similar_share(0.4, 2.0) == pytest.approx(similar_share(0.4, 0.5))
    table = merge_error(np.array([0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0]))
    np.testing.assert_allclose(table, [0.181, 0.084, 0.059, 0.0499, 0.054, 0.069, 0.182], atol=8e-4)


def test_the_best_threshold_is_the_square_root_of_two_less_one():
    taus = np.linspace(0, 1, 100_001)
    assert taus[np.argmin(merge_error(taus))] == pytest.approx(BEST_TAU, abs=2e-5)
    # Position by position, whatever the weights: averaging is better exactly where the magnitudes are similar.
    a, b = np.random.default_rng(0).exponential(size=(2, 10_000))
    averaging, keeping = (a - b) ** 2 / 2, np.minimum(a, b) ** 2
    similar = np.abs(a - b) <= BEST_TAU * (a + b)
    assert ((averaging < keeping) == similar).all()
