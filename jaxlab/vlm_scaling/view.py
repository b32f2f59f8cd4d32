"""A question of a study as strategies see it."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxlab.vlm_scaling.cost import Meter
from jaxlab.vlm_scaling.extract import Style, extract
from jaxlab.vlm_scaling.responses import Responses
from jaxlab.vlm_scaling.samples import JudgesSamples, Question, Sample, Sampler
from jaxlab.vlm_scaling.select import Score


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all questions of a study have in common; see `Study`.

    Attributes:
      sampler: draws.
      verifier: judges.
      n: samples a question.
      judged: verifier mode -> how many of them are judged.
      grade: whether an answer is right.
      style: of `extract`.
      meter: counts tokens.
      responses: what is known already.
    """

    sampler: Sampler
    verifier: JudgesSamples | None
    n: int
    judged: Mapping[str, int]
    grade: Callable[[str | None, Question], bool]
    style: Style
    meter: Meter
    responses: Responses


class View:
    """One question as a strategy sees it; everything asked for is drawn once and kept.

    Attributes:
      question: the question.
      meter: counts tokens.
      seed: for a strategy's own chance.
    """

    def __init__(self, question: Question, setting: Setting):
        self.question, self.meter = question, setting.meter
        self.seed = setting.responses.seed_of(question.id, "sample")
        self._setting, self._responses = setting, setting.responses

    @functools.cached_property
    def samples(self) -> list[Sample]:
        """All n samples."""
        known = self._responses.kept[self.question.id]["samples"]
        missing = [index for index in range(self._setting.n) if str(index) not in known]
        if missing:
            drawn = self._setting.sampler.sample(self.question, missing, seed=self.seed)
            if len(drawn) != len(missing):
                raise ValueError(f"sampler: expected {len(missing)} samples of {self.question.id!r}, got {len(drawn)}")
            self._responses.keep(
                self.question.id, samples={str(index): _row(each) for index, each in zip(missing, drawn)}
            )
        return [_sample(known[str(index)]) for index in range(self._setting.n)]

    @functools.cached_property
    def _answers(self) -> list[str | None]:
        return [self.read(sample.text) for sample in self.samples]

    def answers(self, n: int) -> list[str | None]:
        """Of the first n samples."""
        return self._answers[:n]

    def scores(self, n: int, mode: str) -> list[Score]:
        """The verifier's, of the first n samples."""
        known = self._responses.kept[self.question.id]["verdicts"].setdefault(mode, {})
        count, verifier = self._setting.judged[mode], self._setting.verifier
        missing = [index for index in range(count) if str(index) not in known]
        if missing and verifier is not None:
            candidates = [self.samples[index] for index in missing]
            seed = self._responses.seed_of(self.question.id, f"verify {mode} {missing[0]}")
            scores = verifier.verify(self.question, candidates, mode=mode, seed=seed)
            if len(scores) != len(missing):
                raise ValueError(
                    f"verifier: expected {len(missing)} verdicts on {self.question.id!r}, got {len(scores)}"
                )
            plain = [score if score is None else score.item() if hasattr(score, "item") else score for score in scores]
            self._responses.keep(
                self.question.id, verdicts={mode: {str(at): score for at, score in zip(missing, plain)}}
            )
        return [known[str(index)] for index in range(n)]

    def right(self, answer: str | None) -> bool:
        """Whether an answer is."""
        return bool(self._setting.grade(answer, self.question))

    def read(self, text: str) -> str | None:
        """The answer in a text."""
        return extract(text, choices=self.question.choices, style=self._setting.style).value

    def greedy(self) -> Sample:
        """The sample at temperature 0."""
        return self._call("greedy", lambda sampler, seed: sampler.greedy(self.question))

    def ask(self, prompt: str) -> Sample:
        """The answer to another prompt about the same images."""
        return self._call(f"ask {prompt}", lambda sampler, seed: sampler.ask(self.question, prompt, seed=seed))

    def extend(self, prefix: str, *, max_tokens: int | None = None, stop: str = "") -> Sample:
        """What follows a begun answer."""

        def call(sampler: Any, seed: int) -> Sample:
            return sampler.extend(self.question, [prefix], seed=seed, max_tokens=max_tokens, stop=stop)[0]

        return self._call(f"extend {max_tokens} {stop!r} {prefix}", call)

    def _call(self, what: str, call: Callable[[Any, int], Sample]) -> Sample:
        known = self._responses.kept[self.question.id]["calls"]
        name = hashlib.blake2b(what.encode(errors="surrogatepass"), digest_size=12).hexdigest()
        if name not in known:
            drawn = call(self._setting.sampler, self._responses.seed_of(self.question.id, name))
            self._responses.keep(self.question.id, calls={name: _row(drawn)})
        return _sample(known[name])


def _row(sample: Sample) -> list[Any]:
    return [sample.text, int(sample.n_tokens), float(sample.logprob)]


def _sample(row: Sequence[Any]) -> Sample:
    return Sample(*row)
