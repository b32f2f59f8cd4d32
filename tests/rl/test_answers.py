import random
import threading
import time

import pytest

from jaxlab.core import errors
from jaxlab.rl import answers
from tests.rl.reward_functions import HangsWhenTold
from tests.timing import within


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed {x^{2}} is left", "x^{2}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\\{b}}", r"a\\{b}"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{12} or rather \boxed{3", "12"),  # cut off at the length limit
        (r"} \boxed{3} {", "3"),
        (r"\boxed{}", ""),
        ("boxed{3} and {4}", ""),
        (r"\\boxed{3}", ""),  # a line break and a word
        ("", ""),
    ],
)
def test_boxed(text, content):
    assert answers.boxed(text) == content
    span = answers.find_boxed(text)
    assert (span is not None) == (r"\boxed{}" in text or content != "")
    assert span is None or text[slice(*span)].strip() == content


def test_boxes_left_open_take_linear_time():
    with within(1.0):
        assert answers.boxed(r"\boxed{" * 50_000 + "1") == ""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48 / 2 = 24\n#### 72", "72"),
        ("#### 1\n#### 2 \nLet me check: 48 + 24 = 72", "2"),
        ("####\n 5", "5"),
        (r"#### 3 \boxed{4}", "4"),
        (" 12 + 7 = 19 ", "12 + 7 = 19"),
        ("####", ""),
    ],
)
def test_extract(text, answer):
    assert answers.extract(text) == answer


@pytest.mark.latest
def test_pairs():
    equal = [
        (r"\frac{1}{2}", "0.5"),
        ("50%", "0.5"),
        ("1,234", "1234"),
        ("$1{,}234$", "1234"),
        ("-5", "−5"),
        (r"\$12.", "12.00"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        ("sqrt(2)", r"\sqrt{2}"),
        ("x^2+2x+1", "(x+1)^2"),
        ("x = 5", "5"),
        ("3 and 4", r"\{4,3\}"),
        (r"5\text{ cm}", "5"),
        ("10 dollars", "10"),
        ("12 + 7 = 19 so 12", "12"),
        ("The answer is $\\frac{6}{8}$.", r"\dfrac{3}{4}"),
        (r"\text{Evelyn}", "Evelyn"),
        ("A", "A"),
        ("0.3333333", "0.3333334"),
    ]
    different = [
        ("(2,1)", "(1,2)"),
        ("0.333", "1/3"),
        (r"2\sqrt{3}", "2"),  # math-verify reads it as 2 where it is not told that it is a formula
        ("act", "cat"),  # nor are words products of letters
        ("B", "A"),
        ("12", "13"),
        ("1.001", "1"),
        ("", ""),
        ("{", "3"),
        (r"\frac{}{}", "3"),
        ("no answer", "3"),
        ("1" * 5000, "3"),
    ]
    verdicts = answers.compare(*zip(*equal, *different))
    assert [verdict.equal for verdict in verdicts] == [True] * len(equal) + [False] * len(different)
    assert {verdict.error for verdict in verdicts} == {None}


def test_hostile_answers_cost_themselves_alone():
    started = time.monotonic()
    with pytest.warns(RuntimeWarning, match="equal: 1 of 1 answers could not be compared .*: time limit of 1 s"):
        assert not answers.equal(r"9^{9^{9^9}}", "3", timeout_s=1)
    verdicts = answers.compare([r"9^{9^{9}}", r"\frac12", "100000000!", "3"], ["3", "0.5", "7", "3"], timeout_s=2)
    assert [verdict.equal for verdict in verdicts] == [False, True, False, True]
    assert [bool(verdict.error) for verdict in verdicts] == [True, False, True, False]
    assert "time limit of 2 s" in verdicts[0].error
    assert time.monotonic() - started < 30


def test_a_verifier_that_dies_raises_or_returns_garbage(monkeypatch):
    monkeypatch.setattr(answers, "_Verifier", HangsWhenTold)
    verdicts = answers.compare(["x+123", "x+321", "x+213", "$garbage$", "y"], ["z"] * 5, timeout_s=1)
    assert [verdict.equal for verdict in verdicts] == [False, False, False, False, True]
    assert "time limit" in verdicts[0].error
    assert verdicts[1].error == "the worker died: exit code 7"
    assert verdicts[2].error == "ZeroDivisionError: in the verifier"


def test_what_is_plain_needs_no_process(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a process was asked")

    monkeypatch.setattr(answers.tasks, "map", forbidden)
    verdicts = answers.compare(["12", "$1,200", "7", "cat", ""], ["12.0", "1200", "8", "dog", "3"])
    assert [verdict.equal for verdict in verdicts] == [True, True, False, False, False]


def test_plain_numbers_agree_with_math_verify():
    math_verify = pytest.importorskip("math_verify", reason="math-verify is not installed (extra `rl`)")
    generator = random.Random(0)
    numbers = ["0", "-0.0", "1,000", "1000", ".5", "0.50", "-3", "3.0000001", "3.000002", "12345678901234567890"]
    numbers += [f"{generator.uniform(-2, 2):.{generator.randint(0, 8)}f}" for _ in range(20)]
    pairs = [(a, b) for a in numbers for b in (generator.choice(numbers), generator.choice(numbers), f"${a}$")]
    theirs = [math_verify.verify(math_verify.parse(b), math_verify.parse(a)) for a, b in pairs]
    assert [verdict.equal for verdict in answers.compare(*zip(*pairs))] == theirs
    assert 0 < sum(theirs) < len(pairs)


def test_any_thread_may_ask():
    results = []
    thread = threading.Thread(target=lambda: results.append(answers.equal(r"\frac{2}{4}", "1/2")))
    thread.start()
    thread.join()
    assert results == [True]


def test_bad_inputs(unchecked, monkeypatch):
    with pytest.raises(ValueError, match="golds: expected one for each of 2 predictions, got 1"):
        answers.compare(["1", "2"], ["1"])
    with pytest.raises(ValueError, match="timeout_s: expected more than 0 seconds, got 0"):
        answers.equal("1", "1", timeout_s=0)

    def absent(module, extra):
        return errors.require(f"no_{module}", extra)

    monkeypatch.setattr(answers, "require", absent)
    with pytest.raises(errors.MissingExtra, match=r"pip install 'jaxlab\[rl\]'"):
        answers.equal("1", "1")
