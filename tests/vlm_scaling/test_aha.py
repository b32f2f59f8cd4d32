"""Markers, what becomes of answers at them, and their effect under samplers that are known."""

import random

import numpy as np
import pytest

from jaxlab.vlm_scaling import aha
from jaxlab.vlm_scaling.samples import Question, Sample
from tests.timing import within

Q = Question("q", "What?", "7")


def kinds(text, **options):
    return [(marker.kind, text[slice(*marker.span)], marker.token_index) for marker in aha.find(text, **options)]


@pytest.mark.latest
def test_markers_are_found_in_the_thinking_alone():
    text = "<think>It is 5. Wait, that's wrong. Let me double-check: 7.</think> Wait, \\boxed{7}"
    assert kinds(text) == [
        ("recheck", "Wait", 3),
        ("backtracking", "that's wrong", 4),
        ("recheck", "Let me double-check", 6),
    ]
    assert kinds("Wait, 5</think> wait 7") == [("recheck", "Wait", 0)]
    assert kinds("5 <think>wait") == [("recheck", "wait", 1)]
    assert [text for _, text, _ in kinds("<think>wait</think> wait <think>hold on</think>")] == ["wait", "hold on"]
    assert kinds("Alternatively 5. So <answer>7</answer> wait") == [("alternative", "Alternatively", 0)]
    assert kinds("Wait. Nothing is found") == [("recheck", "Wait", 0)]
    assert kinds("I see 5 of them. Wait, so (B)") == [("recheck", "Wait", 5)]
    assert kinds("The answer is 5. Wait, no. The answer is 7. Hmm") == [("recheck", "Wait", 4)]
    assert kinds("The waiter awaits.") == []
    assert kinds("", patterns={}) == []


def test_own_markers():
    text = "I doubt it, wait."
    assert kinds(text, patterns={"doubt": "doubt"}) == [("doubt", "doubt", 1)]
    assert [kind for kind, *_ in kinds(text, patterns={**aha.PATTERNS, "doubt": "doubt"})] == ["doubt", "recheck"]
    for pattern in ("(", "x*"):
        with pytest.raises(ValueError, match=r"patterns: expected .* for 'bad'"):
            aha.find(text, patterns={"bad": pattern})


@pytest.mark.parametrize("piece", ["wait ", "<think>", "</think>", "let me ", "i will ", "a", "\n", "that's ", "1 "])
def test_hostile_texts_take_linear_time(piece, unchecked):
    with within(2.0):
        aha.find(piece * 30_000)


def test_outcomes():
    pairs = [("5", "7"), ("7", "5"), ("5", "6"), ("7.0", "7"), ("5", "5.0"), (None, None), (None, "5"), (None, "7")]
    got = [aha.outcome(before, after, "7") for before, after in pairs]
    assert got[:3] == ["wrong->right", "right->wrong", "wrong->wrong'"]
    assert got[3:] == ["unchanged", "unchanged", "unchanged", "wrong->wrong'", "wrong->right"]
    assert aha.outcome_table(got) == {"wrong->right": 2, "right->wrong": 1, "wrong->wrong'": 2, "unchanged": 3}


class Scripted:
    """Goes on with texts by a function of the prefix."""

    def __init__(self, follow):
        self.follow, self.asked = follow, []

    def extend(self, question, prefixes, *, seed, max_tokens=None, stop=""):
        self.asked += prefixes
        return [Sample(self.follow(prefix, seed)) for prefix in prefixes]


def test_answers_before_a_marker():
    samples = [
        Sample("<think>So 5. Wait, no: 7</think> 7"),
        Sample("<think>So 7</think> 7"),
        Sample("So 7. Wait, no: \\boxed{6}"),
    ]
    sampler = Scripted(lambda prefix, seed: "5." if "So 5" in prefix else "")
    first, second = aha.early_answers(Q, samples, sampler, seed=3)
    assert sampler.asked == ["<think>So 5.\n</think>\nThe answer is ", "So 7.\nThe answer is "]
    assert (first.sample, first.before, first.after, first.outcome) == (0, "5", "7", "wrong->right")
    assert (second.sample, second.before, second.after, second.outcome) == (2, None, "6", "wrong->wrong'")
    assert second.marker.kind == "recheck"
    assert aha.early_answers(Q, samples[1:2], sampler) == []


def test_contrast_is_not_fooled_by_hard_questions():
    """Markers do nothing, but hard questions have more of them."""
    rng = np.random.default_rng(0)
    ids, marked, right = [], [], []
    for question in range(300):
        easy = question % 2
        for _ in range(8):
            ids.append(str(question))
            marked.append(bool(rng.random() < (0.2 if easy else 0.8)))
            right.append(bool(rng.random() < (0.9 if easy else 0.3)))
    got = aha.contrast(ids, marked, right, n_resamples=500)
    assert got.difference < -0.25
    assert got.within.low < 0 < got.within.high
    design = np.column_stack([np.array(marked, float), np.eye(300)[[int(each) for each in ids]]])
    slope = np.linalg.lstsq(design, np.array(right, float), rcond=None)[0][0]
    assert got.within.mean == pytest.approx(slope)
    assert got.rate == pytest.approx(np.mean(marked))
    alone = aha.contrast(["a", "b"], [True, False], [True, False])
    assert (alone.within, alone.questions, alone.difference) == (None, 0, 1.0)
    for lists in (([], [], []), (["a"], [True], [])):
        with pytest.raises(ValueError, match="equally long lists"):
            aha.contrast(*lists)


def test_insertion_finds_a_known_effect():
    """The text makes wrong answers right half of the time, and leaves right ones."""

    def follow(prefix, seed):
        number = int(prefix.split()[2])
        right = number % 2 == 0 or ("Wait" in prefix and random.Random(f"{number} {seed}").random() < 0.5)
        return f"so </think> {7 if right else number}"

    texts = [f"<think>I see {number} there, good words</think> 9" for number in range(10, 70)]
    pairs = [(Question(f"q{place}", "?", "7"), Sample(text)) for place, text in enumerate(texts)]
    sampler = Scripted(follow)
    got = aha.insert(pairs, sampler, depth=0.6, seed=1)
    assert sampler.asked[0] == "<think>I see 10 there, Wait, let me check again. "
    assert sampler.asked[1] == "<think>I see 10 there, "
    assert sum(got.plain) == 30
    assert got.difference.low > 0.1
    assert got.difference.mean == pytest.approx(0.25, abs=0.15)
    assert got.p_value < 1e-3
    assert got.outcomes["right->wrong"] == 0
    assert got.outcomes["wrong->right"] == sum(got.inserted) - 30
    assert aha.insert(pairs[:1], sampler).difference is None
    for arguments, message in ((([], sampler), "pairs"), ((pairs, sampler), "depth")):
        with pytest.raises(ValueError, match=message):
            aha.insert(*arguments, depth=2)
