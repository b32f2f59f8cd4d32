"""Strategies compared on questions: samples and verdicts are drawn once, kept in a file, and shared by all strategies.

from jaxlab.vlm_scaling import BestOfN, Majority, Oracle, RandomOf, Study
report = Study(questions, sampler, strategies=[Majority(8), BestOfN(8), Oracle(8), RandomOf(8)], n=8,
               verifier=verifier, cache="study.jsonl").run()
print(report)
"""

import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxlab.vlm_scaling import images
from jaxlab.vlm_scaling.aha import outcome_table
from jaxlab.vlm_scaling.cost import Meter
from jaxlab.vlm_scaling.extract import Style
from jaxlab.vlm_scaling.grade import correct
from jaxlab.vlm_scaling.report import Report, Row, make_report
from jaxlab.vlm_scaling.responses import Responses
from jaxlab.vlm_scaling.samples import JudgesSamples, Question, Sample, Sampler
from jaxlab.vlm_scaling.strategies import Strategy
from jaxlab.vlm_scaling.verdicts import agreement, metrics
from jaxlab.vlm_scaling.view import Setting, View

__all__ = ["Question", "Report", "Row", "Sample", "Study", "split"]

Grade = Callable[[str | None, Question], bool]


def grade_exactly(answer: str | None, question: Question) -> bool:
    """`grade.correct`."""
    return correct(answer, question.answer, choices=question.choices)


class Study:
    """The same samples of the same questions under several strategies."""

    def __init__(
        self,
        questions: Sequence[Question],
        sampler: Sampler,
        *,
        strategies: Sequence[Strategy],
        n: int,
        verifier: JudgesSamples | None = None,
        cache: str | os.PathLike | None = None,
        seed: int = 0,
        grade: Grade = grade_exactly,
        style: Style = "jaxlab",
        meter: Meter | None = None,
        baseline: str | None = None,
        n_resamples: int = 10_000,
    ):
        """Draws nothing yet.

        Args:
          questions: with different ids.
          sampler: draws samples; some strategies need more of it (`samples.GreedySampler`, ...).
          strategies: with different names.
          n: samples a question.
          verifier: for the strategies that need one.
          cache: a file; what a question's samples, verdicts and further calls gave is appended at once, and not asked
            for again by a study with the same questions and seed, be it one that was killed, or has a larger n.
          seed: of everything: a question's seeds depend on it and on the question's id alone.
          grade: whether an answer (None: there is none) to a question is right; default `grade.correct`.
          style: of `extract`.
          meter: counts tokens; default `cost.Meter()`.
          baseline: name of the strategy that others are tested against; default the first majority, else the first.
          n_resamples: of the bootstrap.

        Raises:
          ValueError: nothing to do, repeated ids or names, a strategy that needs more samples, a verifier or a method
            of the sampler that is not there, or a cache of other questions or another seed.
        """
        self._questions, self._strategies, self._seed = tuple(questions), tuple(strategies), seed
        self._n_resamples = n_resamples
        for name, values in (
            ("questions", [question.id for question in questions]),
            ("strategies", [strategy.name for strategy in strategies]),
        ):
            if not values:
                raise ValueError(f"{name}: expected at least one, got none")
            if repeated := [value for value, count in Counter(values).items() if count > 1]:
                raise ValueError(f"{name}: expected different ones, got {repeated[0]!r} twice")
        if n < 1:
            raise ValueError(f"n: expected at least 1 sample a question, got {n}")
        for strategy in strategies:
            if strategy.n > n:
                raise ValueError(f"n: expected at least {strategy.n} samples for {strategy.name}, got {n}")
            if strategy.modes and verifier is None:
                raise ValueError(f"verifier: expected one for {strategy.name}, got None")
            if missing := [method for method in strategy.needs if not hasattr(sampler, method)]:
                raise ValueError(f"sampler: expected one with `{missing[0]}` for {strategy.name}, got {sampler!r}")
        names = [strategy.name for strategy in strategies]
        self._baseline = baseline or next((name for name in names if name.startswith("majority@")), names[0])
        if self._baseline not in names:
            raise ValueError(f"baseline: expected one of {', '.join(names)}, got {baseline!r}")
        judged = {
            mode: max(strategy.n for strategy in strategies if mode in strategy.modes)
            for mode in sorted({mode for strategy in strategies for mode in strategy.modes})
        }
        responses = Responses(cache, self._questions, seed)
        self._setting = Setting(sampler, verifier, n, judged, grade, style, meter or Meter(), responses)

    def run(self) -> Report:
        """Draws what is missing and compares."""
        ordered = sorted(self._questions, key=lambda question: question.id)
        views = {question.id: View(question, self._setting) for question in self._questions}
        outcomes = {
            question.id: [strategy.run(views[question.id]) for strategy in self._strategies]
            for question in self._questions
        }
        by_strategy = {
            strategy.name: [outcomes[question.id][place] for question in ordered]
            for place, strategy in enumerate(self._strategies)
        }
        revised = {name: [each.transition for each in results] for name, results in by_strategy.items()}
        verdicts, agreements = self._judgement([views[question.id] for question in ordered])
        return make_report(
            questions=[question.id for question in ordered],
            clusters=[images.label(question.images) or f"question {question.id}" for question in ordered],
            outcomes={name: [each.accuracy for each in results] for name, results in by_strategy.items()},
            answers={name: [each.answer for each in results] for name, results in by_strategy.items()},
            tokens={name: [each.tokens for each in results] for name, results in by_strategy.items()},
            selectable={strategy.name: strategy.selectable for strategy in self._strategies},
            baseline=self._baseline,
            transitions={name: outcome_table(found) for name, found in revised.items() if any(found)},
            verdicts=verdicts,
            agreement=agreements,
            n_resamples=self._n_resamples,
            seed=self._seed,
        )

    def samples(self) -> dict[str, list[Sample]]:
        """Question id -> its n samples, drawn where they are missing."""
        return {question.id: list(View(question, self._setting).samples) for question in self._questions}

    def answers(self) -> dict[str, list[str | None]]:
        """Question id -> the answers in its n samples."""
        count = self._setting.n
        return {question.id: View(question, self._setting).answers(count) for question in self._questions}

    def _judgement(self, views: Sequence[View]) -> tuple[dict[str, Any], dict[tuple[str, str], float]]:
        judged = self._setting.judged
        scores = {
            mode: [score for view in views for score in view.scores(count, mode)] for mode, count in judged.items()
        }
        right = {
            mode: [view.right(answer) for view in views for answer in view.answers(count)]
            for mode, count in judged.items()
        }
        agreements = {
            (first, second): agreement(scores[first], scores[second])
            for first, second in itertools.combinations(judged, 2)
            if judged[first] == judged[second]
        }
        return {mode: metrics(scores[mode], right[mode]) for mode in judged}, agreements


def split(questions: Sequence[Question], share: float, *, seed: int = 0) -> tuple[list[Question], list[Question]]:
    """A dev split and the rest, drawn by image, so that no image is in both; not dependent on the order of questions.

    Args:
      questions: to be split; the order in each part is theirs.
      share: of the images that goes to the dev split, in (0, 1).
      seed: of the drawing.

    Raises:
      ValueError: a share outside (0, 1).
    """
    labels = {question.id: images.label(question.images) or f"question {question.id}" for question in questions}
    dev = drawn(labels.values(), share, seed)
    return (
        [question for question in questions if labels[question.id] in dev],
        [question for question in questions if labels[question.id] not in dev],
    )


def drawn(labels: Iterable[str], share: float, seed: int) -> set[str]:
    """Of the different labels a share, drawn; not dependent on their order.

    Raises:
      ValueError: a share outside (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a value in (0, 1), got {share}")
    groups = sorted(set(labels))
    random.Random(seed).shuffle(groups)
    return set(groups[: round(share * len(groups))])
