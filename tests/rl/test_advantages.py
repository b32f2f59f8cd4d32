import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.rl import compute_advantages
from tests.oracles import policy_objective as oracle

KINDS = ("grpo", "dr_grpo", "rloo")


@pytest.mark.latest
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ddof", [0, 1])
def test_against_float64(kind, ddof):
    rewards = np.random.default_rng(0).standard_normal(12).astype(np.float32)
    got = compute_advantages(rewards, group_size=4, kind=kind, eps=1e-4, ddof=ddof)
    want = oracle.advantages(rewards, np.repeat([0, 1, 2], 4), kind, 1e-4, ddof)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_groups_in_any_order_and_under_any_number(data):
    groups = data.draw(st.lists(st.sampled_from([-7, 0, 3, 10**6]), min_size=9, max_size=9))
    rewards = data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0]), min_size=9, max_size=9))
    kind = data.draw(st.sampled_from(KINDS))
    got = _jitted(np.array(rewards, np.float32), np.array(groups), kind)
    want = oracle.advantages(np.array(rewards, np.float32), groups, kind)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


_jitted = jax.jit(lambda r, g, kind: compute_advantages(r, group_ids=g, kind=kind), static_argnums=2)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_are_exactly_zero(kind):
    """The f32 mean of 0.1 seven times is not 0.1; divided by a deviation of rounding errors it would be near 1."""
    rewards = np.repeat(np.array([0.1, 1e4 + 1 / 3], np.float32), 7)
    assert not np.any(compute_advantages(rewards, group_size=7, kind=kind, eps=0.0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_one_keeps_its_reward(kind):
    got = compute_advantages(np.array([2.0, 0.0, 1.0]), group_ids=np.array([4, 9, 9]), kind=kind, eps=0.0)
    np.testing.assert_allclose(got[0], 2.0)
    np.testing.assert_array_equal(np.sign(got[1:]), [-1, 1])


def test_float64_stays_and_integers_become_float32():
    with jax.enable_x64(True):
        rewards = np.random.default_rng(1).standard_normal(6)
        got = compute_advantages(rewards, group_size=3)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, oracle.advantages(rewards, [0] * 3 + [1] * 3), rtol=1e-13)
    assert compute_advantages(np.array([0, 1]), group_size=2).dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "group_size, group_ids: expected exactly one"),
        ({"group_size": 2, "group_ids": np.zeros(4, int)}, "group_size, group_ids: expected exactly one"),
        ({"group_size": 3}, "group_size: expected a divisor of the 4 rewards, got 3"),
        ({"group_size": 0}, "group_size: .* got 0"),
        ({"group_ids": np.zeros(3, int)}, "group_ids: expected 4 integers"),
        ({"group_ids": np.zeros(4)}, "group_ids: .* got float"),
        ({"group_size": 2, "kind": "gae"}, "kind: expected one of grpo, dr_grpo, rloo, got 'gae'"),
        ({"group_size": 2, "eps": -1.0}, "eps: .* got -1"),
        ({"group_size": 2, "ddof": 2}, "ddof: .* got 2"),
    ],
)
def test_bad_inputs(unchecked, arguments, message):
    with pytest.raises(ValueError, match=message):
        compute_advantages(np.arange(4.0), **arguments)


def test_rewards_are_one_row(unchecked):
    with pytest.raises(ValueError, match=r"rewards: expected shape \[B\], got \(2, 2\)"):
        compute_advantages(np.zeros((2, 2)), group_size=2)
