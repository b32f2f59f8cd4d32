import numpy as np
import pytest

from jaxlab.core import DataUnavailable
from jaxlab.instantedit import emoji as task
from jaxlab.instantedit.emoji import FAMILIES, TONES, Pair


@pytest.fixture(scope="module")
def emoji():
    try:
        task.find_font()
    except DataUnavailable as error:
        pytest.skip(str(error))
    return task.load()


def words_of(captions):
    return {word for caption in captions for word in caption.split()}


def test_pictures(emoji):
    assert len(set(emoji.captions)) == len(emoji.captions) == len(emoji.images) > 3500
    assert emoji.images.shape[1:] == (32, 32, 3)
    assert (emoji.images.reshape(len(emoji.images), -1).min(axis=1) < 250).all()
    heart, face = emoji.image("red heart"), emoji.image("man cook dark skin tone")
    assert heart[0, 0].min() == 255  # on white
    assert heart[14, 16, 0] > 180 > 90 > heart[14, 16, 1:].max()
    assert face.std() > 30
    with pytest.raises(KeyError):
        emoji.image("a heart of stone")


def test_held_out_pairs_are_edits(emoji):
    pairs = emoji.held_out
    assert len(set(pairs)) == len(pairs) >= 200
    for pair in pairs:
        assert pair.word in pair.target.split()
        assert (emoji.image(pair.source) != emoji.image(pair.target)).any()
        if pair.family == "tone":
            assert pair.target == pair.source.replace("light skin tone", "dark skin tone")
        if pair.family == "gender":
            assert pair.target.split() == ["woman", *pair.source.split()[1:]]
        if pair.family == "colour":
            assert len(set(pair.source.split()) - set(pair.target.split())) == 1
    assert {pair.family for pair in pairs} == set(FAMILIES)


def test_nothing_like_a_target_is_trained_on(emoji):
    trained = [emoji.captions[index] for index in emoji.train]
    people = {task.concept(pair.source) for pair in emoji.held_out if pair.family != "colour"}
    for caption in trained:
        if task.concept(caption) in people:
            assert "skin tone" not in caption
            assert not set(caption.split()) & {"man", "woman", "men", "women"}
    assert not {pair.target for pair in emoji.held_out} & set(trained)
    train = emoji.images[list(emoji.train)].reshape(len(trained), -1).astype(np.float32) / 255
    for target in {pair.target for pair in emoji.held_out}:
        difference = train - emoji.image(target).reshape(-1).astype(np.float32) / 255
        assert np.square(difference).mean(axis=1).min() > 1e-3
    # What an edit is about is known: tones, genders, and every held-out colour with another shape.
    known = words_of(trained)
    assert {*TONES, "man", "woman"} <= known
    assert {pair.word for pair in emoji.held_out} <= known
    assert words_of(pair.source for pair in emoji.held_out if pair.family == "colour") <= known


def test_split_is_decided_by_its_seed(emoji):
    again = task.load.__wrapped__()
    assert again.held_out == emoji.held_out
    assert again.train == emoji.train
    assert task.load(seed=1).held_out != emoji.held_out


def test_weights_give_each_kind_its_share(emoji):
    weights = emoji.weights({"people": 0.6, "colour": 0.1, "rest": 0.3})
    assert weights.shape == (len(emoji.train),)
    assert weights.sum() == pytest.approx(1)
    hearts = [
        number
        for number, index in enumerate(emoji.train)
        if emoji.captions[index].endswith((" heart", " circle", " square"))
    ]
    coloured = [number for number in hearts if emoji.captions[emoji.train[number]].split()[0] in task.COLOURS]
    assert weights[coloured].sum() == pytest.approx(0.1, rel=0.2)


def test_balanced():
    pairs = [
        Pair(family, f"a {n}", f"b {n}", "b")
        for family, count in (("tone", 9), ("gender", 2), ("colour", 9))
        for n in range(count)
    ]
    taken = task.balanced(pairs, 9)
    assert len(set(taken)) == 9
    assert sorted(sum(pair.family == family for pair in taken) for family in FAMILIES) == [2, 3, 4]
    assert taken == task.balanced(pairs, 9) != task.balanced(pairs, 9, seed=1)
    with pytest.raises(ValueError, match="count: expected at most the 20 pairs there are, got 21"):
        task.balanced(pairs, 21)


@pytest.mark.latest
def test_sheet_comes_with_the_package(tmp_path):
    pairs, sources, targets = task.packaged_pairs()
    assert len(set(pairs)) == len(pairs) == 64
    assert sources.shape == targets.shape == (64, 32, 32, 3)
    assert sources.dtype == np.uint8
    assert (sources != targets).any(axis=(1, 2, 3)).all()
    copied = -10 * np.log10(np.square((sources - targets.astype(float)) / 255).mean(axis=(1, 2, 3)))
    assert 10 < copied.mean() < 20


def test_sheet_is_of_held_out_pairs(emoji):
    pairs, sources, _ = task.packaged_pairs()
    assert set(pairs) <= set(emoji.held_out)
    close = [np.abs(source - emoji.image(pair.source).astype(float)).mean() for pair, source in zip(pairs, sources)]
    assert np.median(close) < 8  # another edition of the font may draw a little differently


def test_sheet_is_read_as_it_is_written(emoji, tmp_path, monkeypatch):
    path, pairs = tmp_path / "sheet.png", emoji.held_out[:5]
    task.save_sheet(emoji, pairs, path, columns=2)
    monkeypatch.setattr(task, "SHEET", path)
    again, sources, targets = task.packaged_pairs()
    assert again == pairs
    for pair, source, target in zip(pairs, sources, targets):
        np.testing.assert_array_equal(source, emoji.image(pair.source))
        np.testing.assert_array_equal(target, emoji.image(pair.target))


def test_concepts():
    assert task.concept("woman cook medium-light skin tone") == task.concept("cook") == "cook"
    assert task.concept("man running facing right dark skin tone") == "running"
    assert task.concept("mermaid") == task.concept("merman light skin tone") == "merperson"


def test_font_that_is_not_there(monkeypatch, tmp_path):
    with pytest.raises(DataUnavailable, match="there is no"):
        task.find_font(tmp_path / "font.ttf")
    monkeypatch.setattr(task, "_PLACES", (str(tmp_path),))
    monkeypatch.setattr(task.shutil, "which", lambda name: None)
    with pytest.raises(DataUnavailable, match="package fonts-noto-color-emoji"):
        task.find_font()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "NotoColorEmoji.ttf").touch()
    assert task.find_font().parent.name == "deep"
