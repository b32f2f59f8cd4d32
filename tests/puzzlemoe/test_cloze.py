import keyword
import types

import numpy as np
import pytest

from jaxlab.models import ByteTokenizer
from jaxlab.puzzlemoe.cloze import CHOICES, KINDS, Question, accuracy, make_questions
from tests.puzzlemoe.decoders import logits, original

CODE = '''
def parse_header(stream, encoding):
    """Read the header of a stream."""
    for line in stream:
        header = decode(line, encoding)
        if header is None:
            return stream
        while header:
            stream, header = advance(stream, header)
    with stream as handle:
        return parse_header(handle, encoding)
'''
DOCUMENTS = [(f"{index}.py", CODE.replace("header", f"header{index}")) for index in range(3)]


@pytest.mark.parametrize("kind", KINDS)
def test_questions_come_from_the_text(kind):
    questions = make_questions(kind, DOCUMENTS, count=12, seed=1, context=60)
    assert len(questions) == 12
    for question in questions:
        assert len(question.choices) == len(set(question.choices)) == CHOICES
        assert len(question.context) == 60
        right = question.choices[question.answer]
        assert any(question.context + right in text for _, text in DOCUMENTS)
        if kind == "keyword":
            assert all(keyword.iskeyword(choice) for choice in question.choices)
        if kind == "name":
            assert all(choice in question.context for choice in question.choices)
    assert {question.answer for question in questions} > {0}
    assert questions == make_questions(kind, DOCUMENTS, count=12, seed=1, context=60)
    assert questions != make_questions(kind, DOCUMENTS, count=12, seed=2, context=60)


def test_what_holds_no_question():
    with pytest.raises(ValueError, match="kind must be one of line, name, keyword, got 'word'"):
        make_questions("word", DOCUMENTS, count=1)
    with pytest.raises(ValueError, match="no question of kind 'keyword'"):
        make_questions("keyword", [("a", "x = 1\n" * 100)], count=1)


def test_the_likeliest_choice_is_taken():
    """Scores recomputed from the model's logits, one choice at a time."""
    model, params = original()
    tokenizer = types.SimpleNamespace(encode=lambda text: [ord(letter) % 64 for letter in text])
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefgh"))
    questions, right = [], 0
    for _ in range(5):
        context, *choices = ("".join(rng.choice(letters, size)) for size in (9, 2, 5, 3, 4))
        questions.append(Question(context, tuple(choices), 1))
        rows = [tokenizer.encode(context + choice) for choice in choices]
        padded = np.array([[*row, *[0] * (14 - len(row))] for row in rows])
        tables = np.asarray(logits(model, params, padded), np.float64)
        logps = tables - np.log(np.exp(tables).sum(-1, keepdims=True))
        scores = [
            np.mean([logp[at - 1, row[at]] for at in range(len(context), len(row))]) for logp, row in zip(logps, rows)
        ]
        right += int(np.argmax(scores) == 1)
    assert accuracy(model, params, tokenizer, questions) == right / 5


def test_questions_that_cannot_be_asked():
    with pytest.raises(ValueError, match="at least one"):
        accuracy(*original(), ByteTokenizer(), [])
    with pytest.raises(ValueError, match="must have tokens"):
        accuracy(*original(), ByteTokenizer(), [Question("a", ("", "b"), 0)])
