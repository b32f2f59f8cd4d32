import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.puzzlemoe import ExpertStats, expert_norms, expert_stats
from tests.oracles import puzzlemoe as oracle
from tests.puzzlemoe.conftest import D, F, N

IDS = np.random.default_rng(0).integers(0, N - 1, (20, 2)).astype(np.int32)  # the last expert sees nothing


@pytest.fixture(scope="module")
def parts(layer, x):
    """Two calls with different tokens."""
    return [expert_stats(rows, layer.gate, layer.up, jnp.asarray(IDS)) for rows in x]


def test_against_the_oracle(layer, x, parts):
    for rows, part in zip(x, parts):
        inside, middle, tokens = oracle.expert_sums(rows, layer.gate, layer.up, IDS)
        np.testing.assert_allclose(part.sum_sq_in, inside, rtol=1e-5)
        np.testing.assert_allclose(part.sum_sq_mid, middle, rtol=1e-5)
        assert part.tokens.tolist() == tokens.tolist()
        assert part.calls.tolist() == [1] * N
        assert part.sum_sq_in.dtype == part.sum_sq_mid.dtype == jnp.float32


def test_sums_and_layers(parts):
    total = parts[0] + parts[1]
    np.testing.assert_allclose(total.sum_sq_in, parts[0].sum_sq_in + parts[1].sum_sq_in)
    assert total.calls.tolist() == [2] * N
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    for index in range(2):
        jax.tree.map(np.testing.assert_array_equal, stacked.layer(index), parts[index])
    both = stacked + stacked
    np.testing.assert_array_equal(both.layer(-1).tokens, 2 * parts[1].tokens)
    with pytest.raises(ValueError, match="layer 2"):
        stacked.layer(2)
    with pytest.raises(ValueError, match="layer 0"):
        parts[0].layer(0)
    with pytest.raises(ValueError, match="do not add"):
        parts[0] + stacked


def test_norms(parts):
    stats = parts[0] + parts[1]
    n_in, n_mid = expert_norms(stats, "sum")
    np.testing.assert_allclose(n_in, np.sqrt(stats.sum_sq_in), rtol=1e-6)
    np.testing.assert_allclose(n_mid, np.sqrt(stats.sum_sq_mid), rtol=1e-6)
    tokens = np.maximum(np.asarray(stats.tokens), 1)[:, None]
    np.testing.assert_allclose(expert_norms(stats, "tokens")[0], n_in / np.sqrt(tokens), rtol=1e-6)
    np.testing.assert_allclose(expert_norms(stats, "calls")[1], n_mid / np.sqrt(2), rtol=1e-6)
    ones = expert_norms(stats, "magnitude")
    assert [n.shape for n in ones] == [(N, D), (N, F)]
    assert all((n == 1).all() for n in ones)
    for norm in ("sum", "tokens", "calls"):
        assert (expert_norms(stats, norm)[0][N - 1] == 0).all()
    with pytest.raises(ValueError, match="norm must be one of sum, tokens, calls, magnitude, got 'l1'"):
        expert_norms(stats, "l1")


def test_no_tokens(layer):
    stats = expert_stats(jnp.zeros((0, D)), layer.gate, layer.up, jnp.zeros((0, 2), jnp.int32))
    assert stats.tokens.tolist() == [0] * N
    assert stats.calls.tolist() == [1] * N
    assert not stats.sum_sq_in.any()
    assert not stats.sum_sq_mid.any()


def test_bfloat16_and_traced_ids(layer, x, parts):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (x[0], layer.gate, layer.up))
    stats = jax.jit(expert_stats)(*half, jnp.asarray(IDS))
    np.testing.assert_allclose(stats.sum_sq_in, parts[0].sum_sq_in, rtol=0.03)
    np.testing.assert_allclose(stats.sum_sq_mid, parts[0].sum_sq_mid, rtol=0.1, atol=0.05)
    # What cannot raise inside jit counts for nobody.
    lost = jax.jit(expert_stats)(x[0], layer.gate, layer.up, jnp.asarray(np.where(IDS == 1, N + 3, IDS)))
    others = np.arange(N) != 1
    np.testing.assert_allclose(lost.sum_sq_mid, np.asarray(parts[0].sum_sq_mid) * others[:, None], rtol=1e-5)
    np.testing.assert_array_equal(lost.tokens, np.asarray(parts[0].tokens) * others)


def test_is_a_pytree(parts):
    again = jax.tree.map(np.asarray, parts[0])
    assert isinstance(again, ExpertStats)
    assert len(jax.tree.leaves(again)) == 4


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments(layer, x):
    ids = jnp.asarray(IDS)
    for bad in (-1, N, N + 7):
        with pytest.raises(ValueError, match=rf"expert_ids must be in 0..{N - 1}, got \[{bad}\]"):
            expert_stats(x[0], layer.gate, layer.up, ids.at[3, 1].set(bad))
    with pytest.raises(ValueError, match="expert_ids must be"):
        expert_stats(x[0], layer.gate, layer.up, ids[:-1])
    with pytest.raises(TypeError, match="expert_ids must be integers"):
        expert_stats(x[0], layer.gate, layer.up, ids * 1.0)
    with pytest.raises(ValueError, match="expected x"):
        expert_stats(x[0][:, :-1], layer.gate, layer.up, ids)
    with pytest.raises(ValueError, match="expected x"):
        expert_stats(x[0], layer.gate, layer.down, ids)
    with pytest.raises(ValueError, match="unknown act 'relu'"):
        expert_stats(x[0], layer.gate, layer.up, ids, act="relu")
