"""What a verifier is shown: four inputs, and controls that tell what a verdict depends on.

With and without the images, the full solution or its answer alone, always with the question. "Blind" means no images
and no placeholders; zero pixels are a control of their own.
"""

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxlab.vlm_scaling import images
from jaxlab.vlm_scaling.extract import extract
from jaxlab.vlm_scaling.samples import Question, Sample

PLACEHOLDERS = ("<image>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<image_soft_token>", "<|image|>")
"""Texts that stand for an image in prompts."""


@dataclasses.dataclass(frozen=True)
class Mode:
    """What a verifier is shown.

    Attributes:
      image: "own", "none" (blind), "wrong" (another question's), "grey" or "zero" pixels.
      answer_only: of the candidate its answer, not the solution.
      shuffled: the candidate is one of another question.
    """

    image: Literal["own", "none", "wrong", "grey", "zero"] = "own"
    answer_only: bool = False
    shuffled: bool = False


MODES: Mapping[str, Mode] = {
    "image+solution": Mode(),
    "image+answer": Mode(answer_only=True),
    "blind+solution": Mode("none"),
    "blind+answer": Mode("none", answer_only=True),
    "wrong+solution": Mode("wrong"),
    "grey+solution": Mode("grey"),
    "zero+solution": Mode("zero"),
    "shuffled+solution": Mode(shuffled=True),
}
"""The four inputs, and the controls."""

_SOLUTION = (
    "{question}\n\nProposed solution:\n{shown}\n\n"
    "Is the final answer of the proposed solution correct? Answer with Yes or No only."
)
_ANSWER = "{question}\n\nProposed answer: {shown}\n\nIs the proposed answer correct? Answer with Yes or No only."
_SCORE = "Rate from 1 to 10 how likely it is that the {thing} is correct. Answer with the number only."


@dataclasses.dataclass(frozen=True)
class Request:
    """One thing asked of a verifier.

    Attributes:
      text: the prompt.
      images: before it; none in a blind mode.
      mode: its name.
    """

    text: str
    images: tuple[Any, ...]
    mode: str


class Controls:
    """Whose image and whose candidate stand in for a question's own, permuted once for a whole study."""

    def __init__(
        self,
        questions: Sequence[Question],
        candidates: Mapping[str, Sequence[Sample]] | None = None,
        *,
        seed: int = 0,
    ):
        """Draws the permutation.

        Args:
          questions: of the study; the drawing does not depend on their order.
          candidates: question id -> samples, for the shuffled control.
          seed: of the permutation.

        Raises:
          ValueError: a question has no other one with different images.
        """
        ordered = sorted(questions, key=lambda question: question.id)
        random.Random(seed).shuffle(ordered)
        labels = [images.label(question.images) for question in ordered]
        self._other: dict[str, Question] = {}
        for place, question in enumerate(ordered):
            for step in range(1, len(ordered)):
                at = (place + step) % len(ordered)
                if labels[at] != labels[place]:
                    self._other[question.id] = ordered[at]
                    break
            else:
                raise ValueError(f"questions: expected another one with different images for {question.id!r}, got none")
        self._candidates = candidates or {}

    def images(self, question: Question) -> tuple[Any, ...]:
        """Those of the other question."""
        return self._other[question.id].images

    def candidates(self, question: Question, count: int) -> list[Sample]:
        """The first samples of the other question, over and over if it has fewer.

        Raises:
          ValueError: it has none.
        """
        other = self._candidates.get(self._other[question.id].id, ())
        if not other:
            raise ValueError(f"candidates: expected samples of {self._other[question.id].id!r}, got none")
        return [other[index % len(other)] for index in range(count)]


def build(
    question: Question,
    samples: Sequence[Sample],
    *,
    mode: str = "image+solution",
    controls: Controls | None = None,
    score: bool = False,
) -> list[Request]:
    """What a verifier is asked about samples, one request each.

    Args:
      question: theirs.
      samples: candidates.
      mode: a name in `MODES`.
      controls: needed by "wrong+solution" and "shuffled+solution".
      score: ask for a grade from 1 to 10 instead of yes or no.

    Raises:
      ValueError: an unknown mode, or one that needs `controls`.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    shown = MODES[mode]
    if shown.image == "wrong" or shown.shuffled:
        if controls is None:
            raise ValueError(f"controls: expected them for mode {mode!r}, got None")
        if shown.shuffled:
            samples = controls.candidates(question, len(samples))
    text, pictures = question.text, question.images
    if shown.image == "none":
        text, pictures = without_placeholders(text), ()
    elif shown.image == "wrong" and controls is not None:
        pictures = controls.images(question)
    elif shown.image in ("grey", "zero"):
        pictures = tuple(images.uniform(image, 128 if shown.image == "grey" else 0) for image in pictures)
    template = _ANSWER if shown.answer_only else _SOLUTION
    if score:
        thing = "proposed answer" if shown.answer_only else "final answer of the proposed solution"
        template = template.rpartition("\n\n")[0] + "\n\n" + _SCORE.format(thing=thing)
    requests = []
    for sample in samples:
        what = extract(sample.text, choices=question.choices).value if shown.answer_only else sample.text
        if shown.image == "none":
            what = without_placeholders(what or "")
        requests.append(Request(filled(template, question=text, shown=what or "(none)"), pictures, mode))
    return requests


def filled(template: str, **values: str) -> str:
    """A template with its `{name}` places filled all at once: what is put in is no template."""
    pieces = re.split(r"\{(\w+)\}", template)
    return "".join(values[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def check_blind(prompt: str | Sequence[int], image_tokens: Sequence[int] = ()) -> None:
    """Makes sure that a blind prompt holds no place for an image.

    Args:
      prompt: text, or token ids.
      image_tokens: ids that stand for images.

    Raises:
      ValueError: it does.
    """
    if isinstance(prompt, str):
        found = [mark for mark in PLACEHOLDERS if mark in prompt]
    else:
        found = sorted(set(map(int, prompt)) & set(map(int, image_tokens)))
    if found:
        raise ValueError(f"prompt: expected no image tokens in a blind mode, got {found}")


def without_placeholders(text: str) -> str:
    """A text without what stands for images."""
    for mark in PLACEHOLDERS:
        text = text.replace(mark, "")
    return text.lstrip("\n")
