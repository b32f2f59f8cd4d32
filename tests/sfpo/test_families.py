"""The problems: right answers, no overlap, and the reward that a right answer gets."""

import dataclasses
import math

import pytest

from jaxlab.rl import exact_match
from jaxlab.sfpo.families import FAMILIES, problems


def right(family, prompt):
    """The answer, by other means than reasoning-gym's."""
    if family == "chain_sum":
        return str(eval(prompt.rstrip("=")))
    if family == "gcd":
        return str(math.gcd(*map(int, prompt.rstrip("=").split("&"))))
    if family == "spell_backward":
        return "".join(reversed(prompt.rstrip("~")))
    numbers = sorted(map(int, prompt[:-1].split(",")), reverse=prompt.endswith(">"))
    return ",".join(map(str, numbers))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_right_and_prompts_unique(family):
    pytest.importorskip("reasoning_gym")
    train, test = problems(family, 200, 50)
    prompts = [row["prompt"] for row in (*train, *test)]
    assert (len(train), len(test), len(set(prompts))) == (200, 50, 250)
    answers = [right(family, prompt) for prompt in prompts]
    assert [row["answer"] for row in (*train, *test)] == answers
    assert exact_match(prompts, answers, answer=[row["answer"] for row in (*train, *test)]) == [1.0] * 250
    assert problems(family, 100, 50) == (train[:100], test)  # the held-out ones stay the same


def test_families_that_cannot_be(monkeypatch):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=r"expected one of chain_sum, .*, got 'luck'"):
        problems("luck", 1, 1)
    few = dataclasses.replace(FAMILIES["gcd"], options={"min_numbers": 2, "max_numbers": 2, "max_value": 3})
    monkeypatch.setitem(FAMILIES, "gcd", few)
    with pytest.raises(ValueError, match=r"gcd: expected 20 different problems, found [4-9] in 1080 draws"):
        problems("gcd", 20, 1)
