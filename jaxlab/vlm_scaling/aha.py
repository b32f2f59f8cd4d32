"""Moments at which a text turns back on itself: where they are, and whether they help.

Words that mark them are cheap to count (`find`), and say little: questions that are hard have more of them. So: whether
the answer changes at one (`early_answers`), the contrast within questions (`contrast`), and what happens when one is
put in (`insert`). The paper (arXiv 2506.17417) gives no word list; this one is ours.
"""

import bisect
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from jaxlab.core.statistics import Interval, mcnemar_exact, paired_bootstrap_ci
from jaxlab.vlm_scaling.extract import extract
from jaxlab.vlm_scaling.grade import answer_key, correct
from jaxlab.vlm_scaling.samples import ContinuingSampler, Question, Sample

PATTERNS: Mapping[str, str] = {
    "recheck": r"wait|hold on|hmm|let me (?:double[- ]check|re-?check|check again|look again|re-?examine|re-?read)"
    r"|re-?check(?:ing)?|check(?:ing)? again|double[- ]check(?:ing)?|on second thought|look(?:ing)? again",
    "backtracking": r"(?:that|this|it)(?:'s| is| was) (?:not right|not correct|wrong|incorrect|a mistake)|actually"
    r"|scratch that|i (?:made|was making) an? (?:mistake|error)|i was wrong"
    r"|(?:let me |i(?:'ll| will) )?(?:go back|start over|try again|redo)",
    "alternative": r"alternatively|another (?:way|approach|method|option)|a different (?:way|approach|method)|what if",
    "verification": r"let(?:'s| us| me) (?:verify|check|confirm|test|make sure)|to (?:verify|confirm|make sure)"
    r"|verif(?:y|ying|ication)|plug(?:ging)? (?:it |this |that )?(?:back )?in|sanity check",
    "subgoal": r"first(?:ly)?, |next, |finally, |step \d{1,3}|the next step|let's break"
    r"|i need to (?:find|compute|determine)",
}
"""Kind -> regular expression, matched as whole words, upper and lower case alike."""

INSERTION = "Wait, let me check again."
_WORD = re.compile(r"\S+")
_DECLARED = re.compile(r"\banswer(?: is\b|:)", re.IGNORECASE)

Outcome = Literal["wrong->right", "right->wrong", "wrong->wrong'", "unchanged"]


@dataclass(frozen=True)
class Marker:
    """A marking word or phrase.

    Attributes:
      kind: its class.
      span: first and last + 1 character.
      token_index: words before it in the text.
    """

    kind: str
    span: tuple[int, int]
    token_index: int


def find(text: str, *, patterns: Mapping[str, str] | None = None) -> list[Marker]:
    """Markers in the thinking part, in the order of their places.

    The thinking part is what stands in `<think>` blocks, an unclosed one or one without an opening tag included;
    without tags, all before the answer: a tag, a box, or the last "answer is" or "answer:".

    Args:
      text: of a sample, without the question.
      patterns: kind -> regular expression; None: `PATTERNS`. To extend them: `{**PATTERNS, "doubt": "not sure"}`.

    Raises:
      ValueError: a pattern that is no regular expression, or that matches nothing at all.
    """
    parts = _thinking(text)
    words = [match.start() for match in _WORD.finditer(text)]
    found = []
    for kind, pattern in (PATTERNS if patterns is None else patterns).items():
        for match in (match for part in parts for match in _compiled(kind, pattern).finditer(text, *part)):
            index = bisect.bisect_right(words, match.start()) - 1
            found.append(Marker(kind, match.span(), index))
    return sorted(found, key=lambda marker: (marker.span, marker.kind))


def _compiled(kind: str, pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(rf"(?<!\w)(?:{pattern})(?!\w)", re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"patterns: expected regular expressions, got {pattern!r} for {kind!r}: {error}") from error
    if compiled.fullmatch(""):
        raise ValueError(f"patterns: expected one that matches some text, got {pattern!r} for {kind!r}")
    return compiled


def _thinking(text: str) -> list[tuple[int, int]]:
    opening, closing = "<think>", "</think>"
    if opening not in text and closing not in text:
        found = extract(text)
        if found.span is not None and found.method in ("answer_tag", "boxed"):
            return [(0, found.span[0])]
        declared = [match.start() for match in _DECLARED.finditer(text)]
        return [(0, declared[-1] if declared else len(text))]
    parts, start = [], 0
    first = text.find(closing)
    if first >= 0 and not 0 <= text.find(opening) < first:  # the prompt opened it
        parts.append((0, first))
        start = first
    while (start := text.find(opening, start)) >= 0:
        stop = text.find(closing, start)
        parts.append((start + len(opening), len(text) if stop < 0 else stop))
        if stop < 0:
            break
        start = stop
    return parts


def outcome(before: str | None, after: str | None, gold: str, *, choices: Mapping[str, str] | None = None) -> Outcome:
    """What became of an answer; an absent one is wrong, and two that are absent are the same."""
    was, became = correct(before, gold, choices=choices), correct(after, gold, choices=choices)
    if was != became:
        return "wrong->right" if became else "right->wrong"
    same = was or answer_key(before, choices=choices) == answer_key(after, choices=choices)
    return "unchanged" if same else "wrong->wrong'"


def outcome_table(outcomes: Sequence[str]) -> dict[str, int]:
    """How often each of the four came, those that never came included."""
    counts = Counter(outcomes)
    return {name: counts[name] for name in get_args(Outcome)}


@dataclass(frozen=True)
class Change:
    """The answers before and after a marker.

    Attributes:
      question: its id.
      sample: index of the sample.
      marker: the first one of the sample.
      before: what the model answers when stopped there.
      after: what it answered in the end.
      outcome: what became of the answer.
    """

    question: str
    sample: int
    marker: Marker
    before: str | None
    after: str | None
    outcome: Outcome


def early_answers(
    question: Question,
    samples: Sequence[Sample],
    sampler: ContinuingSampler,
    *,
    patterns: Mapping[str, str] | None = None,
    answer_prefix: str = "\nThe answer is ",
    max_tokens: int = 32,
    seed: int = 0,
) -> list[Change]:
    """The answers that samples would have given before their first marker: behavioural aha moments.

    Each sample with a marker is cut there, its thinking closed if it was open, and `answer_prefix` put after it; the
    sampler goes on for a few tokens.

    Args:
      question: theirs.
      samples: of it.
      sampler: goes on with begun texts.
      patterns: see `find`.
      answer_prefix: what asks for the answer.
      max_tokens: of the early answer.
      seed: of the sampler.
    """
    found = [find(sample.text, patterns=patterns) for sample in samples]
    marked = [(index, markers[0]) for index, markers in enumerate(found) if markers]
    if not marked:
        return []
    prefixes = [_closed(samples[index].text[: marker.span[0]]) + answer_prefix for index, marker in marked]
    stubs = sampler.extend(question, prefixes, seed=seed, max_tokens=max_tokens)
    changes = []
    for (index, marker), stub in zip(marked, stubs):
        # Only what comes after the prefix: numbers before it are no answer.
        before = extract(answer_prefix + stub.text, choices=question.choices).value
        after = extract(samples[index].text, choices=question.choices).value
        what = outcome(before, after, question.answer, choices=question.choices)
        changes.append(Change(question.id, index, marker, before, after, what))
    return changes


def _closed(text: str) -> str:
    return text.rstrip() + ("\n</think>" if text.rfind("<think>") > text.rfind("</think>") else "")


@dataclass(frozen=True)
class Contrast:
    """Accuracy with and without markers.

    Attributes:
      rate: share of samples with a marker.
      with_marker: their accuracy; NaN without any.
      without_marker: accuracy of the others.
      difference: of the two: confounded, since hard questions have more markers.
      within: the difference within questions (question fixed effects), and its bootstrap interval over questions; None
        where no question has samples of both kinds.
      questions: how many have both kinds.
    """

    rate: float
    with_marker: float
    without_marker: float
    difference: float
    within: Interval | None
    questions: int


def contrast(
    questions: Sequence[str], marked: Sequence[bool], right: Sequence[bool], *, n_resamples: int = 10_000, seed: int = 0
) -> Contrast:
    """Compares samples with and without markers, over all and within questions.

    Args:
      questions: id of the question of each sample.
      marked: whether the sample has a marker.
      right: whether it is right.
      n_resamples: of the bootstrap.
      seed: of the bootstrap.

    Raises:
      ValueError: no samples, or lists of different lengths.
    """
    if not len(questions) or not len(questions) == len(marked) == len(right):
        raise ValueError(
            f"expected equally long lists of at least 1, got {len(questions)}, {len(marked)} and {len(right)}"
        )
    mark, hit = np.asarray(marked, float), np.asarray(right, float)
    _, member = np.unique(np.asarray(questions), return_inverse=True)
    size = np.bincount(member)
    centred = mark - (np.bincount(member, mark) / size)[member]
    above, below = np.bincount(member, centred * hit), np.bincount(member, centred**2)
    both = below > 1e-12
    within = None
    if both.any():
        above, below = above[both], below[both]
        drawn = np.random.default_rng(seed).integers(len(above), size=(n_resamples, len(above)))
        slopes = above[drawn].sum(axis=1) / below[drawn].sum(axis=1)
        low, high = np.quantile(slopes, (0.025, 0.975))
        within = Interval(float(above.sum() / below.sum()), float(low), float(high))
    with_, without = (float(hit[mark == kind].mean()) if (mark == kind).any() else math.nan for kind in (1, 0))
    return Contrast(float(mark.mean()), with_, without, with_ - without, within, int(both.sum()))


@dataclass(frozen=True)
class Insertion:
    """What putting a marker in does.

    Attributes:
      inserted: whether each continuation after the inserted text is right.
      plain: whether the one without it is.
      difference: of the accuracies, with its paired bootstrap interval over questions; None for a single question.
      p_value: exact McNemar test over samples that the two are right equally often.
      outcomes: what became of the plain answer where the text was put in.
    """

    inserted: tuple[bool, ...]
    plain: tuple[bool, ...]
    difference: Interval | None
    p_value: float
    outcomes: dict[str, int]


def insert(
    pairs: Sequence[tuple[Question, Sample]],
    sampler: ContinuingSampler,
    *,
    text: str = INSERTION,
    depth: float = 0.5,
    max_tokens: int | None = None,
    seed: int = 0,
) -> Insertion:
    """Causal insertion: every sample is cut at a fixed depth of its thinking and gone on with, with and without `text`.

    Both continuations have the same prefix and seed, and are drawn anew, so that nothing but the text differs.

    Args:
      pairs: questions and samples of them.
      sampler: goes on with begun texts.
      text: put in.
      depth: share of the words of the thinking part that is kept, in [0, 1].
      max_tokens: of a continuation.
      seed: of the sampler.

    Raises:
      ValueError: no pairs, or a depth outside [0, 1].
    """
    if not pairs:
        raise ValueError("pairs: expected at least one sample, got none")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth: expected a value in [0, 1], got {depth}")
    right: tuple[list[bool], list[bool]] = ([], [])
    outcomes: list[Outcome] = []
    for question, sample in pairs:
        prefix = _cut(sample.text, depth)
        begun = [f"{prefix.rstrip()} {text} ", prefix]
        ends = sampler.extend(question, begun, seed=seed, max_tokens=max_tokens)
        answers = [extract(start + end.text, choices=question.choices).value for start, end in zip(begun, ends)]
        for column, answer in zip(right, answers):
            column.append(correct(answer, question.answer, choices=question.choices))
        outcomes.append(outcome(answers[1], answers[0], question.answer, choices=question.choices))
    ids = [question.id for question, _ in pairs]
    difference = paired_bootstrap_ci(*right, clusters=ids) if len(set(ids)) > 1 else None
    return Insertion(tuple(right[0]), tuple(right[1]), difference, mcnemar_exact(*right), outcome_table(outcomes))


def _cut(text: str, depth: float) -> str:
    """A text up to a share of the words of its first thinking part, which stays open."""
    start, stop = (_thinking(text) or [(0, 0)])[0]
    words = list(_WORD.finditer(text, start, stop))
    kept = round(depth * len(words))
    return text[: words[kept].start() if kept < len(words) else stop]
