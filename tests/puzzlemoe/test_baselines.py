import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.cluster.hierarchy as hierarchy

from jaxlab.puzzlemoe import (
    PuzzleConfig,
    apply_moe_layer,
    compress_experts,
    expert_norms,
    expert_stats,
    random_pairs,
)
from jaxlab.puzzlemoe.baselines import METHODS, hc_labels, naee_search, wanda_mask
from jaxlab.puzzlemoe.baselines.common import tie
from jaxlab.puzzlemoe.compression import unpack_experts
from jaxlab.puzzlemoe.layer import expert_outputs, route_rows
from tests.oracles import puzzlemoe as oracle
from tests.puzzlemoe.conftest import D, K, N

MATRICES = ("gate", "up", "down")
PAIRS = np.array([[4, 1], [0, 5], [2, 3]], np.int32)


@pytest.fixture(scope="module")
def batch_stats(layer, x):
    """Statistics with one call a calibration batch."""
    parts = [expert_stats(rows, layer.gate, layer.up, route_rows(layer, rows)[0]) for rows in x]
    return parts[0] + parts[1]


@pytest.fixture(scope="module")
def counts(layer, x):
    ids = oracle.layer(*arrays(layer), K, True, np.asarray(x).reshape(-1, D))[1]
    return np.bincount(ids.reshape(-1), minlength=N)


def arrays(layer):
    return layer.router, layer.gate, layer.up, layer.down


def error(layer, smaller, x):
    return float(jnp.linalg.norm(apply_moe_layer(smaller, x) - apply_moe_layer(layer, x)))


def merged_like(layer, got, groups, weights):
    """Members of a group are tied to its weighted mean."""
    assert got.num_experts == N
    np.testing.assert_array_equal(got.router, layer.router)
    for name in MATRICES:
        w = np.asarray(getattr(layer, name), np.float64)
        for group in groups:
            members = sorted(group)
            share = np.asarray(weights, float)[members]
            mean = np.tensordot(share / share.sum(), w[members], 1)
            for member in members:
                np.testing.assert_allclose(getattr(got, name)[member], mean, rtol=1e-5, atol=1e-6)


def test_names():
    contract = {"average", "drop", "hc_smoe", "naee", "wanda", "wanda_2_4", "m_smoe", "puzzle"}
    assert set(METHODS) == {*contract, "puzzle_unpacked"}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_interface(layer, x, batch_stats, name):
    got = METHODS[name](layer, x, batch_stats, N // 2, seed=1)
    y = apply_moe_layer(got, x)
    assert y.shape == x.shape
    assert jnp.isfinite(y).all()
    assert got.num_experts == (N // 2 if name in ("naee", "drop") else N)
    assert got.router.shape == (D, got.num_experts)
    assert all(getattr(got, w).dtype == getattr(layer, w).dtype for w in MATRICES)
    assert error(layer, got, x) > 0
    for target in (0, N, N + 1):
        with pytest.raises(ValueError, match=f"target_experts must be in 1..{N - 1}, got {target}"):
            METHODS[name](layer, x, batch_stats, target)
    with pytest.raises(ValueError, match=r"x must be \[B, T, d\]"):
        METHODS[name](layer, x[..., 1:], batch_stats, N // 2)


def test_average(layer, x):
    got = METHODS["average"](layer, x, None, N - 2, pairs=PAIRS[:2])
    merged_like(layer, got, [{4, 1}, {0, 5}, {2}, {3}], np.ones(N))
    drawn = random_pairs(jax.random.key(3), N, 0.5).tolist()
    merged_like(layer, METHODS["average"](layer, x, None, N // 2, seed=3), drawn, np.ones(N))
    with pytest.raises(ValueError, match="needs 3 pairs, got 2"):
        METHODS["average"](layer, x, None, N // 2, pairs=PAIRS[:2])
    with pytest.raises(ValueError, match="at least 3 of 6 experts, got target_experts=2"):
        METHODS["puzzle"](layer, x, None, 2)


def test_puzzle(layer, x, batch_stats):
    got = METHODS["puzzle"](layer, x, batch_stats, N // 2, pairs=PAIRS)
    packed = compress_experts(layer.gate, layer.up, layer.down, batch_stats, PAIRS, PuzzleConfig())
    for name, w in zip(MATRICES, unpack_experts(packed)):
        np.testing.assert_array_equal(getattr(got, name), w.astype(jnp.float32))
    # Packing changes magnitudes below 2^-15 and nothing else.
    plain = METHODS["puzzle_unpacked"](layer, x, batch_stats, N // 2, pairs=PAIRS)
    for name in MATRICES:
        a, b = (np.asarray(getattr(made, name)) for made in (plain, got))
        np.testing.assert_array_equal(a[abs(a) >= 2**-15], b[abs(a) >= 2**-15])
        assert (a != np.asarray(getattr(layer, name))).any()
    average = METHODS["average"](layer, x, batch_stats, N // 2, pairs=PAIRS)
    assert error(layer, got, x) < error(layer, average, x)


def test_drop(layer, x):
    got = METHODS["drop"](layer, x, None, 4, seed=2)
    kept = [int(np.flatnonzero((layer.gate == g).all((1, 2)))[0]) for g in got.gate]
    assert kept == sorted(set(kept))
    np.testing.assert_array_equal(got.router, layer.router[:, np.array(kept)])
    assert METHODS["drop"](layer, x, None, 1).top_k == 1  # no more experts a token than there are


@pytest.mark.parametrize("linkage", ["average", "single", "complete", "ward"])
@pytest.mark.parametrize("groups", [1, 3, 7, 12])
def test_clusters(linkage, groups):
    features = np.random.default_rng(0).normal(size=(12, 5))
    labels = hc_labels(features, groups, linkage=linkage)
    got = {frozenset(np.flatnonzero(labels == label).tolist()) for label in range(groups)}
    if linkage == "ward":
        assert got == oracle.ward_groups(features, groups)
    else:
        theirs = hierarchy.fcluster(hierarchy.linkage(features, linkage), groups, "maxclust")
        assert got == {frozenset(np.flatnonzero(theirs == label).tolist()) for label in np.unique(theirs)}
    firsts = [int(np.flatnonzero(labels == label)[0]) for label in range(groups)]
    assert firsts == sorted(firsts)
    assert labels[0] == 0


def test_wrong_clusters():
    features = np.eye(4)
    for groups in (0, 5):
        with pytest.raises(ValueError, match=f"num_groups must be in 1..4, got {groups}"):
            hc_labels(features, groups)
    with pytest.raises(ValueError, match="linkage must be one of"):
        hc_labels(features, 2, linkage="centroid")
    with pytest.raises(ValueError, match="finite"):
        hc_labels(features * np.nan, 2)


def test_hc_smoe(layer, x, counts):
    rows = x.reshape(-1, D)
    outputs = np.asarray(expert_outputs(rows, *arrays(layer)[1:], "silu"), np.float64)
    theirs = hierarchy.fcluster(hierarchy.linkage(outputs.mean(axis=1), "average"), 3, "maxclust")
    groups = [set(np.flatnonzero(theirs == label).tolist()) for label in np.unique(theirs)]
    merged_like(layer, METHODS["hc_smoe"](layer, x, None, 3), groups, counts)


def test_m_smoe(layer, x, counts):
    logits = np.asarray(x, np.float64).reshape(-1, D) @ np.asarray(layer.router, np.float64)
    dominant = sorted(sorted(range(N), key=lambda e: (-counts[e], e))[:3])
    groups = {leader: {leader} for leader in dominant}
    for e in set(range(N)) - set(dominant):
        cosine = [logits[:, e] @ logits[:, g] / np.linalg.norm(logits[:, g]) for g in dominant]
        groups[dominant[int(np.argmax(cosine))]].add(e)
    merged_like(layer, METHODS["m_smoe"](layer, x, None, 3), groups.values(), counts)


def test_unused_groups_become_plain_means(layer):
    """Experts that no token chooses have no frequency to be weighted by."""
    got = tie(layer, np.array([0, 0, 7, 7, 3, 3]), np.array([0, 0, 1, 3, 0, 2]))
    merged_like(layer, got, [{0, 1}, {2, 3}, {4, 5}], [1, 1, 1, 3, 0, 2])


@pytest.mark.parametrize("renormalise", [True, False])
def test_naee(layer, x, renormalise):
    layer = dataclasses.replace(layer, norm_topk_prob=renormalise)
    subsets, losses, best = naee_search(layer, x, 2)
    want = oracle.naee(*arrays(layer), K, renormalise, x, 2)
    assert [tuple(subset) for subset in subsets.tolist()] == list(want)
    assert losses.dtype == np.float64
    np.testing.assert_allclose(losses, list(want.values()), rtol=1e-4)
    assert tuple(best.tolist()) == min(want, key=want.get)
    got = METHODS["naee"](layer, x, None, N - 2)
    kept = np.setdiff1d(np.arange(N), best)
    np.testing.assert_array_equal(got.router, layer.router[:, kept])
    np.testing.assert_array_equal(got.down, layer.down[kept])
    by_running = np.sum([np.linalg.norm(apply_moe_layer(got, b) - apply_moe_layer(layer, b)) for b in x])
    assert by_running == pytest.approx(losses.min(), rel=1e-4)


def test_naee_limits(layer, x):
    for wrong in (0, N):
        with pytest.raises(ValueError, match=f"num_drop must be in 1..{N - 1}, got {wrong}"):
            naee_search(layer, x, wrong)
    many = jax.tree.map(lambda leaf: jnp.zeros((40, *leaf.shape[1:])), layer)
    many = dataclasses.replace(many, router=jnp.zeros((D, 40)))
    with pytest.raises(ValueError, match="137846528820 subsets"):
        naee_search(many, x, 20)


@pytest.mark.parametrize(
    "how", [{"sparsity": 0.5}, {"sparsity": 0.3}, {"sparsity": 0.0}, {"pattern": (2, 4)}, {"pattern": (1, 4)}]
)
def test_wanda_masks(how):
    rng = np.random.default_rng(0)
    weight = np.round(rng.normal(size=(24, 10)), 1).astype(np.float32)  # with ties
    norm = np.round(rng.uniform(0.5, 2, 24), 0).astype(np.float32)
    got = wanda_mask(jnp.asarray(weight), jnp.asarray(norm), **how)
    np.testing.assert_array_equal(got, oracle.wanda(weight, norm, **how))


@pytest.mark.parametrize("name", ["wanda", "wanda_2_4"])
def test_wanda(layer, x, batch_stats, name):
    how = {"pattern": (2, 4)} if name == "wanda_2_4" else {"sparsity": 1 - 4 / N}
    got = METHODS[name](layer, x, batch_stats, 4)
    n_in, n_mid = expert_norms(batch_stats, "calls")
    for matrix in MATRICES:
        norms = n_mid if matrix == "down" else n_in
        for e in range(N):
            w = np.asarray(getattr(layer, matrix)[e])
            np.testing.assert_array_equal(getattr(got, matrix)[e], np.where(oracle.wanda(w, norms[e], **how), w, 0))
    again = METHODS[name](layer, x, None, 4)  # without statistics they are taken of x
    assert all((getattr(again, w) == getattr(got, w)).all() for w in MATRICES)


@pytest.mark.usefixtures("unchecked")
def test_wrong_wanda():
    w, n = jnp.ones((6, 3)), jnp.ones(6)
    with pytest.raises(ValueError, match=r"pattern \(2, 4\) needs .* multiple of 4, got 6"):
        wanda_mask(w, n, pattern=(2, 4))
    with pytest.raises(ValueError, match="pattern must be"):
        wanda_mask(w, n, pattern=(5, 4))
    for sparsity in (-0.1, 1.0):
        with pytest.raises(ValueError, match="sparsity must be in"):
            wanda_mask(w, n, sparsity=sparsity)
    with pytest.raises(ValueError, match="expected weight"):
        wanda_mask(w, n[:-1])
    with pytest.raises(ValueError, match="n must be finite"):
        wanda_mask(w, -n)
    with pytest.raises(TypeError, match="weight must be floating"):
        wanda_mask(w.astype(jnp.int8), n)
