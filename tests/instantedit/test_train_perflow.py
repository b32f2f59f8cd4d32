import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.core import jsonl
from jaxlab.instantedit import PeRFlowSchedule
from jaxlab.instantedit.train_perflow import (
    Captioned,
    CaptionedBatches,
    NoiseLoss,
    PeRFlowLoss,
    StageConfig,
    left_out,
    train_stage,
    with_ema,
)
from jaxlab.training import OptimizerConfig
from tests.oracles import perflow_training as oracle

NULL = (1, 0, 0)
RNG = np.random.default_rng(0)


@dataclasses.dataclass(frozen=True)
class Net:
    """Something with a network's `apply`."""

    function: object

    def apply(self, variables, *args):
        return self.function(variables["params"], *args)


TEXT = Net(lambda params, ids: jnp.float32(ids)[..., None])


def batch(rows, side=2, ids=((1, 2, 0),)):
    latents = np.float32(RNG.uniform(-1, 1, (rows, side, side, 3)))
    return Captioned(latents, np.resize(np.int32(ids), (rows, 3)))


def noise_of(alphas):
    """From black pictures, time and level say what the noise is."""

    def function(params, z, time, states):
        signal = jnp.sqrt(1 - alphas[jnp.int32(time) - 1])[:, None, None, None]
        return z / signal + params["off"]

    return Net(function)


def test_teacher_learns_the_noise_of_the_schedules_levels():
    alphas = jnp.float32(PeRFlowSchedule().alphas_cumprod)
    loss = NoiseLoss(noise_of(alphas), TEXT, NULL)
    black = Captioned(np.zeros((1000, 1, 1, 3), np.float32), np.zeros((1000, 3), np.int32))
    params = {"unet": {"off": jnp.float32(0)}, "text_encoder": {}}
    out = loss(params, black, jax.random.key(0))
    assert float(out.total) < 1e-3
    # Errors of 1 everywhere; of a thousand rows each takes one of the thousand times.
    out = loss({"unet": {"off": jnp.float32(1)}, "text_encoder": {}}, black, jax.random.key(0))
    expected = sum(oracle.min_snr(t) for t in range(1, 1001))
    assert float(out.total) == pytest.approx(expected, rel=1e-3)
    assert float(out.weight) == 1000
    assert float(out.metrics["noise_error"]) == pytest.approx(1000, rel=1e-3)


def test_controlnet_learns_beside_a_frozen_teacher():
    def control(params, z, time, states, hint):
        return (params["gain"] * hint,), hint.sum((1, 2))

    def unet(params, z, time, states, down, mid):
        assert mid.shape == (4, 3)
        return params["out"] * down[0]

    frozen = {"unet": {"out": jnp.float32(3)}, "text_encoder": {}}
    loss = NoiseLoss(Net(unet), TEXT, NULL, controlnet=Net(control), frozen=frozen)
    rows = batch(4).replace(edges=np.ones((4, 2, 2), bool))
    grads = jax.grad(lambda params: loss(params, rows, jax.random.key(0)).total)({"controlnet": {"gain": 0.1}})
    assert set(grads) == {"controlnet"}
    assert abs(float(grads["controlnet"]["gain"])) > 0


def bent(z, t):
    """A teacher's noise."""
    return np.tanh(z) * (0.5 + t / 2000)


def teacher(params, z, time, states):
    return jnp.tanh(z) * (0.5 + time / 2000)[:, None, None, None]


@pytest.mark.latest
@pytest.mark.parametrize("clip", [None, 0.8])
def test_windows_are_solved_as_in_float64(clip):
    loss = PeRFlowLoss(Net(teacher), TEXT, NULL, {"unet": {}, "text_encoder": {}}, solver_steps=3, clip=clip)
    rows = batch(4)
    noise = np.float32(RNG.normal(size=rows.latents.shape))
    start, end = loss.solved(rows.latents, noise, jnp.arange(4), jnp.zeros((4, 3, 1)))
    for k in range(4):
        t_start, t_end = 1000 - 250 * k, 750 - 250 * k
        a = oracle.level(t_start)
        z = a**0.5 * np.float64(rows.latents[k]) + (1 - a) ** 0.5 * noise[k]
        np.testing.assert_allclose(start[k], z, atol=1e-6)
        np.testing.assert_allclose(end[k], oracle.solve(bent, z, t_start, t_end, 3, clip), atol=1e-4)


def test_students_target_is_the_schedules_noise():
    """A student that gives the target at a window's start is led by the schedule's step to where the teacher came."""
    schedule, seen = PeRFlowSchedule(), []

    def student(params, z, time, states):
        if len(z) == 16:
            seen.append((z, time))
            return jnp.zeros_like(z)
        return teacher(params, z, time, states)

    loss = PeRFlowLoss(Net(student), TEXT, NULL, {"unet": {}, "text_encoder": {}}, solver_steps=2)
    rows = batch(8)
    out = loss({"unet": {}}, rows, jax.random.key(1))
    ((z, times),) = seen
    start, inside, high, place = z[:8], z[8:], np.asarray(times[:8]), np.asarray(times[8:])
    assert set(high) <= {1000.0, 750.0, 500.0, 250.0}
    assert len(set(high)) > 1
    errors = []
    for k in range(8):
        end = oracle.solve(bent, np.float64(start[k]), high[k], high[k] - 250, 2)
        gamma = (oracle.level(high[k]) / oracle.level(high[k] - 250)) ** 0.5
        target = (np.float64(start[k]) - gamma * end) / (1 - gamma**2) ** 0.5
        stepped = schedule.step(jnp.float32(target), float(high[k]), float(high[k]) - 250, start[k])
        np.testing.assert_allclose(stepped, end, atol=1e-4)
        a = (place[k] - (high[k] - 250)) / 250
        np.testing.assert_allclose(inside[k], a * np.float64(start[k]) + (1 - a) * end, atol=1e-4)
        errors += [np.mean(target**2)] * 2  # of an answer of 0
    assert float(out.total) == pytest.approx(sum(errors), rel=1e-4)
    assert float(out.weight) == 16


def test_prompts_are_left_out():
    ids = jnp.full((2000, 3), 7, jnp.int32)
    made = np.asarray(left_out(ids, NULL, 0.1, jax.random.key(0)))
    empty = (made == np.array(NULL)).all(axis=1)
    assert 150 < empty.sum() < 250
    assert (made[~empty] == 7).all()


def test_average_of_parameters():
    tx = with_ema(optax.sgd(0.5), 0.3)
    params, state, seen = {"w": jnp.float32(2)}, None, []
    state = tx.init(params)
    for gradient in (1.0, -2.0, 0.5):
        updates, state = tx.update({"w": jnp.float32(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(params["w"]))
    assert float(state.average["w"]) == pytest.approx(oracle.moving_average(2.0, seen, 0.3), rel=1e-6)


def test_killed_run_repeats_itself(tmp_path):
    loss = NoiseLoss(noise_of(jnp.float32(PeRFlowSchedule().alphas_cumprod)), TEXT, NULL)
    data = batch(10)
    start = {"unet": {"off": jnp.float32(0.3)}, "text_encoder": {}}

    def run(folder, steps, rate=1e-2):
        optimizer = OptimizerConfig(learning_rate=rate)
        config = StageConfig(steps=steps, batch_size=4, optimizer=optimizer, checkpoint_every=2)
        batches = CaptionedBatches(data, batch_size=4, seed=0, weights=np.arange(10) / 45)
        return train_stage(start, loss, batches, config, tmp_path / folder)

    whole = run("whole", 5)
    with pytest.raises(ValueError, match="whole was trained with"):
        run("whole", 6, rate=2e-2)
    run("parts", 3)
    parts = run("parts", 5)
    assert float(whole["unet"]["off"]) == float(parts["unet"]["off"]) != pytest.approx(0.3)
    a, b = ([row["loss"] for row in jsonl.read(tmp_path / name / "metrics.jsonl")] for name in ("whole", "parts"))
    assert len(a) == 5
    assert a == b


def test_batches_follow_their_weights():
    data = Captioned(np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1), np.zeros((4, 3), np.int32))
    batches = CaptionedBatches(data, batch_size=400, seed=1, weights=np.array([0.5, 0.5, 0, 0]))
    first = next(batches).latents
    assert 150 < first.sum() < 250
    assert first.max() == 1
    position, second = batches.state(), next(batches).latents
    batches.restore(position)
    np.testing.assert_array_equal(next(batches).latents, second)
    with pytest.raises(ValueError, match="expected a position with seed = 2, got 1"):
        CaptionedBatches(data, batch_size=400, seed=2, weights=np.array([0.5, 0.5, 0, 0])).restore(position)


@pytest.mark.parametrize("weights", [np.ones(3) / 3, np.ones(4), np.array([2, -1, 0, 0])])
def test_refuses_odd_weights(weights):
    with pytest.raises(ValueError, match="weights: expected 4 probabilities"):
        CaptionedBatches(batch(4), batch_size=1, seed=0, weights=weights)


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("batch_size", 0), ("checkpoint_every", -1), ("ema", 1.0)])
def test_refuses_odd_stages(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a value"):
        StageConfig(**{name: value})
