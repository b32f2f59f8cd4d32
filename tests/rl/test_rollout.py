"""Rollouts of text: which prompts, what a batch holds, and reward functions that misbehave."""

import collections
import functools
import time

import jax
import numpy as np
import pytest

from jaxlab.rl import guarded, math_reward
from jaxlab.rl.prompts import PromptSet
from jaxlab.rl.rollout import TextRollouts
from tests.rl import toys
from tests.rl.reward_functions import misbehaves

KEY = jax.random.key(0)


def rollouts(reward_fns=(toys.low_characters,), data=toys.DATA, tokenizer=toys.TOKENIZER, weights=None, **changes):
    return TextRollouts(toys.MODEL, tokenizer, reward_fns, toys.config(**changes), data, reward_weights=weights)


def drawn(rollout, draw=0):
    return rollout(toys.params(), jax.random.fold_in(KEY, draw), draw)


def test_every_prompt_once_an_epoch_in_an_order_of_the_seed():
    rollout = rollouts(seed=1)
    rows = [row for draw in range(6) for row in rollout.chosen(draw)]
    epochs = [rows[start : start + 6] for start in range(0, 24, 6)]
    assert all(sorted(epoch) == [*range(6)] for epoch in epochs)
    assert len({*map(tuple, epochs)}) > 1
    assert rollout.chosen(3) == rollouts(seed=1).chosen(3)
    assert [rollouts(seed=2).chosen(draw) for draw in range(6)] != [rollout.chosen(draw) for draw in range(6)]
    few = rollouts(data=toys.DATA[:3], prompts_per_step=8)
    assert {*collections.Counter(few.chosen(0)).values()} == {2, 3}


@pytest.mark.latest
def test_a_batch():
    seen = {}

    def keep(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, columns=columns)
        return [float(row) for row in range(len(prompts))]

    def none_of_the_first(prompts, completions):
        return [None] * 8 + [1.0] * 8

    rollout = rollouts([keep, none_of_the_first], weights=[1.0, 10.0])
    batch = drawn(rollout)
    rows = [row for row in rollout.chosen(0) for _ in range(4)]
    assert seen["prompts"] == [toys.DATA[row]["prompt"] for row in rows]
    assert seen["columns"] == {"bound": [64] * 16}
    np.testing.assert_array_equal(batch.rewards, [row + 10 * (row >= 8) for row in range(16)])
    assert batch.metrics["reward/keep"] == 7.5
    assert batch.metrics["reward/none_of_the_first"] == 1.0
    assert batch.metrics["sampling_seconds"] > 0
    assert batch.inputs.tokens.shape == (16, len("four of them") + 6)
    for row, prompt in enumerate(seen["prompts"]):
        start, length = batch.inputs.starts[row], int(batch.mask[row].sum())
        assert start == len(prompt)
        assert (batch.mask[row] == (np.arange(6) < length)).all()
        tokens = batch.inputs.tokens[row]
        assert toys.TOKENIZER.decode(tokens[:start]) == prompt
        assert toys.TOKENIZER.decode(tokens[start : start + length]) == seen["completions"][row]
        assert (tokens[start + length :] == 0).all()
        assert batch.truncated[row] == (tokens[start + length - 1] != toys.TOKENIZER.eos_token_id)
    again = drawn(rollouts([keep, none_of_the_first], weights=[1.0, 10.0]))
    np.testing.assert_array_equal(again.inputs.tokens, batch.inputs.tokens)
    assert (drawn(rollout, 1).inputs.tokens != batch.inputs.tokens).any()


def says(wish, prompts, completions):
    """What `misbehaves` does of its own accord, whatever the policy said."""
    return misbehaves(prompts, [wish] * len(completions))


def scored(reward_fn, wishes):
    """Rewards of a set of prompts whose completions are the wishes."""
    prompts = PromptSet("data", toys.DATA, toys.MODEL, toys.TOKENIZER, max_tokens=6)
    return prompts.rewards([reward_fn], np.ones(1), [*range(len(wishes))], wishes)[0]


def test_reward_functions_that_hang_or_crash_do_not_stop_a_batch():
    started = time.monotonic()
    with pytest.warns(RuntimeWarning, match="misbehaves: 2 rows failed and get -1.0"):
        got = scored(guarded(misbehaves, timeout_s=2.0, on_failure=-1.0), ["0.5", "hang", "die", "1"])
    np.testing.assert_array_equal(got, [0.5, -1, -1, 1])
    assert time.monotonic() - started < 40


@pytest.mark.parametrize(
    ("wish", "error", "message"),
    [
        ("nan", ValueError, "misbehaves: expected a finite number or None for each row, got nan in row 0"),
        ("inf", ValueError, "misbehaves: .* got inf in row 0"),
        ("no number", ValueError, "misbehaves: .* got 'good' in row 0"),
        ("wrong number", ValueError, "misbehaves: expected 3 rewards, one a row, got 2"),
        ("not a list", ValueError, "misbehaves: expected a list of 3 rewards"),
        ("none", ValueError, "row 0: no reward, for every reward function returned None"),
        ("raise", RuntimeError, "reward function misbehaves raised KeyError"),
    ],
)
def test_garbage_is_an_error_that_names_the_function(unchecked, wish, error, message):
    with pytest.raises(error, match=message):
        scored(misbehaves, [wish] * 3)


def test_garbage_stops_the_step(unchecked):
    for wish, error in (("nan", ValueError), ("raise", RuntimeError)):
        with pytest.raises(error, match="says"):
            toys.trainer(toys.config(), reward_fns=[functools.partial(says, wish)]).train()


class Chat:
    """A tokenizer with a template that writes its own beginning."""

    eos_token_id = 257

    def encode(self, text, *, add_special_tokens=True):
        return [256] * add_special_tokens + [*text.encode()]

    def decode(self, ids):
        return toys.TOKENIZER.decode(ids)

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert not tokenize
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<a>"


def test_chat_messages_go_through_the_template():
    data = [{"prompt": [{"role": "u", "content": "hi"}]}, {"prompt": "hi"}]
    prompts = PromptSet("data", data, toys.MODEL, Chat(), max_tokens=6)
    assert prompts.ids[0] == [*b"<u>hi<a>"]
    assert prompts.ids[1] == [256, *b"hi"]
    with pytest.raises(ValueError, match=r"train_data\[0\]: expected a text, since ByteTokenizer has no chat template"):
        rollouts(data=data)


def test_long_prompts_are_cut_at_their_beginning_when_that_is_wished():
    assert rollouts(max_prompt_length=4, truncate_prompts=True)._prompts.ids[3] == [*b"them"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward_fns": []}, "reward_fns: expected at least one function, got none"),
        ({"weights": [1.0, 2.0]}, "weights: expected a finite number for each of 1 functions"),
        ({"data": []}, "train_data: expected at least one row, got none"),
        ({"data": [{"answer": "1"}]}, r"train_data\[0\]: expected a mapping with 'prompt'"),
        ({"data": [{"prompt": "a"}, {"prompt": "b", "answer": "1"}]}, r"train_data\[1\]: expected the columns"),
        ({"data": [{"prompt": "a", "completions": "b"}]}, r"train_data\[0\]: .* got 'completions'"),
        ({"data": [{"prompt": 3}]}, r"train_data\[0\]: expected a prompt that is a text or a list of chat messages"),
        ({"data": [{"prompt": ""}]}, r"train_data\[0\]: expected a prompt of at least one token, got ''"),
        ({"max_prompt_length": 4}, r"train_data\[1\]: .* max_prompt_length = 4 tokens, got 6; truncate_prompts=True"),
        ({"max_completion_length": 60}, r"train_data\[1\]: .* max_position_embeddings = 64, got 6 \+ 60 tokens"),
    ],
)
def test_data_that_cannot_work(unchecked, arguments, message):
    with pytest.raises(ValueError, match=message):
        rollouts(**arguments)


def test_ids_that_the_model_does_not_know():
    class Strange(Chat):
        def encode(self, text, **_):
            return [258]

    with pytest.raises(ValueError, match=r"train_data\[0\]: expected ids in \[0, 258\), got 258 to 258"):
        rollouts(tokenizer=Strange())


def test_a_column_that_a_reward_function_lacks():
    with pytest.raises(ValueError, match="math_reward: needs the column 'answer'; the data have bound"):
        drawn(rollouts([math_reward]))
