"""What samples and verdicts cost: tokens, kept apart by kind, and FLOPs.

Best-of-N reads and judges every sample once more, so at equal N it costs about twice a majority: accuracy is to be
shown against `Tokens.total`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jaxlab.vlm_scaling.samples import Question, Sample

if TYPE_CHECKING:
    from jaxlab.models.decoder.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Numbers of tokens; two add up kind by kind.

    Attributes:
      prompt: text of questions read.
      image: image tokens read for samples.
      generated: in samples.
      verify_prompt: read for verdicts: question, image and candidate.
      verify_generated: in verdicts.
    """

    prompt: float = 0
    image: float = 0
    generated: float = 0
    verify_prompt: float = 0
    verify_generated: float = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    @property
    def total(self) -> float:
        """All kinds together."""
        return sum(dataclasses.astuple(self))


def _of_four_characters(question: Question) -> int:
    """A token for every four characters begun."""
    return -(-len(question.text) // 4)


def _none(question: Question) -> int:
    """No tokens."""
    return 0


@dataclasses.dataclass(frozen=True)
class Meter:
    """Counts the tokens of a study.

    Attributes:
      prompt: text tokens of a question; the default takes four characters for one.
      image: image tokens of a question; the default knows none.
      instruction: tokens of the verifier's own words.
      verdict: tokens of a verdict: 1 for a yes-probability.
      prefix_cache: question and images are read once for all samples, and once more for all verdicts, instead of once
        for each of them.
    """

    prompt: Callable[[Question], int] = _of_four_characters
    image: Callable[[Question], int] = _none
    instruction: int = 0
    verdict: int = 1
    prefix_cache: bool = True

    def sampling(self, question: Question, samples: Sequence[Sample]) -> Tokens:
        """Of drawing these samples."""
        reads = (1 if self.prefix_cache else len(samples)) if samples else 0
        return Tokens(
            prompt=reads * self.prompt(question),
            image=reads * self.image(question),
            generated=sum(sample.n_tokens for sample in samples),
        )

    def verifying(
        self, question: Question, samples: Sequence[Sample], *, blind: bool = False, answer_only: bool = False
    ) -> Tokens:
        """Of a verdict on each of these samples.

        Args:
          question: theirs.
          samples: the candidates.
          blind: without images.
          answer_only: of a candidate the answer alone is shown, counted as nothing.
        """
        reads = (1 if self.prefix_cache else len(samples)) if samples else 0
        context = self.prompt(question) + (0 if blind else self.image(question))
        shown = 0 if answer_only else sum(sample.n_tokens for sample in samples)
        return Tokens(
            verify_prompt=reads * context + len(samples) * self.instruction + shown,
            verify_generated=len(samples) * self.verdict,
        )


def sampling_flops(
    config: "DecoderConfig", prompt: int, generated: Sequence[int], *, prefix_cache: bool = True
) -> float:
    """FLOPs of the language model for samples of these lengths after one prompt (`models.cost`; no vision tower).

    Args:
      config: of the decoder.
      prompt: tokens, image tokens included.
      generated: tokens of each sample.
      prefix_cache: the prompt is read once for all samples.

    Raises:
      ValueError: no prompt, or a negative length.
    """
    return _flops(config, prompt, generated, prefix_cache)


def verifying_flops(
    config: "DecoderConfig",
    context: int,
    candidates: Sequence[int],
    *,
    verdict: int = 1,
    prefix_cache: bool = True,
) -> float:
    """FLOPs of the language model for a verdict on each candidate.

    Args:
      config: of the decoder.
      context: tokens before the candidate: question and images.
      candidates: tokens of each candidate with what is asked after it.
      verdict: generated tokens of a verdict; the first comes with the reading.
      prefix_cache: the context is read once for all candidates.

    Raises:
      ValueError: no context, a negative length, or `verdict` < 1.
    """
    if verdict < 1:
        raise ValueError(f"verdict: expected at least 1 token, got {verdict}")
    return _flops(config, context, [length + verdict - 1 for length in candidates], prefix_cache)


def _flops(config: "DecoderConfig", prefix: int, lengths: Sequence[int], prefix_cache: bool) -> float:
    from jaxlab.models.cost import forward_flops

    if prefix < 1 or any(length < 0 for length in lengths):
        raise ValueError(f"expected a prefix and lengths of at least 0, got {prefix} and {list(lengths)}")
    read = forward_flops(config, prefix).total * (1 if prefix_cache else len(lengths)) if lengths else 0.0
    return read + sum(forward_flops(config, prefix + length, start=prefix).total for length in lengths if length)
