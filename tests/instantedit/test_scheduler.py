import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import count_compilations
from jaxlab.instantedit import PeRFlowSchedule
from tests.oracles import instantedit_parts as oracle

RNG = np.random.default_rng(0)
Z, E = RNG.normal(size=(2, 3, 4, 4, 2))
KINDS = ("diff_eps", "ddim_eps", "velocity")


@pytest.mark.latest
def test_windows_are_the_published_ones():
    schedule = PeRFlowSchedule()
    np.testing.assert_allclose(schedule.alphas_cumprod, oracle.alpha_bars(), rtol=1e-12)
    gammas = {1000: 0.286879, 750: 0.451579, 500: 0.641170, 250: 0.822196}
    for t, gamma in gammas.items():
        window = schedule.window(t)
        assert window.t_start == t / 1000
        assert window.gamma == pytest.approx(gamma, abs=5e-7)
    assert [schedule.window(t).t_start for t in (0.01, 249, 250.05, 250.2, 999.9)] == [0.25, 0.25, 0.25, 0.5, 1.0]
    for t, alpha in ((1000, 0.00466), (750, 0.056623), (500, 0.277669), (250, 0.675432), (0, 0.99915)):
        assert schedule.alpha_bar(t) == pytest.approx(alpha, abs=1e-6)
    assert schedule == PeRFlowSchedule(num_windows=4)
    assert hash(schedule) == hash(PeRFlowSchedule())


@pytest.mark.parametrize("windows", [1, 3, 4, 7])
def test_windows_and_steps_of_any_number(windows):
    schedule = PeRFlowSchedule(windows)
    for t in (1000, 700.0, 333, 1):
        start, end, alpha_start, alpha_end = oracle.window_of(t, windows)
        got = schedule.window(t)
        expected = (start, end, np.sqrt(alpha_start / alpha_end), alpha_start, alpha_end)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)
    for steps in (windows, windows + 1, 2 * windows, 3 * windows - 1):
        times = schedule.timesteps(steps)
        assert times.dtype == np.int32
        assert times.tolist() == oracle.timesteps(steps, windows)


def test_known_steps():
    schedule = PeRFlowSchedule()
    assert schedule.timesteps(6).tolist() == [1000, 875, 750, 625, 500, 250]
    assert schedule.timesteps(12)[:3].tolist() == [1000, 916, 833]
    assert schedule.timesteps(20)[-4:].tolist() == [200, 150, 99, 49]  # as the official code's float64 truncates
    with pytest.warns(UserWarning, match="3 is fewer than the 4 windows"):
        assert len(schedule.timesteps(3)) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_float64(kind):
    schedule = PeRFlowSchedule(prediction_type=kind)
    z, e = jnp.float32(Z), jnp.float32(E)
    for t, low in ((1000, 750), (916, 833), (500, 250), (250, 0), (125, 0)):
        down = oracle.step(E, t, low, Z, kind=kind)
        v = oracle.velocity(E, low, Z, kind=kind, window_at=t)
        up = Z + v * (t - low) / 1000
        scale = max(1, np.abs(down).max(), np.abs(up).max())
        np.testing.assert_allclose(schedule.step(e, t, low, z), down, rtol=0, atol=1e-6 * scale)
        got, velocity = schedule.inverse_step(e, t, low, z)
        np.testing.assert_allclose(got, up, rtol=0, atol=1e-6 * scale)
        np.testing.assert_allclose(velocity, v, rtol=0, atol=1e-6 * max(1, np.abs(v).max()))


def test_a_window_up_and_down_again():
    schedule = PeRFlowSchedule()
    for t, low in ((1000, 750), (250, 0)):
        gamma = schedule.window(t).gamma
        up, _ = schedule.inverse_step(E, t, low, Z)
        np.testing.assert_allclose(up, gamma * Z + np.sqrt(1 - gamma**2) * E, rtol=0, atol=1e-6)
        np.testing.assert_allclose(schedule.step(E, t, low, up), Z, rtol=0, atol=4e-6)
        official, _ = schedule.inverse_step(E, t, low, Z, mode="official")
        np.testing.assert_array_equal(official, up)


def test_official_inversion_inside_a_window_differs():
    schedule = PeRFlowSchedule()
    official, v = schedule.inverse_step(E, 500, 375, Z, mode="official")
    expected = oracle.official_inverse_velocity(E, 500, Z)
    np.testing.assert_allclose(v, expected, rtol=0, atol=4e-6)
    np.testing.assert_allclose(official, Z + expected / 8, rtol=0, atol=1e-6)
    exact, _ = schedule.inverse_step(E, 500, 375, Z)
    assert np.abs(np.asarray(official - exact)).max() > 1e-2


def test_shares_of_signal_and_noise():
    schedule = PeRFlowSchedule()
    for t in (1000, 750, 500, 250):
        at, bar = schedule.marginal(t, Z), schedule.alpha_bar(t)
        np.testing.assert_allclose([at.signal, at.noise], [np.sqrt(bar), np.sqrt(1 - bar)], rtol=0, atol=1e-6)
    ends, middle = (schedule.marginal(np.array(times), Z) for times in ([1000, 750, 500], [875, 625, 375]))
    low = schedule.marginal(np.array([750, 500, 250]), Z)
    assert middle.signal.shape == (3, 1, 1, 1)
    np.testing.assert_allclose(middle.signal, (ends.signal + low.signal) / 2, rtol=0, atol=1e-6)
    np.testing.assert_allclose(middle.noise_slope, (ends.noise - low.noise) / 0.25, rtol=0, atol=1e-5)
    # A noise that fits moves latents along this path.
    clean, noise = jnp.float32(Z), jnp.float32(E)
    at = schedule.marginal(625, clean)
    window = schedule.window(625)
    share = (np.sqrt(1 - window.alpha_start) - window.gamma * np.sqrt(1 - window.alpha_end)) / np.sqrt(
        1 - window.gamma**2
    )
    v = schedule.velocity(share * noise, 625, at.signal * clean + at.noise * noise)
    np.testing.assert_allclose(v, at.signal_slope * clean + at.noise_slope * noise, rtol=0, atol=1e-5)


def test_traced_times_are_one_program_and_may_differ_by_sample():
    schedule = PeRFlowSchedule()
    step = jax.jit(schedule.step)
    times, nexts = jnp.array([1000, 750, 250.0]), jnp.array([750, 500, 0.0])
    got = step(jnp.float32(E), times, nexts, jnp.float32(Z))
    expected = np.stack([oracle.step(e, t, n, z) for e, t, n, z in zip(E, times, nexts, Z)])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    z, e, other = jnp.float32(Z), jnp.float32(E), jnp.array([990, 333, 10.0])
    with count_compilations() as compiled:
        step(e, other, nexts, z)
    assert compiled.count == 0


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: PeRFlowSchedule(0), "num_windows.*got 0"),
        (lambda: PeRFlowSchedule(prediction_type="v_prediction"), "v_prediction"),
        (lambda: PeRFlowSchedule(2.5), "num_windows.*got 2.5"),
        (lambda: PeRFlowSchedule().timesteps(0), "num_steps.*got 0"),
        (lambda: PeRFlowSchedule().timesteps(1001), "num_steps: expected at most 1000, got 1001"),
        (lambda: PeRFlowSchedule().timesteps(4.0), "num_steps: expected a whole number, got 4.0"),
        (lambda: PeRFlowSchedule().timesteps("4"), "num_steps: expected a whole number, got '4'"),
        (
            lambda: PeRFlowSchedule().step(E[..., :1], 250, 0, Z),
            r"model_output: expected the shape of z, \(3, 4, 4, 2\)",
        ),
        (lambda: PeRFlowSchedule().inverse_step(E[1:], 250, 0, Z), "model_output: expected the shape of z"),
        (lambda: PeRFlowSchedule().window(0), r"\(0, 1000\], got 0"),
        (lambda: PeRFlowSchedule().window(1000.5), "1000.5"),
        (lambda: PeRFlowSchedule().window(float("nan")), "nan"),
        (lambda: PeRFlowSchedule().alpha_bar(-1), "-1"),
        (lambda: PeRFlowSchedule().step(E, 0, 0, Z), r"\(0, 1000\], got 0"),
        (lambda: PeRFlowSchedule().step(E, 250, -1, Z), r"\[0, 1000\], got -1"),
        (lambda: PeRFlowSchedule().inverse_step(E, 1250, 1000, Z), "1250"),
        (lambda: PeRFlowSchedule().inverse_step(E, 250, 0, Z, mode="newest"), "newest"),
    ],
)
def test_bad_input(unchecked, call, told):
    with pytest.raises(ValueError, match=told):
        call()
