"""Which of several answers to a question is given: pure functions of answers and scores.

    from jaxlab.vlm_scaling import select
    select.majority(["12", "12.0", "7"])                       # index 0, groups ((0, 1),)
    select.best_of_n(["12", "7"], [True, True], logprobs=[-0.4, -0.2])   # index 1

The strategies of a study are these, with what they cost.
"""

import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxlab.vlm_scaling.grade import answer_key

Score = bool | float | None
"""A verdict, a probability or grade, or None where the verifier's answer could not be read."""


@dataclass(frozen=True)
class Selection:
    """What was selected.

    Attributes:
      index: of the winning sample; of a group its first member.
      answer: of that sample.
      groups: indices of the winning group and of any that tie with it, the winner first.
    """

    index: int
    answer: str | None
    groups: tuple[tuple[int, ...], ...]


def majority(
    answers: Sequence[str | None],
    *,
    key: Literal["equivalence", "raw"] = "equivalence",
    tie: Literal["first", "random", "expected"] = "first",
    choices: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Selection:
    """The largest group of equal answers (self-consistency, arXiv 2203.11171).

    Args:
      answers: of the samples; None: a sample without one, which wins only where all are.
      key: what is equal: "equivalence" by `grade.answer_key`, "raw" by text, as lmms-eval votes.
      tie: "first": the group that occurs first; "random": by `seed`; "expected": as "first", for a caller who counts
        the share of `groups` that are right.
      choices: letter -> text of the option.
      seed: of "random".

    Raises:
      ValueError: no answers, or an unknown option.
    """
    _check("tie", tie, ("first", "random", "expected"))
    groups = _groups(answers, _key(key, choices))
    return _winner(answers, groups, [len(group) for group in groups], random.Random(seed) if tie == "random" else None)


def best_of_n(
    answers: Sequence[str | None],
    scores: Sequence[Score],
    *,
    logprobs: Sequence[float] | None = None,
    probs: Sequence[float | None] | None = None,
    fallback: Literal["first", "majority", "argmax_prob"] = "first",
) -> Selection:
    """The sample with the highest score; ties go to the highest log-probability, then to the first.

    Args:
      answers: of the samples.
      scores: verdicts or numbers, one a sample; None and NaN are never better than a "no".
      logprobs: mean log-probability a token, one a sample.
      probs: yes-probabilities, for "argmax_prob".
      fallback: what is taken where every score is "no" or None: the first sample, the majority, or the highest of
        `probs`.

    Raises:
      ValueError: no answers, another number of scores, an unknown fallback, or "argmax_prob" without `probs`.
    """
    _check("fallback", fallback, ("first", "majority", "argmax_prob"))
    _check_lengths(answers, scores=scores, logprobs=logprobs, probs=probs)
    scores = [score.item() if hasattr(score, "item") else score for score in scores]
    if all(score is None or score is False for score in scores):
        if fallback == "majority":
            return majority(answers)
        if fallback == "first":
            return Selection(0, answers[0], ((0,),))
        if probs is None:
            raise ValueError("probs: expected the yes-probabilities for fallback='argmax_prob', got None")
        scores = probs
    second = [0.0] * len(answers) if logprobs is None else logprobs
    ranks = [(_number(score, -math.inf), _number(value, -math.inf)) for score, value in zip(scores, second)]
    best = max(ranks)
    tied = [index for index, rank in enumerate(ranks) if rank == best]
    return Selection(tied[0], answers[tied[0]], tuple((index,) for index in tied))


def weighted_vote(
    answers: Sequence[str | None], scores: Sequence[Score], *, choices: Mapping[str, str] | None = None
) -> Selection:
    """The group of equal answers with the largest sum of scores, of several the first; None adds nothing.

    Raises:
      ValueError: no answers, or another number of scores.
    """
    _check_lengths(answers, scores=scores)
    groups = _groups(answers, _key("equivalence", choices))
    weights = [math.fsum(_number(scores[index], 0.0) for index in group) for group in groups]
    return _winner(answers, groups, weights, None)


def filtered_vote(
    answers: Sequence[str | None],
    scores: Sequence[Score],
    *,
    tau: float,
    choices: Mapping[str, str] | None = None,
) -> Selection:
    """The majority among samples whose score exceeds `tau`; among all where none does.

    Raises:
      ValueError: no answers, or another number of scores.
    """
    _check_lengths(answers, scores=scores)
    kept = [index for index, score in enumerate(scores) if _number(score, -math.inf) > tau]
    kept = kept or list(range(len(answers)))
    found = majority([answers[index] for index in kept], choices=choices)
    return Selection(
        kept[found.index], found.answer, tuple(tuple(kept[index] for index in group) for group in found.groups)
    )


def _key(key: str, choices: Mapping[str, str] | None) -> Callable[[str | None], Hashable]:
    _check("key", key, ("equivalence", "raw"))
    return (lambda answer: answer) if key == "raw" else (lambda answer: answer_key(answer, choices=choices))


def _groups(answers: Sequence[str | None], key: Callable[[str | None], Hashable]) -> list[tuple[int, ...]]:
    """Indices of equal answers, in the order of their first; samples without one only where there is nothing else."""
    if not answers:
        raise ValueError("answers: expected at least one sample, got none")
    groups: dict[Hashable, list[int]] = {}
    for index, answer in enumerate(answers):
        if answer is not None:
            groups.setdefault(key(answer), []).append(index)
    return [tuple(group) for group in groups.values()] or [tuple(range(len(answers)))]


def _winner(
    answers: Sequence[str | None],
    groups: Sequence[tuple[int, ...]],
    weights: Sequence[float],
    generator: random.Random | None,
) -> Selection:
    tied = [group for group, weight in zip(groups, weights) if weight == max(weights)]
    if generator is not None:
        tied.insert(0, tied.pop(generator.randrange(len(tied))))
    return Selection(tied[0][0], answers[tied[0][0]], tuple(tied))


def _number(score: Score, otherwise: float) -> float:
    return otherwise if score is None or math.isnan(score) else float(score)


def _check(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def _check_lengths(answers: Sequence[str | None], **others: Sequence | None) -> None:
    if not answers:
        raise ValueError("answers: expected at least one sample, got none")
    for name, values in others.items():
        if values is not None and len(values) != len(answers):
            raise ValueError(f"{name}: expected one for each of {len(answers)} answers, got {len(values)}")
