"""Runs: the warm start is shared, a killed run goes on to the same numbers, accuracy is what drawing would find."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.inference import SamplingParams, generate
from jaxlab.models import ByteTokenizer
from jaxlab.rl import GRPOConfig, SFPOConfig
from jaxlab.sfpo import accuracy, warm_start
from jaxlab.sfpo.methods import METHODS, settings
from jaxlab.sfpo.study import Study
from tests.sfpo import toys


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("reasoning_gym")
    return tmp_path_factory.mktemp("study")


def test_one_warm_start_for_all(folder, monkeypatch):
    config = toys.config()
    first = Study(config, folder).start
    assert (first.steps, first.params["embed"]["embedding"].shape) == (6, (258, 16))
    monkeypatch.setattr(warm_start, "_trained", None)
    again = Study(dataclasses.replace(config, seeds=(1, 2), methods=("dapo",)), folder).start
    assert again.identity == first.identity
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    with pytest.raises(TypeError, match="not callable"):
        Study(toys.config("warm.seed=1"), folder)


def test_the_warm_start_ends_when_it_is_good_enough(folder):
    study = Study(toys.config("warm.accuracy=0"), folder)
    assert study.start.steps == 3
    assert 0 <= study.start.accuracy < 0.5


@pytest.mark.latest
def test_goes_on_after_a_kill_to_the_same_numbers(folder, tmp_path, monkeypatch):
    config = toys.config()
    whole = Study(config, folder)
    curve = whole.run("sfpo", 0)
    assert curve.steps.tolist() == [0, 2, 4]
    assert curve.rollouts.tolist() == [0, 16, 32]
    assert (curve.fast_steps, len(curve.entropy)) == (4, 4)
    killed = Study(config, tmp_path)
    measure, calls = accuracy.measure, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(accuracy, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        killed.run("sfpo", 0)  # after the last checkpoint, before the last measurement
    monkeypatch.setattr(accuracy, "measure", measure)
    resumed = Study(config, tmp_path).run("sfpo", 0)
    for name in ("steps", "rollouts", "sampled", "greedy", "entropy"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(curve, name))


def test_methods_have_folders_of_their_own(folder):
    study = Study(toys.config(), folder)
    places = {study.place(method, seed) for method in METHODS for seed in (0, 1)}
    assert len(places) == 2 * len(METHODS)
    other = Study(toys.config("sfpo.inner_steps=2"), folder)
    same = {method for method in METHODS if study.place(method, 0) == other.place(method, 0)}
    assert same == {"grpo", "dr_grpo", "dapo", "rloo"}


def test_methods_change_what_they_say():
    base, sfpo = GRPOConfig(learning_rate=1e-3, mini_batch_size=16, loss_agg_mode="token-mean"), SFPOConfig(2, 0.5)
    made = {method: settings(method, base, sfpo)[0] for method in METHODS}
    assert made["grpo"] == made["lookahead"] == base
    assert made["sfpo"].sfpo == sfpo
    assert (made["more_passes"].num_iterations, made["no_correction"].num_iterations) == (3, 2)
    assert made["larger_rate"].learning_rate == pytest.approx(2e-3)
    assert (made["dr_grpo"].aggregation, made["dr_grpo"].advantage_kind) == ("seq-mean-token-sum-norm", "dr_grpo")
    assert (made["dapo"].epsilon_high, made["dapo"].aggregation) == (0.28, "token-mean")
    assert made["dapo"].dynamic_sampling > 1
    assert [method for method in METHODS if settings(method, base, sfpo)[1]] == ["lookahead", "no_correction"]
    assert METHODS["lookahead"].lookahead(base, sfpo) == 2 * 4
    with pytest.raises(ValueError, match="method: expected one of grpo, sfpo"):
        settings("luck", base, sfpo)


class Fixed:
    """A model that draws from one distribution, whatever it reads."""

    def __init__(self, **probabilities):
        self._logits = np.full(258, -1e3, np.float32)
        for text, probability in probabilities.items():
            self._logits[257 if text == "end" else ord(text[1:])] = np.log(probability)

    def apply(self, variables, tokens):
        return types.SimpleNamespace(logits=jnp.broadcast_to(self._logits, (*tokens.shape, 258)))


def test_accuracy_is_that_of_drawing():
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "10+1=", "answer": "11"}, {"prompt": "5=", "answer": ""}]
    found = accuracy.measure(Fixed(_1=0.5, _2=0.2, end=0.3), {}, accuracy.answers(rows, ByteTokenizer()))
    assert found.sampled == pytest.approx((0.2 * 0.3 + 0.5 * 0.5 * 0.3 + 0.3) / 3, rel=1e-5)
    assert found.greedy == 0.0
    assert accuracy.measure(
        Fixed(end=0.9, _1=0.1), {}, accuracy.answers(rows, ByteTokenizer())
    ).greedy == pytest.approx(1 / 3)


def test_greedy_accuracy_is_that_of_generate(folder):
    study = Study(toys.config(), folder)
    model, params = study.start.model, study.start.params
    sampling = SamplingParams(max_tokens=4, temperature=0.0)
    prompts = [row["prompt"] for row in study.train[:16]]
    out = generate(model, params, prompts, sampling, tokenizer=ByteTokenizer())
    ended = [
        (p, text) for p, text, why in zip(prompts, out.text, out.finish_reason) if why == "stop" and text.isascii()
    ]
    assert ended
    right = accuracy.answers([{"prompt": prompt, "answer": text} for prompt, text in ended], ByteTokenizer())
    wrong = accuracy.answers([{"prompt": prompt, "answer": text + "0"} for prompt, text in ended], ByteTokenizer())
    assert [accuracy.measure(model, params, given).greedy for given in (right, wrong)] == [1.0, 0.0]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("family=luck", "family"),
        ("methods=[]", "methods"),
        ("methods=[grpo, grpo]", "none twice"),
        ("methods=[luck]", "methods: expected one of grpo"),
        ("seeds=[]", "seeds"),
        ("shares=[1.5]", "shares"),
        ("eval_every=0", "eval_every"),
        ("eval_every=9", "at most rl.steps = 4"),
        ("held_out=0", "held_out"),
        ("rl.sfpo={}", "rl.sfpo"),
        ("rl.temperature=0.5", "rl.temperature"),
        ("warm.accuracy=2", "accuracy"),
        ("warm.batch_size=0", "batch_size"),
        ("warm.learning_rate=0", "learning_rate"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        toys.config(change)
