import itertools
import json

import numpy as np
import pytest

from jaxlab.models import ByteTokenizer
from jaxlab.training import TextBatches, text_batches
from jaxlab.training.text import documents, split_documents


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for index in range(40):
        path = root / f"part{index % 3}" / f"{index:02}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"document {index} says {'x' * (7 * index % 31)} and ends.\n")
    (root / "picture.bin").write_bytes(b"\0\1\2")
    (root / ".hidden").write_text("hidden")
    return root


def batches(corpus, **changes):
    sizes = {"batch_size": 4, "length": 24, "seed": 3} | changes
    return text_batches(corpus, ByteTokenizer(), **sizes)


@pytest.mark.latest
def test_packing_against_a_plain_loop(corpus):
    """Tokens, shifted targets, restarting positions, segments and weights of one validation pass, by document."""
    texts = [text for _, text in split_documents(documents(corpus), "validation")]
    rows = [row for batch in batches(corpus, split="validation") for row in zip(*[getattr(batch, f) for f in FIELDS])]
    seen = set()
    for tokens, targets, positions, segments, weights in rows:
        for segment in range(1, segments.max(initial=0) + 1):
            where = np.flatnonzero(segments == segment)
            assert (np.diff(where) == 1).all()
            np.testing.assert_array_equal(positions[where], np.arange(where.size))
            inner = where[:-1]
            np.testing.assert_array_equal(targets[inner], tokens[inner + 1])
            assert (weights[inner] == 1).all()
            last = where[-1]
            if weights[last] == 0:  # a document ends here, with the end-of-text id
                assert tokens[last] == ByteTokenizer.eos_token_id
                assert targets[last] == 0
            text = ByteTokenizer().decode(tokens[where])
            seen.add(text)
            assert any(text in whole for whole in texts)
        assert (positions[segments == 0] == -1).all()
        assert (weights[segments == 0] == 0).all()
    # Each token but the first of its document is a target exactly once.
    tokens = sum(len(text) + 1 for text in texts)
    assert sum(int(row[4].sum()) for row in rows) == tokens - len(texts)


FIELDS = ("tokens", "targets", "positions", "segment_ids", "weights")


def test_every_epoch_holds_every_token_once_in_another_order(corpus):
    source = batches(corpus, batch_size=1)
    epochs = [[next(source) for _ in range(source.windows)] for _ in range(2)]
    counts = [
        np.bincount(np.concatenate([b.tokens[b.segment_ids > 0] for b in epoch]), minlength=258) for epoch in epochs
    ]
    whole = np.bincount(source.tokens, minlength=258)
    for count in counts:  # the stream's last token is a target only
        assert 0 <= (whole - count).sum() <= 1
    assert any((a.tokens != b.tokens).any() for a, b in zip(*epochs))


def test_position_is_saved_and_restored(corpus):
    source = batches(corpus)
    expected = [next(source) for _ in range(30)]
    again = batches(corpus)
    for _ in range(11):
        next(again)
    state = json.loads(json.dumps(again.state()))
    resumed = batches(corpus)
    resumed.restore(state)
    for want, got in zip(expected[11:], itertools.islice(resumed, 19)):
        np.testing.assert_array_equal(want.tokens, got.tokens)
        np.testing.assert_array_equal(want.weights, got.weights)
    with pytest.raises(ValueError, match="seed"):
        batches(corpus, seed=4).restore(state)


def test_order_depends_on_the_seed(corpus):
    assert (next(batches(corpus)).tokens != next(batches(corpus, seed=4)).tokens).any()
    np.testing.assert_array_equal(next(batches(corpus)).tokens, next(batches(corpus)).tokens)


def test_split_is_disjoint_and_stable(corpus):
    found = documents(corpus)
    assert [name for name, _ in found] == sorted(name for name, _ in found)
    assert len(found) == 40
    train, validation = (split_documents(found, split) for split in ("train", "validation"))
    assert sorted(train + validation) == found
    assert validation
    fewer = [document for document in found if document != train[0]]
    assert split_documents(fewer, "validation") == validation


def test_one_file_is_a_corpus_too(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {index}\n" for index in range(2000)))
    train = next(text_batches(path, ByteTokenizer(), batch_size=2, length=16))
    held_out = list(text_batches(path, ByteTokenizer(), batch_size=2, length=16, split="validation"))
    assert train.tokens.shape == (2, 16)
    assert held_out
    (tmp_path / "short.txt").write_text("hello\n")
    short = text_batches(tmp_path / "short.txt", ByteTokenizer(), batch_size=1, length=16)
    batch = next(short)
    assert ByteTokenizer().decode(batch.tokens[0, :6]) == "hello\n"
    assert batch.weights[0].sum() == 6  # five letters and the end-of-text id after the line end


def test_standard_library_is_real_text():
    found = dict(documents("python-stdlib"))
    assert "class Generator" in found["typing.py"] or "TypeVar" in found["typing.py"]
    assert not any(name.startswith(("test/", "site-packages/")) for name in found)


@pytest.mark.usefixtures("unchecked")
def test_bad_inputs(corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match="python-stdlib"):
        documents(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="UTF-8"):
        documents(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"split.*'train', 'validation'"):
        batches(corpus, split="test")
    with pytest.raises(ValueError, match="length"):
        batches(corpus, length=0)
    with pytest.raises(ValueError, match="two tokens"):
        TextBatches([np.zeros(1, np.int32)], batch_size=1, length=4)
