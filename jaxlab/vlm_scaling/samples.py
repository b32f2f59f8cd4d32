"""Questions, samples, and what a study asks of whatever draws and judges them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Question:
    """A question about images.

    Attributes:
      id: unique in a study.
      text: as it is asked, options included; an image stands before it, or where the sampler's placeholder is.
      answer: the right one, of multiple choice the letter or the text of an option.
      images: uint8 arrays [H, W, 3], paths, or bytes of an image file.
      choices: letter -> text of the option; None: no multiple choice.
      meta: of the data set: whatever a report may group by.
    """

    id: str
    text: str
    answer: str
    images: tuple[Any, ...] = ()
    choices: Mapping[str, str] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """What was generated.

    Attributes:
      text: without the prompt.
      n_tokens: generated.
      logprob: mean log-probability of a token.
    """

    text: str
    n_tokens: int = 0
    logprob: float = 0.0


@runtime_checkable
class Sampler(Protocol):
    """Draws samples of questions; sample i of a question and seed is the same whoever it is drawn with."""

    def sample(self, question: Question, indices: Sequence[int], *, seed: int) -> list[Sample]:
        """The samples of these indices, in their order."""
        ...


@runtime_checkable
class GreedySampler(Protocol):
    """A sampler that also gives the likeliest text, for `Greedy`."""

    def greedy(self, question: Question) -> Sample:
        """The sample at temperature 0."""
        ...


@runtime_checkable
class ContinuingSampler(Protocol):
    """A sampler that goes on with begun texts, for `BudgetForce` and for what is done at a marker."""

    def extend(
        self, question: Question, prefixes: Sequence[str], *, seed: int, max_tokens: int | None = None, stop: str = ""
    ) -> list[Sample]:
        """What follows each begun answer: at most `max_tokens`, up to and without `stop`."""
        ...


@runtime_checkable
class AskingSampler(Protocol):
    """A sampler that takes another prompt about the same images, for `Refine` and `SelfSelect`."""

    def ask(self, question: Question, prompt: str, *, seed: int) -> Sample:
        """The answer to `prompt`, with the question's images before it."""
        ...


@runtime_checkable
class JudgesSamples(Protocol):
    """A verifier: says of samples whether they are right."""

    def verify(
        self, question: Question, samples: Sequence[Sample], *, mode: str, seed: int
    ) -> list[bool | float | None]:
        """A verdict or score each, None where it could not be read; `mode` is one of `verify.MODES`."""
        ...
