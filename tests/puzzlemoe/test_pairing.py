import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.puzzlemoe import PuzzleConfig, apply_moe_layer, dual_mask_merge, random_pairs, reconstruct, search_pairs
from jaxlab.puzzlemoe.pairing import check_pairs
from jaxlab.puzzlemoe.statistics import expert_norms
from tests.puzzlemoe.conftest import D, N


@pytest.mark.parametrize(
    ("experts", "ratio", "pairs"),
    [(8, 0.5, 4), (8, 0.25, 2), (60, 0.25, 15), (5, 0.5, 2), (6, 0.25, 2), (7, 0.25, 2), (2, 0.25, 1), (64, 0.5, 32)],
)
def test_number_of_pairs(experts, ratio, pairs):
    got = random_pairs(jax.random.key(3), experts, ratio)
    assert got.shape == (pairs, 2)
    assert got.dtype == jnp.int32
    assert len(set(np.asarray(got).reshape(-1).tolist())) == 2 * pairs
    assert got.min() >= 0
    assert got.max() < experts


def test_random_pairs_are_those_of_the_permutation():
    key = jax.random.fold_in(jax.random.key(7), 3)
    np.testing.assert_array_equal(random_pairs(key, 8, 0.5).reshape(-1), jax.random.permutation(key, 8))
    assert random_pairs(key, 8, 0.25).tolist() == random_pairs(key, 8, 0.5)[:2].tolist()
    assert random_pairs(jax.random.key(1), 32, 0.5).tolist() != random_pairs(jax.random.key(2), 32, 0.5).tolist()


@pytest.mark.parametrize(("experts", "ratio"), [(8, 0.0), (8, 0.6), (8, float("nan")), (1, 0.5), (4, 0.1)])
def test_no_pairs(experts, ratio):
    with pytest.raises(ValueError, match="ratio"):
        random_pairs(jax.random.key(0), experts, ratio)


def test_bad_pair_lists_are_listed():
    assert check_pairs(np.array([[3, 1], [0, 2]]), 4).tolist() == [[3, 1], [0, 2]]
    with pytest.raises(ValueError, match=r"must hold experts 0..3, got \[\[0, 4\], \[-1, 2\]\]"):
        check_pairs(np.array([[0, 4], [3, 1], [-1, 2]]), 4)
    with pytest.raises(ValueError, match=r"two different experts, got \[\[2, 2\]\]"):
        check_pairs(np.array([[0, 1], [2, 2]]), 4)
    with pytest.raises(ValueError, match=r"got \[1\] more than once, in \[\[0, 1\], \[1, 2\]\]"):
        check_pairs(np.array([[0, 1], [1, 2]]), 4)
    for wrong in (np.zeros((0, 2), int), np.array([0, 1]), np.array([[0.0, 1.0]]), np.array([[0, 1, 2]])):
        with pytest.raises(ValueError, match=r"integers \[P, 2\]"):
            check_pairs(wrong, 4)


def output_error(layer, x, stats, pairs):
    """The squared error that the search lowers, by running the whole layer."""
    n_in, n_mid = expert_norms(stats, "sum")
    weights = {}
    for name, norms in (("gate", n_in), ("up", n_in), ("down", n_mid)):
        w = np.array(getattr(layer, name))
        for i, j in np.asarray(pairs):
            pair = dual_mask_merge(w[i], w[j], norms[i], norms[j])
            w[i], w[j] = (np.asarray(reconstruct(pair, pos), np.float32) for pos in (0, 1))
        weights[name] = jnp.asarray(w)
    change = apply_moe_layer(dataclasses.replace(layer, **weights), x) - apply_moe_layer(layer, x)
    return float(jnp.sum(jnp.square(change)))


@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_search_is_never_worse(layer, x, stats, ratio):
    key, cfg = jax.random.key(5), PuzzleConfig(ratio=ratio)
    start = random_pairs(key, N, ratio)
    found = search_pairs(key, layer, x, stats, cfg, steps=30)
    assert found.shape == start.shape
    assert found.dtype == jnp.int32
    check_pairs(found, N)
    before, after = output_error(layer, x, stats, start), output_error(layer, x, stats, found)
    assert after <= before * (1 + 1e-4)
    assert after < before  # with this key there is something to gain
    np.testing.assert_array_equal(search_pairs(key, layer, x, stats, cfg, steps=0), start)
    np.testing.assert_array_equal(search_pairs(key, layer, x, stats, cfg, steps=30), found)


def test_search_finds_twins(layer, x):
    """Experts that are equal in magnitude cost nothing together."""
    twin = np.array([0, 1, 2, 2, 0, 1])
    weights = {
        name: getattr(layer, name).astype(jnp.bfloat16).astype(jnp.float32)[twin] for name in ("gate", "up", "down")
    }
    found = search_pairs(jax.random.key(0), dataclasses.replace(layer, **weights), x, None, PuzzleConfig(), steps=60)
    assert {frozenset(pair) for pair in found.tolist()} == {frozenset(p) for p in ((0, 4), (1, 5), (2, 3))}


@pytest.mark.usefixtures("unchecked")
def test_search_refuses_what_does_not_fit(layer, x, stats):
    with pytest.raises(ValueError, match=f"x must end in d={D}"):
        search_pairs(jax.random.key(0), layer, x[..., 1:], None, PuzzleConfig())
    other = dataclasses.replace(stats, sum_sq_in=stats.sum_sq_in[:-1])
    with pytest.raises(ValueError, match="statistics of another model"):
        search_pairs(jax.random.key(0), layer, x, other, PuzzleConfig())
