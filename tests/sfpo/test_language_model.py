"""Runs on pretrained models: what a config may name, and what it is refused for."""

import dataclasses

import pytest

from jaxlab import core
from jaxlab.models import ByteTokenizer
from jaxlab.rl import GRPOConfig, SFPOConfig, exact_match, math_reward
from jaxlab.sfpo import language_model
from jaxlab.sfpo.language_model import LanguageModelConfig, gsm8k, reward_function


def test_grade_school_problems_have_numbers_for_answers():
    rows = gsm8k("test", instruction="Answer.")
    assert len(rows) == 1319
    assert all(float(row["answer"]) == int(row["answer"]) for row in rows)
    (message,) = rows[0]["prompt"]
    assert message["role"] == "user"
    assert message["content"].endswith("\nAnswer.")
    with pytest.raises(ValueError, match="split: expected one of train, test, got 'dev'"):
        gsm8k("dev")


def test_rewards_by_name():
    assert reward_function("math") is math_reward
    assert reward_function("exact") is exact_match
    assert reward_function("jaxlab.rl.rewards:exact_match") is exact_match
    assert reward_function(r"format:\d\W*$")(["", ""], ["so 4.", "four"]) == [1.0, 0.0]
    for name, told in {
        "luck": "expected math, exact, format:REGEX or module:function, got 'luck'",
        "format:": "got 'format:'",
        "format:(": "regular expression",
        "jaxlab.rl:luck": "can be imported",
        "no_such_module:luck": "can be imported",
    }.items():
        with pytest.raises(ValueError, match=told):
            reward_function(name)


def test_long_prompts_are_left_out(tmp_path):
    path = tmp_path / "data.jsonl"
    for text in ("1+1=", "10+10="):
        core.jsonl.append(path, {"prompt": text, "answer": "2"})
    config = LanguageModelConfig(source="-", data=str(path), rl=GRPOConfig(max_prompt_length=5))
    with pytest.warns(UserWarning, match=r"1 of 2 prompts are longer than rl\.max_prompt_length = 5"):
        (row,) = language_model._data(config, ByteTokenizer())
    assert row["prompt"] == "1+1="
    whole = dataclasses.replace(config, rl=GRPOConfig(max_prompt_length=5, truncate_prompts=True))
    assert len(language_model._data(whole, ByteTokenizer())) == 2
    with pytest.raises(ValueError, match="data: expected 'gsm8k' or a file of JSON lines"):
        language_model._data(dataclasses.replace(config, data=str(tmp_path / "none")), ByteTokenizer())


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"rewards": ()}, "rewards: expected at least one"), ({"rl": GRPOConfig(sfpo=SFPOConfig())}, "rl.sfpo: expected")],
)
def test_configs_that_cannot_be(changes, told):
    with pytest.raises(ValueError, match=told):
        LanguageModelConfig(source="-", **changes)
