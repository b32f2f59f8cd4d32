import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.superoffload import LossScaleConfig, init_loss_scale, update_loss_scale
from tests.oracles import adam as oracle

_update = jax.jit(update_loss_scale, static_argnums=2)


@given(
    overflows=st.lists(st.sampled_from([False, False, False, True]), max_size=25),
    window=st.sampled_from([1, 3]),
    hysteresis=st.sampled_from([1, 2]),
    consecutive=st.booleans(),
)
@settings(max_examples=40, deadline=None)
@pytest.mark.latest
def test_follows_deepspeed(overflows, window, hysteresis, consecutive):
    config = LossScaleConfig(16.0, window, hysteresis, consecutive, min_scale=2.0)
    state, scales = init_loss_scale(config), []
    assert float(state.scale) == 16.0
    for overflow in overflows:
        state = _update(state, overflow, config)
        scales.append(float(state.scale))
    wanted = oracle.loss_scales(
        overflows, scale=16.0, window=window, hysteresis=hysteresis, consecutive=consecutive, minimum=2.0
    )
    np.testing.assert_array_equal(scales, wanted)


def test_defaults_are_those_of_the_artifact():
    config = LossScaleConfig()
    assert (config.init_scale, config.window, config.hysteresis, config.min_scale) == (4096, 50, 2, 1)
    state = init_loss_scale(config)
    for _ in range(52):
        state = _update(state, False, config)
    assert float(state.scale) == 8192  # after 50 good steps, counted from the second


def test_overflow_at_the_smallest_scale():
    config = LossScaleConfig(init_scale=2.0, hysteresis=1, min_scale=1.0, raise_at_min=True)
    state = update_loss_scale(init_loss_scale(config), True, config)
    assert float(state.scale) == 1.0
    assert float(update_loss_scale(state, False, config).scale) == 1.0
    with pytest.raises(RuntimeError, match=r"smallest loss scale, 1\.0"):
        update_loss_scale(state, True, config)


@pytest.mark.parametrize(
    "settings",
    [{"init_scale": 0.5}, {"min_scale": 0.0}, {"window": 0}, {"hysteresis": 0}, {"init_scale": float("nan")}],
)
def test_bad_configs(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        LossScaleConfig(**settings)
