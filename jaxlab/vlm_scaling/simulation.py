"""A sampler and verifier whose truth is known: what a study must find is a formula (`stats.majority_accuracy`, ...).

Samples are right with probability p, wrong answers are spread over a few or concentrated on one, and verdicts are right
at given rates, with or without dependence on the image. Markers and continuations have known effects too.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from jaxlab.vlm_scaling.extract import extract
from jaxlab.vlm_scaling.inputs import MODES
from jaxlab.vlm_scaling.samples import Question, Sample


@dataclass(frozen=True)
class Simulation:
    """A sampler (`sample`, `greedy`, `extend`) and verifier (`verify`) in one.

    Attributes:
      p: probability that a sample is right.
      n_wrong: how many wrong answers there are.
      concentration: weight of the first wrong answer against each of the others, above 0; 1: all equally likely.
      none: share of samples without an answer, of those that are not right.
      tpr: probability that a right sample is accepted.
      fpr: that a wrong one is.
      blind_tpr: the same without the image; None: as with it.
      blind_fpr: the same of wrong ones.
      unread: share of verdicts that cannot be read.
      aha: probability that a sample has a marker.
      tokens: of a sample.
    """

    p: float = 0.4
    n_wrong: int = 3
    concentration: float = 1.0
    none: float = 0.0
    tpr: float = 0.7
    fpr: float = 0.5
    blind_tpr: float | None = None
    blind_fpr: float | None = None
    unread: float = 0.0
    aha: float = 0.0
    tokens: int = 20

    def __post_init__(self):
        for name in ("p", "none", "tpr", "fpr", "unread", "aha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a probability, got {getattr(self, name)}")
        if self.n_wrong < 1 or not self.concentration > 0:
            got = f"{self.n_wrong} and {self.concentration}"
            raise ValueError(f"n_wrong and concentration: expected at least 1 and above 0, got {got}")

    def questions(self, count: int) -> list[Question]:
        """Questions with the right answer 0; the wrong ones are 1, 2, ..."""
        return [Question(f"q{number:05}", f"What is in picture {number}?", "0") for number in range(count)]

    def sample(self, question: Question, indices: Sequence[int], *, seed: int) -> list[Sample]:
        """Samples, each from a stream of its own."""
        return [self._draw(random.Random(f"{seed} {question.id} {index}")) for index in indices]

    def greedy(self, question: Question) -> Sample:
        """The likelier of the right answer and the first wrong one."""
        first = (1 - self.p) * (1 - self.none) * self.concentration / (self.concentration + self.n_wrong - 1)
        return Sample(f"<think>I see it.</think> \\boxed{{{int(first > self.p)}}}", self.tokens)

    def extend(
        self, question: Question, prefixes: Sequence[str], *, seed: int, max_tokens: int | None = None, stop: str = ""
    ) -> list[Sample]:
        """Goes on as if nothing had been written: texts put in have no effect."""
        return [self._draw(random.Random(f"{seed} {question.id} {place}")) for place in range(len(prefixes))]

    def verify(
        self, question: Question, samples: Sequence[Sample], *, mode: str, seed: int
    ) -> list[bool | float | None]:
        """Verdicts, independent of each other."""
        tpr, fpr = self.tpr, self.fpr
        if MODES[mode].image != "own":
            tpr = tpr if self.blind_tpr is None else self.blind_tpr
            fpr = fpr if self.blind_fpr is None else self.blind_fpr
        verdicts: list[bool | float | None] = []
        for place, sample in enumerate(samples):
            stream = random.Random(f"{seed} {question.id} {place} {mode}")
            right = extract(sample.text).value == question.answer
            verdict = stream.random() < (tpr if right else fpr)
            verdicts.append(None if stream.random() < self.unread else verdict)
        return verdicts

    def _draw(self, stream: random.Random) -> Sample:
        answer: int | None = 0
        if stream.random() >= self.p:
            weights = [self.concentration, *[1.0] * (self.n_wrong - 1)]
            answer = stream.choices(range(1, self.n_wrong + 1), weights)[0]
            if stream.random() < self.none:
                answer = None
        doubt = " Wait, let me check again." if stream.random() < self.aha else ""
        shown = "I do not know." if answer is None else f"\\boxed{{{answer}}}"
        return Sample(f"<think>I see it.{doubt}</think> {shown}", self.tokens, stream.gauss(-0.5, 0.1))
