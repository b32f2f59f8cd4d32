"""Preference optimisation of planners: the loss, its gradients, the run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.eaglet import DPOConfig, Plan, Planner, dpo_loss, sample_plans, train_dpo, train_sft
from jaxlab.eaglet.preferences import PreferenceBatches, preference_loss
from jaxlab.training import SFTConfig
from tests.eaglet import toys
from tests.eaglet.toys import BROKEN, TASK, EchoEnv, Says, equal, killed_at, plan
from tests.oracles import eaglet as oracle

EXPERT, NOVICE = Says("expert", "half"), Says("novice", "huh")
DPO = DPOConfig(steps=30, batch_size=4, optimizer=toys.adam(1e-3))
LONG = Plan.parse(plan(*["huh"] * 9).text.removesuffix("</plan>"))
PAIRS = [(TASK, plan("yes"), plan("huh")), (TASK, plan("yes"), LONG)]


@pytest.fixture(scope="module")
def start():
    return Planner(*toys.decoder(), toys.tokenizer(), max_tokens=16)


@pytest.fixture(scope="module")
def halfway(start):
    """It writes "yes" half of the time."""
    config = SFTConfig(steps=60, batch_size=8, optimizer=toys.adam(1e-2))
    return train_sft(start, [(TASK, plan("yes")), (TASK, plan("huh"))], config).planner


def test_the_loss_of_pairs():
    random = np.random.default_rng(0)
    policy, reference = random.normal(scale=30, size=(2, 3, 5, 2)).astype(np.float32)
    policy[0, :2] = [[4e3, -4e3], [-4e3, 4e3]]  # neither overflows nor loses its slope
    policy, reference = jnp.asarray(policy), jnp.asarray(reference)
    got = dpo_loss(policy, reference, beta=0.3)
    slopes = jax.grad(lambda x: jnp.sum(dpo_loss(x, reference, beta=0.3)))(policy)
    for at in np.ndindex(3, 5):
        loss, slope = oracle.preference(np.float64(policy[at]), np.float64(reference[at]), 0.3)
        np.testing.assert_allclose(got[at], loss, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(slopes[at], slope, rtol=1e-4, atol=1e-6)
    assert dpo_loss(jnp.ones(2), jnp.zeros(2), beta=0.1) == pytest.approx(np.log(2))


def plain_logps(model, params, rows):
    """Log-probabilities of rows' completions, by a plain forward pass."""
    tokens, counts = np.zeros((2, len(rows), 32), int)
    for line, counted, (prompt, completion) in zip(tokens, counts, rows):
        line[: len(prompt) + len(completion)] = [*prompt, *completion]
        counted[len(prompt) : len(prompt) + len(completion)] = 1
    said = jax.nn.log_softmax(model.apply({"params": params}, jnp.asarray(tokens)).logits)
    picked = jnp.take_along_axis(said[:, :-1], jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(picked * counts[:, 1:], axis=1)


@pytest.mark.latest
def test_a_batch_against_plain_passes():
    """Prompts and completions of different lengths; the reference has other parameters."""
    model, params = toys.decoder()
    reference, beta, random = jax.tree.map(lambda leaf: 0.9 * leaf, params), 0.5, np.random.default_rng(1)
    ids = [random.integers(0, model.config.vocab_size, count).tolist() for count in (3, 4, 9, 7, 12, 2, 1, 1, 1)]
    pairs = [((ids[k], ids[k + 1]), (ids[k], ids[k + 2])) for k in (0, 3, 6)]
    batches = PreferenceBatches(model, reference, pairs, batch_size=2, seed=0)
    with pytest.raises(ValueError, match="batches: expected a position with batch_size = 2"):
        batches.restore({**batches.state(), "batch_size": 3})
    batch = jax.tree.map(jnp.asarray, next(batches))
    chosen = [next(pair for pair in pairs if len(pair[0][0]) == start) for start in batch.starts.tolist()]
    rows = [row for pair in chosen for row in pair]
    policies, references = (
        np.float64(jax.jit(lambda tree: plain_logps(model, tree, rows))(tree)).reshape(2, 2)
        for tree in (params, reference)
    )
    found = [oracle.preference(*pair, beta) for pair in zip(policies, references)]
    slopes = jnp.array([slope for _, both in found for slope in both])

    loss = preference_loss(model, beta)
    total, grads = jax.jit(jax.value_and_grad(lambda tree: loss(tree, batch, None).total))(params)
    want = jax.jit(jax.grad(lambda tree: jnp.sum(slopes * plain_logps(model, tree, rows))))(params)
    np.testing.assert_allclose(total, sum(each for each, _ in found), rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), grads, want)


def test_the_better_plan_becomes_likelier(halfway, tmp_path):
    """Also than one that never ends, and is cut; a killed run goes on."""
    got = train_dpo(halfway, PAIRS, DPO)
    assert got.history[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert got.history[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert got.history[-1]["margin"] > 0.5
    assert got.history[-1]["preferred"] == 1
    assert got.history[-1]["better_logp"] > got.history[-1]["worse_logp"]
    drawn = got.planner.plan(TASK.instruction, rng=jax.random.key(0), n=8)
    assert {each.plan for each in drawn} == {"Step 1: yes"}

    early = dataclasses.replace(DPO, checkpoint_every=6)
    killed_at(14, lambda: train_dpo(halfway, PAIRS, early, folder=tmp_path))
    again = train_dpo(halfway, PAIRS, early, folder=tmp_path)
    assert again.history[0]["step"] == 13
    assert equal(again.planner.params, got.planner.params)


def test_from_plans_that_were_drawn(halfway):
    drawn = sample_plans(halfway, [TASK], env=EchoEnv(), executors=(EXPERT, NOVICE), n=8)
    ((_, better, worse),) = drawn.preferences()
    assert (better.plan, worse.plan) == ("Step 1: yes", "Step 1: huh")


def test_bad_inputs(start):
    for preferences, message in (
        ([], "preferences: expected at least one to train on"),
        ([(TASK, plan("yes"), plan("yes"))], r"preferences\[0\]: expected two different plans"),
        (
            [*PAIRS, (TASK, BROKEN, plan("yes"))],
            r"preferences\[2\]: expected a plan of the right format, got 'no_think'",
        ),
        ([(TASK, plan(*["yes"] * 9), BROKEN)], r"preferences\[0\]: expected at most max_tokens = 16"),
    ):
        with pytest.raises(ValueError, match=message):
            train_dpo(start, preferences, DPO)
    with pytest.raises(ValueError, match="preferences: expected prompt and completion of at most 96 tokens"):
        train_dpo(dataclasses.replace(start, max_tokens=999), [(TASK, plan(*["yes"] * 30), BROKEN)], DPO)
    with pytest.raises(ValueError, match="beta: expected a value > 0, got 0"):
        DPOConfig(beta=0)
    with pytest.raises(ValueError, match="batch_size: expected a value >= 1"):
        DPOConfig(batch_size=0)
