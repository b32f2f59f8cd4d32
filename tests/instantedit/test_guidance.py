import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.instantedit import PeRFlowSchedule, dpg, ili
from tests.oracles import instantedit_parts as oracle

RNG = np.random.default_rng(1)
E0, ET, ES, Z, ZI = RNG.normal(size=(5, 2, 5, 6, 4)).astype(np.float32)


@pytest.mark.latest
def test_dpg_equals_float64():
    wide = [x.astype(np.float64) for x in (E0, ET, ES)]
    np.testing.assert_allclose(dpg(E0, ET, ES), oracle.dpg(*wide, 1.1, 3.0), rtol=0, atol=1e-5)
    whole = dpg(E0, ET, ES, w_cfg=7.5, w_dpg=0.5, axes=(1, 2, 3))
    np.testing.assert_allclose(whole, oracle.dpg(*wide, 7.5, 0.5, per_channel=False), rtol=0, atol=1e-5)


def test_float16_predictions_are_summed_in_float32():
    # Squares of 1e-4 are 0 in float16.
    small = [(1e-4 * x).astype(np.float16) for x in (E0, ET, ES)]
    got = dpg(*small)
    assert got.dtype == jnp.float32
    expected = oracle.dpg(*(x.astype(np.float64) for x in small), 1.1, 3.0)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-8)


def test_a_source_prompt_that_says_nothing_is_plain_guidance():
    np.testing.assert_allclose(dpg(E0, ET, E0), E0 + 4.1 * (ET - E0), rtol=1e-5, atol=1e-5)
    tiny = dpg(E0, ET, E0 + np.float32(1e-9), w_cfg=1.0, w_dpg=1.0)
    assert np.isfinite(tiny).all()


@pytest.mark.parametrize("weights", [(1.1, 3.0), (7.5, 0.0), (0.0, 5.0)])
def test_equal_prompts_leave_the_inversion_bit_for_bit(weights):
    schedule = PeRFlowSchedule()

    @jax.jit
    def latents(z_inv, z, zs, e0, es, et, ec, w_cfg, w_dpg, t):
        guided = dpg(e0, et, ec, w_cfg=w_cfg, w_dpg=w_dpg)
        source = e0 + w_cfg * (es - e0)
        return ili(z_inv, schedule.step(guided, t, t - 83, z), schedule.step(source, t, t - 83, zs))

    for t in (1000.0, 333.0):
        np.testing.assert_array_equal(latents(ZI, Z, Z.copy(), E0, ES, ES.copy(), ES.copy(), *weights, t), ZI)


def test_ili_takes_the_difference_first():
    far = np.float32(1e6) + np.zeros_like(Z)
    np.testing.assert_array_equal(ili(Z, far, far), Z)
    np.testing.assert_allclose(ili(Z, ET, ES), Z + (ET - ES), rtol=1e-6)


def test_bad_input(unchecked):
    with pytest.raises(
        ValueError, match=r"eps_src: expected the shape of eps_null, \(2, 5, 6, 4\), got \(2, 5, 6, 1\)"
    ):
        dpg(E0, ET, ES[..., :1])
    with pytest.raises(ValueError, match="eps_tgt: expected the shape"):
        dpg(E0, ET[:1], ES)
    with pytest.raises(ValueError, match=r"axes: expected axes of 4 dimensions, got \(7,\)"):
        dpg(E0, ET, ES, axes=(7,))
    with pytest.raises(ValueError, match=r"zs_step: expected the shape of z_inv, .* got \(2, 5, 6, 3\)"):
        ili(ZI, Z, Z[..., :3])
