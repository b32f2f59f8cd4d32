"""Plans written and read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.eaglet import Plan, format_plan, format_reward, parse_plan, plan_steps
from jaxlab.eaglet.plans import is_open, leave_open, offer, offered, owners, says, subgoals

words = st.text(st.characters(blacklist_characters="<>", blacklist_categories=("Cs", "Cc")), min_size=1).filter(
    str.strip
)


@pytest.mark.latest
def test_the_format():
    text = format_plan("First this.", ["go home", "sleep"])
    assert text == "<think> First this. </think><plan> Step 1: go home Step 2: sleep </plan>"
    parsed = parse_plan(text)
    assert (parsed.thinking, parsed.plan) == ("First this.", "Step 1: go home Step 2: sleep")
    assert (parsed.ok, parsed.reason) == (True, "")
    assert plan_steps(parsed.plan) == ["go home", "sleep"]
    assert Plan.parse(text) == Plan(text, parsed.thinking, parsed.plan, True, "")


@settings(max_examples=60, deadline=None)
@given(words, st.lists(words.filter(lambda text: "Step" not in text), min_size=1, max_size=5))
def test_reading_inverts_writing(thinking, steps):
    parsed = parse_plan(format_plan(thinking, steps))
    assert parsed.ok
    assert parsed.thinking == thinking.strip()
    assert plan_steps(parsed.plan) == [" ".join(step.split()) for step in steps]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no_think"),
        ("<plan> a </plan>", "no_think"),
        ("<think> a </think> Step 1: b", "no_plan"),
        ("<think> a <plan> b </plan>", "unclosed"),
        ("<think> a </think><plan> b", "unclosed"),
        ("<think> a </think><plan> b </plan><plan> c </plan>", "repeated"),
        ("<think> a <think> b </think></think><plan> c </plan>", "repeated"),
        ("<plan> b </plan><think> a </think>", "repeated"),
        ("So: <think> a </think><plan> b </plan>", "extra"),
        ("<think> a </think> then <plan> b </plan>", "extra"),
        ("<think> a </think><plan> b </plan> Good luck!", "extra"),
        ("<think> a </think><plan>  </plan>", "empty"),
    ],
)
def test_broken_formats(text, reason):
    parsed = parse_plan(text)
    assert (parsed.plan, parsed.ok, parsed.reason) == ("", False, reason)
    assert format_reward(text) == 0.0


def test_white_space_does_not_matter():
    assert format_reward("\n<think></think>\n\n<plan>b</plan>\n") == 1.0


class Letters:
    encode = staticmethod(lambda text: [ord(letter) for letter in text])
    decode = staticmethod(lambda ids: "".join(map(chr, ids)))


def test_long_plans_are_cut():
    text = "<think> t </think><plan> Step 1:  go home </plan>"
    parsed = parse_plan(text, max_plan_tokens=3)
    assert (parsed.plan, parsed.ok, parsed.reason) == ("Step 1:  go", False, "too_long")
    assert parse_plan(text, max_plan_tokens=4).ok
    assert Plan.parse(text, max_plan_tokens=8, tokenizer=Letters()).plan == "Step 1:"
    assert format_reward(text, max_plan_tokens=16, tokenizer=Letters()) == 1.0
    assert format_reward(text, max_plan_tokens=15, tokenizer=Letters()) == 0.0
    with pytest.raises(ValueError, match="max_plan_tokens: expected None or at least 1, got 0"):
        parse_plan(text, max_plan_tokens=0)


@pytest.mark.parametrize(
    ("thinking", "steps", "message"),
    [
        ("a", [], "steps: expected at least one"),
        ("a", ["b", " "], "steps: expected at least one, none empty"),
        ("a </think>", ["b"], "thinking: expected no <think>"),
        ("a", ["b", "<plan> c"], r"steps\[1\]: expected no <think>"),
    ],
)
def test_what_cannot_be_written(thinking, steps, message):
    with pytest.raises(ValueError, match=message):
        format_plan(thinking, steps)


def test_plans_of_any_form_have_steps():
    assert plan_steps("go home\n\n sleep ") == ["go home", "sleep"]
    assert plan_steps("") == []


def test_plans_are_offered():
    assert offered(f"A room.\n\n{offer('Step 1: leave')}") == "Step 1: leave"
    assert offer("") == offered("A room.") == ""


def test_gold_actions_as_steps():
    gold = ["open door to hall", "go to hall", "pick up cup 2", "wait", "go to kitchen", "wait", "focus on ice (cold)"]
    assert subgoals(gold) == ["pick up cup", "wait", "focus on ice"]
    assert owners(gold) == [0, 0, 0, 1, 1, 1, 2]
    assert subgoals(["take key", "go east"]) == ["take key", "go east"]
    assert subgoals([]) == []


def test_what_is_not_told_is_left_open():
    steps = ["connect battery to red wire", "connect battery to black wire", "focus on red lamp", "wait"]
    told = {"battery", "to", "wire", "on", "lamp"}
    opened = ["connect battery to something wire", "focus on something lamp", "wait"]
    assert leave_open(steps, lambda verb: told, ()) == opened
    fatal = leave_open(steps, lambda verb: told if verb == "connect" else (), ())
    assert fatal == [opened[0], "focus something", "wait"]
    assert leave_open(["take the old red cup"], lambda verb: ("cup",), ("red",)) == ["take something cup"]
    named = leave_open(["take the old red cup", "drop red red cup"], lambda verb: ("cup", "red"), ("red",))
    assert named == ["take something it cup", "drop it cup"]
    assert [is_open(step) for step in [*opened, *named]] == [True, True, False, True, False]
    assert not is_open("find somethings")


def test_open_steps_say_many_actions():
    assert says("take cup", "take cup")
    assert not says("take cup", "take cups")
    assert says("connect battery to something wire", "connect battery to long red wire")
    assert not says("connect battery to something wire", "connect battery to wire")
    assert not says("take something (big)", "take cup big")
    assert says("take it", "take red cup", "Bring the red cup.")
    assert not says("take it", "take blue cup", "Bring the red cup.")
    assert says("take it", "take blue cup")
    assert says("put it in something", "put cup in blue box", "Bring the cup.")
    assert not says("take", "take cup", "Bring the cup.")
