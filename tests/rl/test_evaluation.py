"""Evaluation of a policy: which prompts, which samples, what interval."""

import numpy as np
import pytest

from jaxlab import inference
from jaxlab.core import count_compilations, statistics
from jaxlab.rl import evaluate, evaluation
from tests.rl import toys


def run(**changes):
    arguments = {"data": toys.DATA, "reward_fns": [toys.low_characters], "max_tokens": 6, "batch_size": 4, "seed": 5}
    arguments |= changes
    data, reward_fns = arguments.pop("data"), arguments.pop("reward_fns")
    return evaluate(toys.MODEL, toys.params(), data, reward_fns, toys.TOKENIZER, **arguments)


@pytest.mark.latest
def test_rewards_and_interval(monkeypatch):
    """Six prompts in batches of four: the second is filled up, so that both are one program."""
    seen, batches = {}, []

    def generate(model, params, prompts, *args, prompt_length, **options):
        batches.append((len(prompts), prompt_length))
        return inference.generate(model, params, prompts, *args, prompt_length=prompt_length, **options)

    monkeypatch.setattr(evaluation, "generate", generate)

    def long(prompts, completions, *, bound):
        seen.update(prompts=prompts, completions=completions)
        return [float(len(completion) > 5) for completion in completions]

    result = run(reward_fns=[long])
    assert result.rewards.shape == (6, 4)
    assert batches == [(4, 12), (4, 12)]
    assert seen["prompts"] == [row["prompt"] for row in toys.DATA for _ in range(4)]
    assert [text for row in result.completions for text in row] == seen["completions"]
    assert len({*result.completions}) == 6
    np.testing.assert_array_equal(result.rewards, [[len(text) > 5 for text in row] for row in result.completions])
    assert 0 < result.pass_at_1.low < result.pass_at_1.mean < result.pass_at_1.high <= 1
    labels = np.repeat(np.arange(6), 4)
    clustered = statistics.bootstrap_ci(result.rewards.ravel(), clusters=labels)
    assert result.pass_at_1.mean == pytest.approx(clustered.mean)
    assert result.pass_at_1.low == pytest.approx(clustered.low, abs=1e-6)
    assert 0.5 < result.truncated_fraction <= 1

    with count_compilations() as compiled:
        again, other = run(reward_fns=[long]), run(reward_fns=[long], seed=6)
    assert compiled.count == 0
    assert again.completions == result.completions != other.completions


def test_one_prompt_has_no_interval():
    interval = evaluation._interval(np.array([[0, 1, 1, 1]], np.float32))
    assert interval.mean == 0.75
    assert np.isnan([interval.low, interval.high]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n: expected at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"top_p": 1.5}, r"top_p: expected in \(0, 1\], got 1.5"),
        ({"temperature": -1.0}, "temperature: expected finite and at least 0, got -1.0"),
        ({"reward_fns": []}, "reward_fns: expected at least one function, got none"),
        ({"data": []}, "data: expected at least one row, got none"),
        ({"max_tokens": 60}, r"data\[1\]: .* max_position_embeddings = 64, got 6 \+ 60 tokens"),
    ],
)
def test_arguments_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)
