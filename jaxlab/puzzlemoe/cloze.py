"""Multiple-choice questions made of held-out source code, for language models too small for the usual benchmarks.

Three kinds: which of four lines follows ("line"), which of four names that were seen before comes next ("name"), and
which of four keywords opens a line ("keyword"). A choice is judged by its mean log-probability a token.
"""

import dataclasses
import functools
import keyword
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlab.puzzlemoe.config import check_name

CHOICES = 4
# Rows that are judged at a time.
_ROWS = 64
# Names shorter than this are guessed by chance.
_NAME = re.compile(r"[A-Za-z_]\w{3,}")
_OPENING = re.compile(r"^[ ]*(\w+)\b", re.MULTILINE)
_LINE = (8, 32)
"""Bytes a line must have to be asked for, and at how many it is cut."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        context: what comes before.
        choices: the answer, and others.
        answer: index of the right one.
    """

    context: str
    choices: tuple[str, ...]
    answer: int


def make_questions(
    kind: str, documents: Sequence[tuple[str, str]], *, count: int, seed: int = 0, context: int = 90
) -> list[Question]:
    """Questions from documents of Python source; of every document at most one in a round, places drawn at random.

    Args:
        kind: "line", "name" or "keyword".
        documents: (name, text) each.
        count: how many questions; fewer if the documents hold no more.
        seed: of places, other choices and their order.
        context: characters before the gap.

    Raises:
        ValueError: an unknown kind, or documents without a single question of it.
    """
    check_name("kind", kind, KINDS)
    rng = np.random.default_rng([seed, *kind.encode()])
    texts = [text for _, text in documents if len(text) > 2 * context]
    questions: list[Question] = []
    for _ in range(-(-count // max(len(texts), 1))):
        for index in rng.permutation(len(texts)):
            found = _FINDERS[kind](texts[index], rng, context)
            if found is not None:
                questions.append(found)
            if len(questions) == count:
                return questions
    if not questions:
        raise ValueError(f"documents hold no question of kind {kind!r}")
    return questions


def _asked(context: str, right: str, others: Sequence[str], rng: np.random.Generator) -> Question | None:
    others = sorted({*others} - {right})
    if len(others) < CHOICES - 1 or not right.isascii():
        return None
    chosen = [str(other) for other in rng.choice(others, CHOICES - 1, replace=False)]
    answer = int(rng.integers(CHOICES))
    return Question(context, (*chosen[:answer], right, *chosen[answer:]), answer)


def _line(text: str, rng: np.random.Generator, context: int) -> Question | None:
    """Other choices are lines of the same document."""
    ends = [at for at in _ends_of_lines(text) if at >= context]
    lines = {line[: _LINE[1]] for line in text.splitlines() if len(line.strip()) >= _LINE[0]}
    for at in _shuffled(ends, rng):
        right = text[at:].partition("\n")[0][: _LINE[1]]
        if len(right.strip()) >= _LINE[0]:
            return _asked(text[at - context : at], right, sorted(lines), rng)
    return None


def _name(text: str, rng: np.random.Generator, context: int) -> Question | None:
    """Other choices are names of the same context."""
    places = [match for match in _NAME.finditer(text) if match.start() >= context]
    for match in _shuffled(places, rng):
        before = text[match.start() - context : match.start()]
        seen = {name for name in _NAME.findall(before) if not keyword.iskeyword(name)}
        if match.group() in seen and len(seen) >= CHOICES:
            return _asked(before, match.group(), sorted(seen), rng)
    return None


def _keyword(text: str, rng: np.random.Generator, context: int) -> Question | None:
    """Other choices are keywords that open lines of the same document."""
    opened = [match for match in _OPENING.finditer(text) if keyword.iskeyword(match.group(1))]
    words = sorted({match.group(1) for match in opened})
    for match in _shuffled([match for match in opened if match.start(1) >= context], rng):
        return _asked(text[match.start(1) - context : match.start(1)], match.group(1), words, rng)
    return None


_FINDERS: dict[str, Callable[[str, np.random.Generator, int], Question | None]] = {
    "line": _line,
    "name": _name,
    "keyword": _keyword,
}
KINDS = tuple(_FINDERS)
"""The kinds of questions."""


def _ends_of_lines(text: str) -> Iterator[int]:
    return (match.end() for match in re.finditer("\n", text))


def _shuffled(items: Sequence[Any], rng: np.random.Generator) -> Iterator[Any]:
    return (items[index] for index in rng.permutation(len(items)))


def accuracy(model: Any, params: Any, tokenizer: Any, questions: Sequence[Question]) -> float:
    """Share of the questions whose answer has the highest mean log-probability a token.

    Args:
        model: a `Decoder`.
        params: its parameters.
        tokenizer: with `encode(str) -> list[int]`.
        questions: as `make_questions` gives them; choices may differ in number.

    Raises:
        ValueError: no questions, or a choice without tokens.
    """
    if not questions:
        raise ValueError("questions must hold at least one, got none")
    rows, spans = [], []
    for question in questions:
        start = tokenizer.encode(question.context)
        for choice in question.choices:
            ids = tokenizer.encode(choice)
            if not start or not ids:
                raise ValueError(f"context and choices must have tokens, got {question.context!r} and {choice!r}")
            rows.append([*start, *ids])
            spans.append((len(start), len(start) + len(ids)))
    width = -(-max(map(len, rows)) // 32) * 32  # few shapes, so that other questions compile nothing
    tokens = np.zeros((-(-len(rows) // _ROWS) * _ROWS, width), np.int32)
    asked = np.zeros(tokens.shape, bool)
    for index, (row, (first, last)) in enumerate(zip(rows, spans)):
        tokens[index, : len(row)] = row
        asked[index, first:last] = True
    parts = [slice(at, at + _ROWS) for at in range(0, len(tokens), _ROWS)]
    scores = np.concatenate([np.asarray(_scores(model, params, tokens[part], asked[part])) for part in parts])
    right, at = 0, 0
    for question in questions:
        of_choices = scores[at : at + len(question.choices)]
        right += int(np.argmax(of_choices)) == question.answer
        at += len(question.choices)
    return right / len(questions)


@functools.partial(jax.jit, static_argnums=0)
def _scores(model: Any, params: Any, tokens: Array, asked: Array) -> Float[Array, " rows"]:
    """Mean log-probability of the tokens asked for; rows are padded on the right, which causal attention ignores."""
    logits = model.apply({"params": params}, tokens).logits[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    weights = asked[:, 1:].astype(jnp.float32)
    return jnp.sum(chosen * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1.0)
