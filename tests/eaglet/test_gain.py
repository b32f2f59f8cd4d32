"""Formulas of the reward and the filter against numbers computed one at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.eaglet import capability_gain, ecgr, final_reward, format_reward, group_advantages, hcf_keep
from tests.oracles import eaglet as oracle

rewards = st.sampled_from([0.0, 0.25, 0.5, 1.0])
steps = st.integers(1, 100)


@pytest.mark.latest
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(rewards, rewards, steps, steps), min_size=2, max_size=2),
    st.sampled_from([-0.5, 0.0, 0.01, 0.1]),
    st.sampled_from([None, 0.5, 1.5]),
    st.booleans(),
)
def test_against_one_at_a_time(runs, alpha, max_decay, tie_bonus):
    options = {"alpha": alpha, "max_decay": max_decay, "tie_bonus": tie_bonus}
    columns = [np.array(column) for column in zip(*runs)]
    want = [oracle.gain(*run, **options) for run in runs]
    got = capability_gain(*columns, **options)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(ecgr(*columns, **options), sum(want), rtol=1e-12)
    single = [jnp.asarray(column, jnp.float32) for column in columns]
    np.testing.assert_allclose(capability_gain(*single, **options), want, rtol=2e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(rewards, rewards), min_size=1, max_size=3), st.booleans())
def test_filter_against_one_at_a_time(runs, strict):
    with_plan, without = (list(column) for column in zip(*runs))
    assert hcf_keep(with_plan, without, strict=strict) == oracle.keep(with_plan, without, strict)


def test_what_the_comparisons_are():
    """Strict in the reward, not strict in the filter; fewer steps raise the reward; a failure gains nothing."""
    assert ecgr([0.5, 1.0], [0.5, 1.0], [9, 9], [3, 3]) == 0
    assert hcf_keep([0.5, 1.0], [0.5, 1.0])
    assert not hcf_keep([1.0, 0.4], [0.0, 0.5])
    fast, slow = capability_gain([1.0, 1.0], [0.0, 0.0], [20, 20], [2, 30], alpha=0.1)
    assert fast == pytest.approx(1.1**18)
    assert slow == pytest.approx(1.1**-10)
    assert ecgr([0.0, 0.2], [0.0, 0.5], [100, 100], [1, 1], alpha=1.0) == 0
    assert ecgr([0.0, 1.0], [0.0, 1.0], [9, 9], [4, 4], tie_bonus=True, alpha=1.0) == 31
    assert capability_gain([1.0], [1.0], [9], [1], tie_bonus=True, alpha=1.0, max_decay=0.5) == 0


def test_a_factor_beyond_all_floats_is_nothing_where_there_is_no_gain():
    got = capability_gain([1.0, 0.0], [0.0, 1.0], [10_000, 10_000], [1, 1], alpha=1.0)
    assert got.tolist() == [np.inf, 0.0]


def test_axes_broadcast_and_dtypes_stay():
    r = np.random.default_rng(0).random((4, 3, 2)).astype(np.float32)
    got = capability_gain(r, r[0, 0], [10, 20], 5)
    assert (got.shape, got.dtype) == ((4, 3, 2), np.float32)
    assert ecgr(r, r[0, 0], [10, 20], 5).shape == (4, 3)
    assert hcf_keep(r, 0.5).shape == (4, 3)
    assert hcf_keep(r, 0.5).dtype == bool
    assert capability_gain(1, 0, [1], 1).dtype == np.float64
    assert capability_gain(r, np.zeros(2), 1, 1).dtype == np.float64
    assert capability_gain(jnp.ones(2, jnp.bfloat16), 0.5, 1, 1).dtype == np.float32
    assert isinstance(jax.jit(ecgr)(jnp.ones(2), jnp.zeros(2), jnp.ones(2), jnp.ones(2)), jax.Array)
    assert final_reward(got.sum(-1), 1.0).dtype == np.float32


def test_raw_scores_count_where_allowed():
    assert capability_gain([0.0], [-1.0], [3], [3], allow_raw=True) == 1
    assert not hcf_keep([-1.0], [0.0], allow_raw=True)
    assert capability_gain([-1.0], [-1.0], [3], [1], allow_raw=True, tie_bonus=True) == 0


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.0], [0.0], [1], [1]), {"alpha": -1.0}, "alpha: expected more than -1, got -1"),
        (([1.0], [0.0], [1], [1]), {"alpha": float("nan")}, "alpha"),
        (([1.0], [0.0], [1], [1]), {"max_decay": 0.0}, "max_decay"),
        (([1.0, 1.0], [0.0] * 3, [1], [1]), {}, "expected shapes that broadcast"),
        (([], [], [], []), {}, "expected a last axis"),
        ((1.0, 0.0, 1, 1), {}, "expected a last axis"),
        (([1.1], [0.0], [1], [1]), {}, r"r_with: expected values in \[0, 1\] .*got 1.1"),
        (([1.0], [-0.5], [1], [1]), {}, r"r_without: .*allow_raw=True.*got -0.5"),
        (([1.0], [-1.5], [1], [1]), {"allow_raw": True}, r"r_without: expected values in \[-1, 1\], got -1.5"),
        (([float("nan")], [0.0], [1], [1]), {}, "r_with: .*got nan"),
        (([1.0], [0.0], [0], [1]), {}, "n_without: expected steps above 0, got 0"),
        (([1.0], [0.0], [1], [-2]), {}, "m_with: expected steps above 0, got -2"),
    ],
)
def test_bad_inputs(arguments, options, message):
    for function in (capability_gain, ecgr):
        with pytest.raises(ValueError, match=message):
            function(*arguments, **options)


def test_bad_inputs_of_the_filter():
    with pytest.raises(ValueError, match="r_with"):
        hcf_keep([2.0], [0.0])
    with pytest.raises(ValueError, match="last axis"):
        hcf_keep(np.ones((3, 0)), np.ones((3, 0)))


@pytest.mark.latest
def test_group_advantages():
    table = np.random.default_rng(1).random((3, 4))
    table[1] = 0.1
    got = group_advantages(table)
    want = [oracle.advantages(row) for row in table.tolist()]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert not got[1].any()
    single = group_advantages(jnp.asarray(table, jnp.float32))
    assert isinstance(single, jax.Array)
    np.testing.assert_allclose(single, want, rtol=1e-4, atol=1e-6)
    assert group_advantages([[0, 1]]).tolist() == pytest.approx(np.array([[-1.0, 1.0]]) / (1 + 2e-6))
    for wrong in (np.ones((3, 1)), np.ones(4)):
        with pytest.raises(ValueError, match=r"rewards: expected shape \[P, G\] with at least 2"):
            group_advantages(wrong)


def test_the_final_reward_is_the_sum():
    assert final_reward(2.5, format_reward("<think>a</think> <plan>b</plan>")) == 3.5
    assert format_reward("b") == 0.0
    with pytest.raises(ValueError, match="broadcast"):
        final_reward(np.ones(2), np.ones(3))
