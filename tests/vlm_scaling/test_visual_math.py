import re

import numpy as np
import pytest

from jaxlab.core.errors import MissingExtra
from jaxlab.vlm_scaling import aha, visual_math
from jaxlab.vlm_scaling.extract import extract
from jaxlab.vlm_scaling.small_model import tokenizer_of_words

PLACES = ("first", "second", "third", "fourth")


def expected(question):
    """The answer from the question's words and what is in the image, computed anew."""
    seen, words = question.meta["readings"], question.text.split()
    if question.meta["family"] == "digits":
        terms = re.findall(r"(plus|minus|is) the (\w+)", question.text)
        return sum((-1) ** (sign == "minus") * int(seen[PLACES.index(place)]) for sign, place in terms)
    if question.meta["family"] == "bars":
        high, low = (int(seen[PLACES.index(word)]) for word in words if word in PLACES)
        return high - low
    kind = {"circles": "circle", "squares": "square", "crosses": "cross"}[words[5]]
    return seen.count(kind)


@pytest.mark.parametrize("family", visual_math.FAMILIES)
def test_answers_follow_from_what_is_drawn(family):
    questions = visual_math.questions(family, 40, seed=3)
    assert len({question.id for question in questions}) == 40
    assert len({question.answer for question in questions}) > 3
    for question in questions:
        assert int(question.answer) == expected(question) >= 0
        assert question.images[0].shape == (visual_math.HEIGHT, visual_math.WIDTH, 3)
        assert extract(visual_math.solution(question)).value == question.answer


def test_bars_and_shapes_are_where_they_are_read():
    question = visual_math.questions("bars", 1, noise=0.0)[0]
    columns = (question.images[0][:-4, :, 0] > 0).sum(axis=0).reshape(4, 21).max(axis=1)
    assert [str(height // 5) for height in columns] == list(question.meta["readings"])
    question = visual_math.questions("shapes", 1, noise=0.0)[0]
    cells = question.images[0][..., 0].reshape(2, 28, 3, 28).any(axis=(1, 3)).ravel()
    assert [kind != "none" for kind in question.meta["readings"]] == cells.tolist()


def test_questions_are_the_same_again_and_noise_is_noise():
    first, again = (visual_math.questions("digits", 3, noise=0.2) for _ in range(2))
    clean = visual_math.questions("digits", 3, noise=0.0)
    for one, two, bare in zip(first, again, clean):
        np.testing.assert_array_equal(one.images[0], two.images[0])
        assert one.text == two.text == bare.text
        assert one.answer == bare.answer
        assert (one.images[0] != bare.images[0]).mean() > 0.3
    other = visual_math.questions("digits", 3, seed=1, noise=0.2)
    assert any((one.images[0] != two.images[0]).any() for one, two in zip(first, other))
    np.testing.assert_array_equal(visual_math.questions("digits", 1, noise=0.2)[0].images[0], first[0].images[0])


def test_splits_share_no_scan(monkeypatch):
    taken = []
    scans, labels = visual_math._scans()
    numbered = np.broadcast_to(np.arange(len(labels))[:, None, None] / 4000, scans.shape)
    monkeypatch.setattr(visual_math, "_scans", lambda: (numbered, labels))
    for split in visual_math.SPLITS:
        problems = [visual_math._digits(np.random.default_rng(seed), split) for seed in range(60)]
        taken.append({value for problem in problems for value in np.unique(problem.image)} - {0.0})
    assert len(taken[0]) > 50
    assert not taken[0] & taken[1]


def test_a_misreading_is_noticed_or_changes_the_answer():
    question = visual_math.questions("digits", 1)[0]
    place, value = visual_math.misreading(question, np.random.default_rng(0))
    assert value != question.meta["readings"][place]
    noticed = visual_math.solution(question, mistaken=(place, value))
    assert extract(noticed).value == question.answer
    assert [marker.kind for marker in aha.find(noticed)] == ["recheck"]
    assert extract(visual_math.solution(question, mistaken=(place, value), noticed=False)).value != question.answer
    assert not aha.find(visual_math.solution(question))


def test_the_words_are_all_known():
    tokenizer = tokenizer_of_words()
    unknown = tokenizer.backend.token_to_id("<unk>")
    for family in visual_math.FAMILIES:
        for question in visual_math.questions(family, 100):
            mistaken = visual_math.misreading(question, np.random.default_rng(1))
            said = visual_math.solution(question, mistaken=mistaken)
            ids = tokenizer.encode(question.text + said)
            assert unknown not in ids
            assert extract(tokenizer.decode(tokenizer.encode(said))).value == question.answer


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"family": "clocks"}, "family: expected one of digits, bars, shapes"),
        ({"split": "dev"}, "split: expected one of train, test"),
        ({"count": 0}, "count"),
        ({"noise": -0.1}, "noise"),
        ({"noise": float("nan")}, "noise"),
    ],
)
def test_bad_arguments(options, said):
    with pytest.raises(ValueError, match=said):
        visual_math.questions(**{"family": "bars", "count": 1, **options})


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    visual_math._scans.cache_clear()

    def absent(name):
        raise visual_math.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(visual_math.importlib.metadata, "distribution", absent)
    with pytest.raises(MissingExtra, match=r"jaxlab\[vlm\]"):
        visual_math.questions("digits", 1)
    assert visual_math.questions("bars", 1)
