"""Training on questions with images: losses and log-probabilities against whole passes, batches, rollouts."""

import jax
import numpy as np
import pytest

from jaxlab.core import named_key
from jaxlab.rl import GRPOConfig
from jaxlab.training import SFTConfig, TrainingRun
from jaxlab.vlm_scaling.local import Prompts
from jaxlab.vlm_scaling.samples import Question
from jaxlab.vlm_scaling.training import (
    Course,
    Lesson,
    VisualBatches,
    VisualLoss,
    VisualRollouts,
    exact_answer,
    visual_logps,
)
from tests.vlm_scaling import toys


@pytest.fixture(scope="module")
def trained():
    return toys.untrained()


def lessons(trained, count, *, seen=True, said="read circle ."):
    made = []
    for index, question in enumerate(toys.questions(count)):
        request = Prompts(trained.model, trained.tokenizer).question(question)
        ids = request.input_ids.tolist() if seen else trained.tokenizer.encode(question.text)
        completion = trained.tokenizer.encode(said + " read" * index)
        made.append(Lesson(ids, completion, question.images[0] if seen else None))
    return made


@pytest.fixture(scope="module")
def batches(trained):
    courses = [Course(lessons(trained, 3), 2), Course(lessons(trained, 2, seen=False, said="Yes"), 1, 8.0)]
    return courses, lambda **options: VisualBatches(courses, Prompts(trained.model, trained.tokenizer), **options)


def test_the_loss_is_the_cross_entropy_of_a_whole_pass(trained, batches):
    made = batches[1](seed=0)
    batch = next(made)
    assert batch.tokens.shape[0] == 3
    assert batch.pixel_values.shape[:2] == (2, 24)
    assert batch.weights[2].max() == 8
    out = VisualLoss(trained.model, made.grid)(trained.params, batch, None)
    total, hits = 0.0, 0.0
    for row in range(3):
        pixels = {"pixel_values": batch.pixel_values[row], "image_grid_thw": np.array([made.grid])} if row < 2 else {}
        logits, _ = trained.model.apply({"params": trained.params}, batch.tokens[row][None], **pixels)
        logits = np.asarray(logits[0], np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        logps = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        places = np.arange(len(logits))
        total -= (logps[places, batch.targets[row]] * batch.weights[row]).sum()
        hits += ((logits.argmax(axis=1) == batch.targets[row]) * batch.weights[row]).sum()
    assert float(out.total) == pytest.approx(total, rel=1e-5)
    assert float(out.metrics["accuracy"]) == hits
    assert float(out.weight) == batch.weights.sum()


def test_every_parameter_takes_a_gradient(trained, batches):
    made = batches[1](seed=0)
    batch, loss = next(made), VisualLoss(trained.model, made.grid)
    gradients = jax.jit(jax.grad(lambda params: loss(params, batch, None).total))(trained.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0 or "'k'" in jax.tree_util.keystr(path), path  # a bias on all keys cancels


def test_batches_go_on_where_they_were(batches):
    first, second = batches[1](seed=3), batches[1](seed=3)
    next(first), next(first)
    second.restore(first.state())
    for one, two in zip(jax.tree.leaves(next(first)), jax.tree.leaves(next(second))):
        np.testing.assert_array_equal(one, two)
    with pytest.raises(ValueError, match="seed = 4"):
        batches[1](seed=4).restore(first.state())


def test_a_killed_run_goes_on_to_the_same_bits(trained, batches, tmp_path):
    config = SFTConfig(steps=4, batch_size=3, checkpoint_every=2)
    loss = VisualLoss(trained.model, batches[1](seed=0).grid)

    def run(folder):
        return TrainingRun(trained.params, loss, batches[1](seed=0), config, folder=tmp_path / folder)

    whole = run("whole").until(4)
    run("killed").until(2)
    for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(run("killed").until(4)), strict=True):
        np.testing.assert_array_equal(one, two)


def test_each_lesson_comes_once_before_any_twice(trained):
    made = VisualBatches([Course(lessons(trained, 4), 2)], Prompts(trained.model, trained.tokenizer), seed=0)
    lengths = [int(row.astype(bool).sum()) for _ in range(2) for row in next(made).weights]
    assert sorted(lengths) == [3, 4, 5, 6]


def test_bad_courses(trained):
    prompts = Prompts(trained.model, trained.tokenizer)
    seen, blind = lessons(trained, 1), lessons(trained, 1, seen=False)
    small = Lesson([1], [2], np.zeros((28, 28, 3), np.uint8))
    for courses, said in (
        ([], "at least one"),
        ([Course([], 1)], "at least one lesson"),
        ([Course(blind, 1), Course(seen, 1)], "images first"),
        ([Course(blind, 1)], "images first"),
        ([Course(seen + blind, 1)], "got both in one"),
        ([Course([*seen, small], 1)], "one size"),
    ):
        with pytest.raises(ValueError, match=said):
            VisualBatches(courses, prompts, seed=0)
    with pytest.raises(ValueError, match="at most 8 tokens"):
        VisualBatches([Course(seen, 1)], prompts, seed=0, room=8)


CONFIG = GRPOConfig(num_generations=4, prompts_per_step=2, max_completion_length=8, max_prompt_length=32)


def test_rollouts_score_samples_whose_log_probabilities_the_trainer_agrees_with(trained):
    questions = toys.questions(3)

    def reward(text, question):
        return float(len(text)) + len(question.id)

    rollouts = VisualRollouts(trained.model, trained.tokenizer, questions, CONFIG, reward=reward)
    key = named_key(jax.random.key(0), "rollout")
    rollout = rollouts(trained.params, key, 0)
    assert rollout.mask.shape == (8, 8)
    assert rollout.inputs.pixel_values.shape[:2] == (8, 24)
    assert len(set(rollout.rewards.tolist())) > 1
    out = visual_logps(trained.model, trained.params, rollout.inputs, grid=rollouts.grid, length=8)
    np.testing.assert_allclose(out.logp * rollout.mask, rollout.logps * rollout.mask, atol=3e-5)
    again = rollouts(trained.params, key, 0)
    np.testing.assert_array_equal(rollout.inputs.text.tokens, again.inputs.text.tokens)
    assert (rollouts(trained.params, key, 1).inputs.text.tokens != rollout.inputs.text.tokens).any()


def test_the_exact_answer():
    question = Question("", "", "7")
    assert exact_answer("<think> 3 + 4 </think> <answer> 7 </answer>", question) == 1
    assert exact_answer("<answer> 8 </answer>", question) == 0
    assert exact_answer("nothing", question) == 0


def test_bad_questions_for_rollouts(trained):
    blind = Question("blind", "How many?", "1")
    for questions, said in (([], "at least one"), ([blind], "expected one image each, got 0 in 'blind'")):
        with pytest.raises(ValueError, match=said):
            VisualRollouts(trained.model, trained.tokenizer, questions, CONFIG)
    short = GRPOConfig(max_prompt_length=4)
    with pytest.raises(ValueError, match="at most 4 tokens"):
        VisualRollouts(trained.model, trained.tokenizer, toys.questions(1), short)
