"""What a verifier is shown and how its word is read; its metrics against counting."""

import base64
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.vlm_scaling import images, verify
from jaxlab.vlm_scaling.samples import Question, Sample
from tests.timing import within

RED, BLUE = (np.full((4, 6, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 0, 200)))
QUESTIONS = [
    Question("q1", "<image>\nWhat is it?", "7", (RED,)),
    Question("q2", "<image>\nAnd {shown}?", "8", (BLUE,)),
    Question("q3", "<image>\nAnd this?", "8", (RED,)),
]
SAMPLES = [Sample("I see. \\boxed{7}"), Sample("No idea")]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Yes", True),
        ("no, it is right there", False),
        ("**Yes**, because", True),
        ("The answer is correct.", True),
        ("The solution is not correct", False),
        ("Correct answer is 5, so the solution is wrong.", False),
        ("Verdict: Yes", True),
        ("Verdict:\n\n**Incorrect**", False),
        ("Is it correct? Yes.", True),
        ("Step 1 is correct. Step 2 is wrong", False),
        ("<think>yes</think> No", False),
        ("<answer>yes</answer> no", True),
        ("\\boxed{No}", False),
        ("<think>yes", None),
        ("There is no error.", None),
        ("The triangle is right angled", None),
        ("Yesterday", None),
        ("maybe", None),
        ("", None),
    ],
)
def test_verdicts_are_read(text, verdict):
    assert verify.parse_verdict(text) is verdict


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_any_text_has_a_verdict_or_none(text):
    assert verify.parse_verdict(text) in (True, False, None)
    assert verify.parse_score(text) in (None, *range(1, 11))


@pytest.mark.parametrize("piece", ["yes ", "is ", ": ", "not ", "\n", "*", "10/", "is not ", "9."])
def test_hostile_verdicts_take_linear_time(piece):
    with within(1.0):
        verify.parse_verdict(piece * 50_000 + "x")
        verify.parse_score(piece * 50_000 + "x")


def test_grades_are_read():
    grades = {"8": 8, "Score: 10/10.": 10, "9.": 9, "0": None, "7.5": None, "11": None, "3, no, 4": 4}
    assert {text: verify.parse_score(text) for text in grades} == grades


@pytest.mark.latest
def test_yes_probability():
    logits = np.random.default_rng(0).normal(size=(3, 2, 9)) * 5
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = p[..., [1, 4]].sum(-1) / (p[..., [1, 4]].sum(-1) + p[..., [2]].sum(-1))
    np.testing.assert_allclose(verify.yes_probability(logits, [1, 4], [2]), want, rtol=1e-12)
    got = jax.jit(lambda x: verify.yes_probability(x, (1, 4), (2,)))(jnp.asarray(logits, jnp.bfloat16))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=0.05)
    assert verify.yes_probability([0.0, -math.inf, 1000.0], [0], [1]) == pytest.approx(1)
    assert verify.yes_probability(np.array([0.0, 0.0, 1000.0]), [0], [2]) == pytest.approx(0, abs=1e-30)
    messages = {"yes_ids: .* none": ([], [1]), "no_ids": ([1], []), "below 9": ([9], [1]), r"\[1\]": ([1], [1])}
    for message, ids in messages.items():
        with pytest.raises(ValueError, match=message):
            verify.yes_probability(logits, *ids)


def test_inputs():
    for mode, shown in verify.MODES.items():
        controls = verify.Controls(QUESTIONS, {q.id: [Sample(f"of {q.id}")] for q in QUESTIONS}, seed=1)
        request, other = verify.build(QUESTIONS[0], SAMPLES, mode=mode, controls=controls)
        assert request.mode == mode
        assert "What is it?" in request.text
        assert ("I see" in request.text) == (not shown.answer_only and not shown.shuffled)
        if shown.answer_only:
            assert "Proposed answer: 7\n" in request.text
            assert "Proposed answer: (none)\n" in other.text
        if shown.shuffled:
            assert "of q2" in request.text  # q3 shares its image
        if shown.image == "none":
            assert request.images == ()
            verify.check_blind(request.text)
        else:
            assert request.text.startswith("<image>")
            means = {"own": RED.mean(), "wrong": BLUE.mean(), "grey": 128, "zero": 0}
            assert request.images[0].shape == RED.shape
            assert request.images[0].mean() == means[shown.image]
            assert np.ptp(request.images[0]) == (0 if shown.image in ("grey", "zero") else 200)
    assert "{shown}" in verify.build(QUESTIONS[1], SAMPLES)[0].text  # a question is not a template
    assert "from 1 to 10" in verify.build(QUESTIONS[0], SAMPLES, score=True)[0].text
    assert "Yes or No" not in verify.build(QUESTIONS[0], SAMPLES, score=True)[0].text
    again = verify.Controls(QUESTIONS[::-1], seed=1)
    assert again.images(QUESTIONS[1])[0] is controls.images(QUESTIONS[1])[0]


def test_bad_inputs():
    with pytest.raises(ValueError, match=r"mode: expected one of image\+solution"):
        verify.build(QUESTIONS[0], SAMPLES, mode="deaf")
    with pytest.raises(ValueError, match=r"controls: expected them for mode 'wrong\+solution'"):
        verify.build(QUESTIONS[0], SAMPLES, mode="wrong+solution")
    with pytest.raises(ValueError, match="another one with different images for 'q1'"):
        verify.Controls([QUESTIONS[0]])
    with pytest.raises(ValueError, match="candidates: expected samples of 'q2'"):
        verify.Controls(QUESTIONS, seed=1).candidates(QUESTIONS[0], 1)
    for prompt, tokens in (("<image> a", ()), ([5, 9], [9])):
        with pytest.raises(ValueError, match="no image tokens in a blind mode"):
            verify.check_blind(prompt, tokens)
    with pytest.raises(ValueError, match="right: expected one for each of 2"):
        verify.metrics([True, False], [True])
    with pytest.raises(ValueError, match="at least one verdict"):
        verify.metrics([], [])
    with pytest.raises(ValueError, match="equally long"):
        verify.agreement([True], [])


class Recorder:
    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def texts(self, requests, *, seed):
        self.asked.append((len(requests), seed))
        return [self.answers[seed % len(self.answers)] for _ in requests]

    def yes_probabilities(self, requests, *, seed):
        self.asked.append((len(requests), seed))
        return [0.25 if "\\boxed" in request.text else math.nan for request in requests]


def test_kinds_of_verifiers():
    def ask(kind, answers=("Yes",), **options):
        reader = Recorder(answers)
        return verify.Verifier(reader, kind=kind, **options).verify(QUESTIONS[0], SAMPLES, seed=2), reader.asked

    assert ask("binary_prob") == ([0.25, None], [(2, 2)])
    assert ask("binary_text") == ([True, True], [(2, 2)])
    assert ask("score_text", ["7/10"])[0] == [0.7, 0.7]
    got, asked = ask("k_vote", ["Yes", "No", "hm", "No"], k=4)
    assert got == [1 / 3, 1 / 3]
    assert len({seed for _, seed in asked}) == 4
    assert ask("k_vote", ["hm"])[0] == [None, None]
    with pytest.raises(ValueError, match="reader: expected one with `texts` for kind 'k_vote'"):
        verify.Verifier(type("Mute", (), {"yes_probabilities": lambda self, requests, *, seed: []})(), kind="k_vote")


@pytest.mark.parametrize(("options", "message"), [({"kind": "x"}, "kind: expected one"), ({"k": 0}, "k: expected at")])
def test_bad_options_of_verifiers(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        verify.Verifier(Recorder([]), **options)


def test_equal_requests_are_asked_once():
    reader = Recorder(["Yes"])
    verifier = verify.Verifier(reader, kind="binary_text")
    samples = [Sample("a \\boxed{7}"), Sample("b \\boxed{7}"), Sample("c \\boxed{8}")]
    for mode, asked in (("image+answer", 2), ("image+solution", 3), ("blind+answer", 2)):
        assert verifier.verify(QUESTIONS[0], samples, mode=mode, seed=0) == [True] * 3
        assert reader.asked[-1] == (asked, 0)
    verifier.verify(QUESTIONS[0], samples[::-1], mode="image+solution", seed=0)
    assert len(reader.asked) == 3
    verifier.verify(QUESTIONS[0], samples, mode="image+answer", seed=1)
    assert len(reader.asked) == 4


def test_metrics():
    scores = [0.9, True, 0.4, None, 0.4, False, 0.8]
    right = [True, False, True, True, False, False, True]
    got = verify.metrics(scores, right)
    values = [-1 if score is None else float(score) for score in scores]
    pairs = [(a > b) + (a == b) / 2 for a, t in zip(values, right) if t for b, f in zip(values, right) if not f]
    assert got.auroc == pytest.approx(sum(pairs) / len(pairs))
    assert (got.count, got.unread) == (7, 1)
    assert got.accept_rate == pytest.approx(3 / 7)
    assert got.accuracy == pytest.approx(4 / 7)
    assert got.false_accept == pytest.approx(1 / 3)
    assert got.false_reject == pytest.approx(2 / 4)
    assert got.balanced_accuracy == pytest.approx((1 / 2 + 2 / 3) / 2)
    gaps = [abs(0.9 + 1.0 - 1), abs(0.4 + 0.4 - 1), abs(0.0), abs(0.8 - 1)]
    assert got.calibration_error == pytest.approx(sum(gaps) / 6)
    assert verify.agreement(scores, [0.6, None, 0.2, False, 0.9, 0.1, 0.1]) == pytest.approx(4 / 7)
    one = verify.metrics([None], [True])
    assert math.isnan(one.auroc)
    assert math.isnan(one.balanced_accuracy)
    assert math.isnan(one.calibration_error)


def test_images():
    image = pytest.importorskip("PIL.Image", reason="the extra 'images' is not installed")
    array = np.random.default_rng(0).integers(0, 256, (5, 3, 3), np.uint8)
    file = base64.b64decode(images.data_url(array).removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(image.open(io.BytesIO(file))), array)
    np.testing.assert_array_equal(images.pixels(file), array)
    assert images.label((array,)) == images.label((array.copy(),)) != images.label((array[::-1],))
    assert images.label(()) == ""
    assert images.data_url(b"\xff\xd8\xffrest").startswith("data:image/jpeg;base64,")
    with pytest.raises(ValueError, match="expected a PNG, JPEG"):
        images.data_url(b"text")
    with pytest.raises(ValueError, match=r"expected uint8 of shape \[H, W, 3\]"):
        images.pixels(np.zeros((2, 2)))
