import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.puzzlemoe import MergedPair, dual_mask_merge, pack_pair, reconstruct, similarity_mask, unpack
from tests.oracles import puzzlemoe as oracle

FIELDS = ("mag", "mask_i", "mask_j", "sign_i", "sign_j")


def check(got: MergedPair, want):
    for name, value in zip(FIELDS, want):
        np.testing.assert_array_equal(np.asarray(getattr(got, name)), value, err_msg=name)


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0])
def test_against_the_oracle(tau, axis):
    rng = np.random.default_rng(0)
    w_i, w_j = (jnp.asarray(0.02 * rng.normal(size=(24, 16)), jnp.bfloat16) for _ in range(2))
    n_i, n_j = (rng.uniform(0.2, 2, 24).astype(np.float32) for _ in range(2))
    want = oracle.merge(w_i, w_j, n_i[:, None], n_j[:, None], tau)
    turn = (lambda w: w) if axis == -2 else jnp.transpose
    got = dual_mask_merge(turn(w_i), turn(w_j), jnp.asarray(n_i), jnp.asarray(n_j), tau=tau, axis=axis)
    check(jax.tree.map(turn, got), want)
    np.testing.assert_array_equal(similarity_mask(w_i, w_j, tau), want[1] & want[2])
    for pos, (mask, sign) in enumerate(((want[1], want[3]), (want[2], want[4]))):
        member = np.where(mask, np.where(sign, -1.0, 1.0) * want[0].astype(float), 0.0)
        np.testing.assert_array_equal(np.asarray(turn(reconstruct(got, pos)), float), member)


def test_all_mantissas_and_near_exponents():
    """Every ratio of bfloat16 magnitudes up to 8: similarity, and the mean rounded once."""
    mantissas = np.arange(128, 256) / 128
    a, b = (
        x.reshape(-1)
        for x in np.broadcast_arrays(mantissas[:, None, None], mantissas[:, None] * 2.0 ** np.arange(-3, 4))
    )
    got = dual_mask_merge(jnp.asarray(a, jnp.bfloat16), jnp.asarray(-b, jnp.bfloat16))
    check(got, oracle.merge(a, -b))


def test_ties_of_tau_are_similar():
    """a/b = 7/3 is |a-b|/(a+b) = 0.4 exactly; a float64 0.4 beside a float32 quotient would lose all of them."""
    c = np.arange(1, 37)[:, None] * 2.0 ** np.arange(-12, 3)
    seven, three = (jnp.asarray(k * c, jnp.bfloat16) for k in (7, 3))
    assert (np.asarray(seven, float) == 7 * c).all()
    assert (np.asarray(three, float) == 3 * c).all()
    for a, b in ((seven, three), (three, seven), (-seven, three)):
        assert similarity_mask(a, b).all()
        assert jax.jit(similarity_mask)(a, b, 0.4).all()


def test_zeros_and_signs():
    w_i, w_j = jnp.array([0.0, -0.0, 0.0, -0.5, -0.0]), jnp.array([0.0, -0.0, 0.25, 0.0, -0.25])
    pair = dual_mask_merge(w_i, w_j)
    assert pair.mask_i.tolist() == [True, True, False, True, False]
    assert pair.mask_j.tolist() == [True, True, True, False, True]
    assert pair.sign_i.tolist() == [False, False, False, True, False]
    for pos, weights in enumerate((w_i, w_j)):
        value = reconstruct(pair, pos)
        assert value.tolist() == weights.tolist()
        assert (np.signbit(np.asarray(value, float)) == (np.asarray(weights) < 0)).all()
    assert jnp.isfinite(pair.mag).all()  # no 0/0


def test_tau_zero_and_one():
    w_i, w_j = jnp.array([0.5, 0.5, -0.25]), jnp.array([-0.5, 0.25, 1.0])
    assert similarity_mask(w_i, w_j, 0.0).tolist() == [True, False, False]
    everything = dual_mask_merge(w_i, w_j, tau=1.0)
    assert everything.mask_i.all()
    assert everything.mask_j.all()
    assert reconstruct(everything, 0).tolist() == [0.5, 0.375, -0.625]


def test_saliency_ties_go_to_the_first():
    w_i, w_j = jnp.full((1, 2), 0.25), jnp.full((1, 2), 1.0)
    pair = dual_mask_merge(w_i, w_j, jnp.array([4.0]), jnp.array([1.0]))
    assert pair.mag.tolist() == [[0.25, 0.25]]
    assert pair.mask_i.all()
    assert not pair.mask_j.any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 0.02, 1.0]), tau=st.sampled_from([0.0, 0.3, 0.4, 1.0]))
def test_masks_are_complementary_unless_similar(seed, scale, tau):
    rng = np.random.default_rng(seed)
    w_i, w_j = (jnp.asarray(scale * rng.standard_t(3, (8, 8)), jnp.bfloat16) for _ in range(2))
    n_i, n_j = (jnp.asarray(rng.uniform(0, 2, 8), jnp.float32) for _ in range(2))
    pair = _merge(w_i, w_j, n_i, n_j, tau)
    similar = similarity_mask(w_i, w_j, tau)
    np.testing.assert_array_equal(pair.mask_i & pair.mask_j, similar)
    assert (pair.mask_i | pair.mask_j).all()
    assert (pair.mag >= 0).all()
    # Whoever owns a position keeps its weight; the words say what the pair says.
    for pos, (weights, mask) in enumerate(((w_i, pair.mask_i), (w_j, pair.mask_j))):
        value = reconstruct(pair, pos)
        np.testing.assert_array_equal(np.where(mask & ~similar, value, 0), np.where(mask & ~similar, weights, 0))
        large = np.asarray(pair.mag) >= 2.0**-15
        decoded = unpack(pack_pair(pair), pos)
        np.testing.assert_array_equal(np.where(large, decoded, 0), np.where(large, value, 0))


_merge = jax.jit(lambda w_i, w_j, n_i, n_j, tau: dual_mask_merge(w_i, w_j, n_i, n_j, tau=tau))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_dtypes(dtype):
    w_i, w_j = jnp.array([0.5, -0.1], dtype), jnp.array([-0.375, 0.75], dtype)
    check(dual_mask_merge(w_i, w_j), oracle.merge(np.asarray(w_i, np.float64), np.asarray(w_j, np.float64)))


def test_vmap_over_pairs():
    rng = np.random.default_rng(3)
    w_i, w_j = (jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32) for _ in range(2))
    n_i, n_j = (jnp.asarray(rng.uniform(size=(3, 4)), jnp.float32) for _ in range(2))
    together = jax.vmap(dual_mask_merge)(w_i, w_j, n_i, n_j)
    for p in range(3):
        one = dual_mask_merge(w_i[p], w_j[p], n_i[p], n_j[p])
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf, p=p: leaf[p], together), one)


@pytest.mark.latest
def test_density_and_error_of_gaussians(gaussians):
    """Spec 2.2: mask density 0.742, relative error 0.0499 at tau 0.4, and 0.4 is the best of the curve."""
    w_i, w_j = gaussians
    squares = sum(float(jnp.sum(jnp.square(w.astype(jnp.float32)))) for w in gaussians)

    @jax.jit
    def figures(tau):
        pair = dual_mask_merge(w_i, w_j, tau=tau)
        words = pack_pair(pair, checked=False)
        wrong = sum(jnp.sum(jnp.square(unpack(words, pos, jnp.float32) - w)) for pos, w in enumerate(gaussians))
        low = jnp.sum((pair.mag < 2.0**-15) & (pair.mag != 0))
        return jnp.mean(pair.mask_i), jnp.mean(pair.mask_j), wrong / squares, low

    curve = {0.0: 0.181, 0.2: 0.084, 0.3: 0.059, 0.4: 0.0499, 0.5: 0.054, 0.6: 0.069, 1.0: 0.182}
    errors = {}
    for tau, expected in curve.items():
        density_i, density_j, errors[tau], low = (float(value) for value in figures(tau))
        assert errors[tau] == pytest.approx(expected, abs=1.2e-3)
        if tau == 0.4:
            assert density_i == pytest.approx(0.742, abs=2e-3)
            assert density_j == pytest.approx(0.742, abs=2e-3)
            assert low < 10  # 1.6e-6 of merged weights underflow
    assert min(errors, key=errors.get) == 0.4
    mean = sum(float(jnp.sum(jnp.square((w_i + w_j) / 2 - w).astype(jnp.float32))) for w in gaussians)
    assert mean / squares == pytest.approx(0.5, abs=0.01)
    raw = np.mean(np.abs(np.asarray(w_i, np.float32)) < 2.0**-15)
    assert raw == pytest.approx(1.2e-3, abs=2e-4)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_share_of_similar_gaussians(gaussians, ratio):
    """P(sim) = 2/pi [atan(s (1+tau)/(1-tau)) - atan(s (1-tau)/(1+tau))] for standard deviations of ratio s."""
    w_i, w_j = gaussians
    measured = {tau: float(jnp.mean(similarity_mask(w_i, w_j * ratio, tau))) for tau in (0.2, 0.4)}
    for tau, got in measured.items():
        wide = (1 + tau) / (1 - tau)
        assert got == pytest.approx(2 / math.pi * (math.atan(ratio * wide) - math.atan(ratio / wide)), abs=2e-3)
    if ratio == 1:
        assert measured[0.4] == pytest.approx(0.4845, abs=2e-3)


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments():
    w = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"w_i and w_j must have one shape, got \(4, 3\) and \(3, 4\)"):
        dual_mask_merge(w, w.T)
    for tau in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="tau must be in"):
            dual_mask_merge(w, w, tau=tau)
        with pytest.raises(ValueError, match="tau must be in"):
            similarity_mask(w, w, tau)
    for bad in (w.astype(jnp.int8), w.astype(jnp.float8_e4m3fn)):
        with pytest.raises(TypeError, match="w_j must be floating"):
            dual_mask_merge(w, bad)
    with pytest.raises(ValueError, match=r"n_i must have shape \(4,\)"):
        dual_mask_merge(w, w, jnp.ones(3), jnp.ones(3))
    dual_mask_merge(w, w, jnp.ones(3), jnp.ones(3), axis=-1)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="n_j must be finite and not negative, got 1 of 4"):
            dual_mask_merge(w, w, jnp.ones(4), jnp.ones(4).at[2].set(bad))
    with pytest.raises(ValueError, match="axis 2"):
        dual_mask_merge(w, w, jnp.ones(4), axis=2)
    for pos in (2, -1, np.array([0, 3])):
        with pytest.raises(ValueError, match="pos must be 0 or 1"):
            reconstruct(dual_mask_merge(w, w), pos)
