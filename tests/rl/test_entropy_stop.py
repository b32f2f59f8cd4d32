import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.rl import EntropyZScoreStop
from tests.oracles import policy_objective as oracle


def phase(rule, entropies):
    """What each step hears, by one compiled scan."""

    def step(state, entropy):
        return rule.update(state, entropy), rule.active(state)

    return np.asarray(jax.jit(lambda x: jax.lax.scan(step, rule.init(), x)[1])(jnp.asarray(entropies)))


RULES = [EntropyZScoreStop(5, 1.3), EntropyZScoreStop(5, 1.3, two_sided=True), EntropyZScoreStop(2, 0.5)]


@pytest.mark.latest
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(RULES))
def test_against_the_list(seed, rule):
    entropies = np.random.default_rng(seed).standard_normal(24).astype(np.float32)
    want = oracle.slow_fast_phase(entropies, rule.window, rule.threshold, rule.two_sided)
    np.testing.assert_array_equal(phase(rule, entropies), want)


@pytest.mark.parametrize("level", [0.1, 12.345678])
def test_constant_and_falling_entropies_never_stop_it(level):
    """A rounded mean would make z of equal values anything up to 1."""
    rule = EntropyZScoreStop(30, 0.5)
    assert phase(rule, np.full(80, level, np.float32)).all()
    assert phase(rule, level * 0.97 ** np.arange(80, dtype=np.float32)).all()
    assert not phase(EntropyZScoreStop(30, 0.5, two_sided=True), level - np.arange(80, dtype=np.float32)).all()


def test_a_jump_stops_it_at_the_next_step_for_good():
    entropies = np.full(60, 0.5, np.float32)
    entropies[40] = 0.6
    np.testing.assert_array_equal(phase(EntropyZScoreStop(), entropies), np.arange(60) <= 40)
    entropies = np.full(30, 0.5, np.float32)
    entropies[28] = 9.0  # one entropy short of a full window
    assert phase(EntropyZScoreStop(30, 1.0), entropies).all()


def test_state_is_float64_in_64_bit_mode():
    rule = EntropyZScoreStop(3, 1.0)
    assert rule.init().entropies.dtype == jnp.float32
    with jax.enable_x64(True):
        state = rule.init()
        for entropy in (1.0, 1.0, 1.0 + 1e-10):
            assert bool(rule.active(state))
            state = rule.update(state, entropy)
        assert state.entropies.dtype == jnp.float64
        below = 1e-10 * (2 / 3) / (1e-10 * np.sqrt(2) / 3 + 1e-9)  # far under 1: the deviation is below 1e-9
        assert bool(rule.active(state)) == (below < 1)
        assert not bool(rule.active(EntropyZScoreStop(3, 0.9 * below).update(state, 1.0 + 2e-9)))


@pytest.mark.parametrize("window", [1, 0, -3])
def test_bad_window(window):
    with pytest.raises(ValueError, match=f"window: expected at least 2 entropies, got {window}"):
        EntropyZScoreStop(window)
