"""GRPO of a decoder: its step against a slow one, learning, resuming, exporting."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.models import load_pretrained, load_tokenizer
from jaxlab.models.decoder import Decoder
from jaxlab.rl import SFPOConfig
from jaxlab.rl.logps import text_logps
from jaxlab.rl.loop import PolicyTrainer
from jaxlab.rl.rollout import TextRollouts
from tests.oracles import adam
from tests.oracles import policy_objective as oracle
from tests.rl import toys
from tests.rl.test_loop import Stop, bitwise, numbers_of, stop_after

SFPO = SFPOConfig(window=4, threshold=-100.0)  # fires as soon as its window is full


@functools.cache
def naive_gradient():
    """Gradient of the clipped objective, a row's mean and then the rows', in float64 and with all logits stored."""
    model = Decoder(dataclasses.replace(toys.MODEL.config, dtype="float64", param_dtype="float64"))

    def row_loss(logs, tokens, start, mask, advantage, old):
        places = start + jnp.arange(len(mask))
        logp = logs[places - 1, tokens[places]]
        ratio = jnp.exp((logp - old) * mask)
        surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
        return -jnp.sum(surrogate * mask) / jnp.sum(mask)

    def loss(params, tokens, *rest):
        logs = jax.nn.log_softmax(model.apply({"params": params}, tokens).logits.astype(float))
        return jnp.mean(jax.vmap(row_loss)(logs, tokens, *rest))

    return jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": 0})  # it runs four times


@pytest.mark.parametrize("fast_passes", [0, 3])
def test_a_step_equals_a_slow_one(fast_passes):
    config = toys.config(steps=1, sfpo=SFPO if fast_passes else None)
    seen = []
    rollouts = TextRollouts(toys.MODEL, toys.TOKENIZER, [toys.low_characters], config, toys.DATA)

    def rollout(params, key, draw):
        seen.append(rollouts(params, key, draw))
        return seen[-1]

    logps = functools.partial(text_logps, toys.MODEL, length=6)
    got, [row] = PolicyTrainer(toys.params(), rollout, logps, config, tx=toys.adamw(learning_rate=1e-2)).train()
    [batch] = seen
    assert row["sampler_logp_gap"] < 1e-5
    assert (row["clip_fraction"] > 0) == (fast_passes > 0)

    advantages = oracle.advantages(batch.rewards, np.arange(16) // 4)
    old = np.asarray(logps(toys.params(), jax.tree.map(jnp.asarray, batch.inputs)).logp)
    given = (batch.inputs.tokens, batch.inputs.starts, batch.mask, advantages, old)
    leaves, form = jax.tree.flatten(toys.params())
    slow = leaves = [np.asarray(leaf, np.float64) for leaf in leaves]
    decays = [path[-1].key == "kernel" for path, _ in jax.tree.leaves_with_path(toys.params())]
    moments = [(np.zeros(leaf.shape), np.zeros(leaf.shape)) for leaf in leaves]
    for index in range(fast_passes + 1):
        if index == fast_passes:
            leaves = [start + 0.8 * (end - start) for start, end in zip(slow, leaves)]
        with jax.enable_x64(True):
            made = naive_gradient()(jax.tree.unflatten(form, leaves), *given)
        gradient = [np.asarray(leaf) for leaf in jax.tree.leaves(made)]
        assert gradient[0].dtype == np.float64
        norm = np.sqrt(sum(np.sum(leaf**2) for leaf in gradient))
        updated = [
            adam.step(p, m, v, g * min(1.0, 1.0 / norm), t=index + 1, lr=1e-2, eps=toys.EPS,
                      weight_decay=0.01 if decay else 0.0)
            for p, (m, v), g, decay in zip(leaves, moments, gradient, decays)
        ]  # fmt: skip
        leaves, moments = [one[0] for one in updated], [one[1:] for one in updated]
    for mine, wanted in zip(jax.tree.leaves(got), leaves):
        np.testing.assert_allclose(mine, wanted, atol=1e-5)


STEPS = 24


@pytest.fixture(scope="module")
def whole():
    """A run of slow-fast steps and then plain ones: its trainer, history, and state after step 8."""
    kept = {}

    def keep(trainer, row):
        if row["step"] == 8:
            kept.update(jax.tree.map(jnp.copy, {"state": trainer._state, "entropies": trainer._entropies}))

    run = toys.trainer(toys.config(steps=STEPS, sfpo=SFPO), callback=keep)
    return run.train().history, kept


def learned(history):
    return np.mean([row["reward"] for row in history[-4:]]) - history[0]["reward"]


@pytest.mark.latest
def test_slow_fast_steps_learn_and_compile_once(whole):
    history, _ = whole
    assert learned(history) > 0.25
    assert [row["sfpo_active"] for row in history] == [True] * 4 + [False] * (STEPS - 4)
    assert history[0]["compilations"] > 0
    assert [row["compilations"] for row in history[1:]] == [0] * (STEPS - 1)
    want = {"step", "loss", "reward", "entropy", "grad_norm", "zero_variance_fraction", "kl", "clip_fraction",
            "rollout_seconds", "update_seconds", "compilations", "sfpo_active"}  # fmt: skip
    assert all(want <= row.keys() for row in history)
    assert all(np.isfinite([*row.values()]).all() for row in history)


def test_plain_steps_learn():
    history = toys.trainer(toys.config(steps=STEPS)).train().history
    assert learned(history) > 0.15
    assert not any(row["sfpo_active"] for row in history)


def test_resumes_to_the_same_bits_and_exports_on_the_way(whole, tmp_path):
    history, kept = whole
    config = toys.config(steps=8, checkpoint_every=3, sfpo=SFPO)
    exported = {}

    def callback(trainer, row):
        if row["step"] == 7:
            exported["folder"] = trainer.export(tmp_path / "policy")
            exported["params"] = jax.tree.map(np.asarray, trainer.params)

    with pytest.raises(Stop):
        toys.trainer(config, folder=tmp_path / "run", callback=stop_after(5)).train()
    resumed = toys.trainer(config, folder=tmp_path / "run", callback=callback)
    rest = resumed.train().history
    assert numbers_of(rest) == numbers_of(history[3:8])
    bitwise({"state": resumed._state, "entropies": resumed._entropies}, kept)
    assert resumed._draw == 8

    model, params = load_pretrained(exported["folder"])
    assert model.config == dataclasses.replace(toys.MODEL.config, model_type=model.config.model_type)
    bitwise(params, exported["params"])
    assert load_tokenizer(exported["folder"]).decode(b"sixty") == "sixty"
