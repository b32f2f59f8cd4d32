import functools
import inspect
import json
import pickle
import time

import numpy as np
import pytest

from jaxlab.core import DataUnavailable, data_path
from jaxlab.rl import answers, combine_rewards, exact_match, format_reward, guarded, math_reward, reasoning_gym_reward
from tests.rl import reward_functions


@pytest.fixture(scope="module")
def gsm8k():
    try:
        lines = data_path("math/gsm8k_test.jsonl", download=False).read_text().splitlines()
    except DataUnavailable as error:
        pytest.skip(str(error))
    return [json.loads(line) for line in lines]


@pytest.mark.latest
def test_gsm8k_against_itself(gsm8k):
    solutions = [row["answer"] for row in gsm8k]
    started = time.monotonic()
    assert math_reward([row["question"] for row in gsm8k], solutions, answer=solutions) == [1.0] * 1319
    assert time.monotonic() - started < 5
    boxed = [rf"Hence \boxed{{{answers.extract(solution)}.00}}." for solution in solutions]
    assert math_reward(boxed, boxed, answer=solutions) == [1.0] * 1319
    wrong = [rf"\boxed{{{answers.extract(solution)}1}}" for solution in solutions]
    assert math_reward(wrong, wrong, answer=solutions) == [0.0] * 1319


def test_gsm8k_through_the_verifier(gsm8k):
    rows = gsm8k[:24]
    numbers = [answers.extract(row["answer"]).replace(",", "") for row in rows]
    completions = [rf"so it is $\frac{{{2 * int(number)}}}{{2}}$" for number in numbers]
    rewards = math_reward(numbers, completions, answer=[row["answer"] for row in rows])
    assert rewards == [1.0] * 24
    assert math_reward(numbers, completions, answer=numbers[1:] + numbers[:1]).count(1.0) <= 2  # neighbours may agree


def test_math_reward_rows():
    completions = [r"\boxed{1} no, \boxed{\frac{3}{2}}", "#### 4\nbye", "I do not know", "7", r"\boxed{9^{9^{9^9}}}"]
    answer = ["1.5", 4, "5", None, r"\boxed{6}"]
    with pytest.warns(RuntimeWarning, match=r"math_reward: 1 of 4 answers could not be compared .* time limit of 1 s"):
        assert math_reward([""] * 5, completions, answer=answer, timeout_s=1) == [1.0, 1.0, 0.0, None, 0.0]
    assert math_reward([], [], answer=[]) == []


def test_exact_match_and_format():
    assert exact_match(["", ""], [" 42\n", "43"], answer=["42 ", "42"]) == [1.0, 0.0]
    tagged = format_reward(r"<think>.*</think>")
    assert tagged(["", ""], ["<think>x</think> 3", "3"]) == [1.0, 0.0]
    assert pickle.loads(pickle.dumps(tagged))([""], ["<think></think>"]) == [1.0]
    with pytest.raises(ValueError, match="pattern: expected a regular expression, got '\\('"):
        format_reward("(")


def test_reasoning_gym():
    gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (extra `rl`)")
    entries = [
        gym.create_dataset(name, size=2, seed=1)[1] for name in ("chain_sum", "products", "countdown", "game_of_life")
    ]
    right = [entry["answer"] for entry in entries]
    score = functools.partial(reasoning_gym_reward, [""] * 4, entry=entries)
    assert score(completions=right) == [1.0] * 4
    assert score(completions=[f"hm <answer>1</answer> no: <answer> {text} </answer> ." for text in right]) == [1.0] * 4
    assert score(completions=[rf"\boxed{{{text}}}" for text in right[:3]] + ["x"]) == [1.0, 1.0, 1.0, 0.0]
    partial = score(completions=[f"It is {text} I think" for text in right])
    assert all(0 < reward < 1 for reward in partial[:3])
    assert score(completions=["so 1"] * 4)[2] == 0.01
    assert score(completions=["so 1"] * 4, threshold=1.0) == [0.0] * 4
    assert score(completions=right, threshold=1.0) == [1.0] * 4
    combined = combine_rewards([functools.partial(reasoning_gym_reward, threshold=1.0)], right, right, entry=entries)
    assert combined.tolist() == [1.0] * 4
    bad = {**entries[0], "metadata": {"source_dataset": "chain_some"}}
    with pytest.raises(ValueError, match=r"reasoning_gym_reward: entry: .* got 'chain_some' in row 0"):
        reasoning_gym_reward([""], ["1"], entry=[bad])


def test_a_scorer_that_hangs(monkeypatch):
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (extra `rl`)")
    monkeypatch.setattr("jaxlab.rl.rewards._Scorer", reward_functions.HangsWhenTold)
    entry = {"answer": "1", "metadata": {"source_dataset": "chain_sum"}}
    with pytest.warns(RuntimeWarning, match=r"reasoning_gym_reward: 2 rows failed and get 0\.0; row 0: time limit"):
        rewards = reasoning_gym_reward([""] * 3, ["123", "321", "1"], entry=[entry] * 3, timeout_s=1)
    assert rewards == [0.0, 0.0, 1.0]


def longest(prompts, completions):
    return [len(completion) for completion in completions]


def where_asked(prompts, completions, asked, bonus=None, unknown=3):
    assert unknown == 3
    return [1.0 if ask else None for ask in asked]


def test_combine_rewards():
    seen = {}

    def everything(prompts, completions, **columns):
        seen.update(columns)
        return np.array([0.5, 0.25], np.float32)

    columns = {"asked": [True, False], "answer": ["ab", "c"]}
    total = combine_rewards(
        [longest, where_asked, everything, exact_match], ["p", "q"], ["ab", "cde"], weights=[1, 10, 2, -1], **columns
    )
    assert total.dtype == np.float32
    assert total.tolist() == [2 + 10 + 1 - 1, 3 + 0.5]
    assert seen == columns
    assert combine_rewards([longest], ["p"], ["ab"]).tolist() == [2.0]
    assert combine_rewards([longest], [], []).shape == (0,)


def test_a_function_that_raises_is_named():
    with pytest.raises(RuntimeError, match=r"reward function misbehaves raised KeyError\('no such thing'\)") as caught:
        combine_rewards([longest, reward_functions.misbehaves], ["p"], ["raise"])
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ([1.0], "bad: expected 2 rewards, one a row, got 1"),
        ([1.0, float("nan")], "bad: expected a finite number or None for each row, got nan in row 1"),
        ([float("-inf"), 1.0], "bad: .* got -inf in row 0"),
        ([1e39, 1.0], r"bad: .* got 1e\+39 in row 0"),  # infinite in float32
        (["1", 1.0], "bad: .* got '1' in row 0"),
        ([[1, 2], 1.0], r"bad: .* got \[1, 2\] in row 0"),
        (None, "bad: expected a list of 2 rewards, got None"),
        (1.0, "bad: expected a list of 2 rewards, got 1.0"),
        ([1.0, None], r"row 1: no reward, for every reward function returned None \(bad\)"),
    ],
)
def test_garbage_is_refused(rewards, words):
    def bad(prompts, completions):
        return rewards

    with pytest.raises(ValueError, match=words):
        combine_rewards([bad], ["p", "q"], ["a", "b"])
    with pytest.raises(ValueError, match=words):
        combine_rewards([functools.partial(bad)], ["p", "q"], ["a", "b"])


def test_guarded_survives_what_hangs_and_dies():
    completions = ["1", "hang", "2", "die", "none", "wish"]
    columns = {"wish": [9.0] * 5 + [3.0]}
    warning = "misbehaves: 2 rows failed and get {}; row 1: time limit of 1 s exceeded"
    call = functools.partial(guarded, reward_functions.misbehaves, timeout_s=1)
    with pytest.warns(RuntimeWarning, match=warning.format("no reward")):
        assert call()([""] * 6, completions, **columns) == [1.0, None, 2.0, None, None, 3.0]
    with pytest.warns(RuntimeWarning, match=warning.format("-1.0")):
        total = combine_rewards(
            [longest, call(on_failure=-1.0)], [""] * 6, completions, weights=[0, 1], other=[0] * 6, **columns
        )
    assert total.tolist() == [1.0, -1.0, 2.0, -1.0, 0.0, 3.0]
    with pytest.raises(RuntimeError, match="misbehaves: row 1: the worker died: killed by SIGKILL"):
        call(on_failure="raise")(["", ""], ["1", "die"])


def test_guarded_raises_as_the_function_would():
    safe = pickle.loads(pickle.dumps(guarded(reward_functions.misbehaves, timeout_s=20)))
    with pytest.raises(RuntimeError, match="reward function misbehaves raised KeyError") as caught:
        combine_rewards([safe], ["", ""], ["1", "raise"])
    assert isinstance(caught.value.__cause__, KeyError)
    assert "In row 1, in a worker process" in caught.value.__cause__.__notes__[0]
    assert "reward_functions.py" in caught.value.__cause__.__notes__[0]
    with pytest.raises(RuntimeError, match="Unpicklable"):
        safe([""], ["raise what does not pickle"])
    for completion, words in {
        "nan": "misbehaves: expected a finite number or None for each row, got nan in row 1",
        "no number": "misbehaves: .* got 'good' in row 1",
        "wrong number": "misbehaves: expected 1 rewards, one a row, got 2",
        "not a list": "misbehaves: expected a list of 1 rewards, got 1.0",
    }.items():
        with pytest.raises(ValueError, match=words):
            combine_rewards([safe], ["", ""], ["1", completion])
    with pytest.raises(ValueError, match="exact_match: needs the column 'answer'; the data have wish"):
        combine_rewards([guarded(exact_match)], [""], ["1"], wish=["x"])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: combine_rewards([], ["p"], ["c"]), ValueError, "reward_fns: expected at least one"),
        (lambda: combine_rewards([longest], ["p"], ["c", "d"]), ValueError, "prompts: .* each of 2 rows, got 1"),
        (lambda: combine_rewards([longest], ["p"], ["c"], x=[1, 2]), ValueError, "x: .* each of 1 rows, got 2"),
        (
            lambda: combine_rewards([longest], ["p"], ["c"], x="a"),
            ValueError,
            "x: expected a list with one entry",
        ),
        (lambda: combine_rewards([longest], ["p"], ["c"], weights=[1, 2]), ValueError, "weights: expected a finite"),
        (lambda: combine_rewards([longest], ["p"], ["c"], weights=[np.inf]), ValueError, "weights: expected a finite"),
        (lambda: combine_rewards([exact_match], ["p"], ["c"], a=[1]), ValueError, "exact_match: .*'answer'; .* have a"),
        (lambda: math_reward(["p"], ["c"], answer=["1", "2"]), ValueError, "math_reward: answer: .* got 2"),
        (lambda: math_reward(["p"], ["c"], answer=["#### "]), ValueError, "math_reward: answer: .* in row 0"),
        (lambda: math_reward(["p"], ["c"], answer=["1"], timeout_s=0), ValueError, "timeout_s: .* got 0"),
        (lambda: exact_match(["p"], ["c"], answer=[]), ValueError, "exact_match: answer: .* got 0"),
        (lambda: guarded(longest, timeout_s=-1), ValueError, "timeout_s: .* got -1"),
        (lambda: guarded(longest, on_failure=np.nan), ValueError, "on_failure: expected None, .* got nan"),
        (lambda: guarded(lambda prompts, completions: []), TypeError, "reward_fn: expected a function that pickles"),
    ],
)
def test_bad_inputs(unchecked, call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_contract():
    keyword = inspect.Parameter.KEYWORD_ONLY
    for function, names in {
        math_reward: ["prompts", "completions", "answer", "timeout_s"],
        exact_match: ["prompts", "completions", "answer"],
        combine_rewards: ["reward_fns", "prompts", "completions", "weights", "columns"],
        format_reward: ["pattern"],
    }.items():
        parameters = inspect.signature(function).parameters
        assert list(parameters) == names
        assert all(parameters[name].kind is keyword for name in ("answer", "timeout_s", "weights") if name in names)
    assert inspect.signature(math_reward).parameters["timeout_s"].default == 5.0
