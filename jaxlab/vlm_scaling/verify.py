"""Self-verification: how a verifier is asked, how its word is read, and how good it is.

    from jaxlab.vlm_scaling import verify
    verifier = verify.Verifier(reader, kind="binary_prob")
    scores = verifier.verify(question, samples, mode="blind+solution", seed=0)
    verify.metrics(scores, right).balanced_accuracy

What is shown is in `inputs` (`MODES`, `Controls`, `build`), what verdicts are worth in `verdicts`; both are here too.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from jaxlab.vlm_scaling.extract import answer_tag, boxed, strip_thinking
from jaxlab.vlm_scaling.inputs import MODES, PLACEHOLDERS, Controls, Mode, Request, build, check_blind
from jaxlab.vlm_scaling.samples import Question, Sample
from jaxlab.vlm_scaling.verdicts import VerdictMetrics, agreement, metrics

__all__ = [
    "MODES",
    "PLACEHOLDERS",
    "Controls",
    "Mode",
    "ProbabilityReader",
    "Request",
    "TextReader",
    "VerdictMetrics",
    "Verifier",
    "agreement",
    "build",
    "check_blind",
    "metrics",
    "parse_score",
    "parse_verdict",
    "yes_probability",
]


@runtime_checkable
class TextReader(Protocol):
    """A model that writes verdicts."""

    def texts(self, requests: Sequence[Request], *, seed: int) -> list[str]:
        """What it writes to each; different seeds give different texts."""
        ...


@runtime_checkable
class ProbabilityReader(Protocol):
    """A model that gives the probability of a yes."""

    def yes_probabilities(self, requests: Sequence[Request], *, seed: int) -> list[float]:
        """Its P(yes) / (P(yes) + P(no)) for the next token of each."""
        ...


class Verifier:
    """Judges samples by a model: the verifier of a `Study`.

    Equal requests are asked once, and answered from memory when they come again: an answer of a question in a mode that
    shows answers alone, a solution in the others.
    """

    def __init__(
        self,
        reader: TextReader | ProbabilityReader,
        *,
        kind: Literal["binary_prob", "binary_text", "score_text", "k_vote"] = "binary_prob",
        k: int = 8,
        controls: Controls | None = None,
    ):
        """Asks nothing yet.

        Args:
          reader: the model; with `yes_probabilities` for "binary_prob", with `texts` for the others.
          kind: "binary_prob": yes-probability; "binary_text": yes, no or None read from a text; "score_text": a grade
            from 1 to 10 read from a text, divided by 10; "k_vote": share of yes among `k` texts that could be read.
          k: texts a verdict, of "k_vote".
          controls: for the modes that need them.

        Raises:
          ValueError: an unknown kind, k < 1, or a reader without the method.
        """
        if kind not in ("binary_prob", "binary_text", "score_text", "k_vote"):
            raise ValueError(f"kind: expected one of binary_prob, binary_text, score_text, k_vote, got {kind!r}")
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        if not isinstance(reader, ProbabilityReader if kind == "binary_prob" else TextReader):
            needed = "yes_probabilities" if kind == "binary_prob" else "texts"
            raise ValueError(f"reader: expected one with `{needed}` for kind {kind!r}, got {reader!r}")
        self._reader: Any = reader
        self._kind, self._k, self._controls = kind, k, controls
        self._known: dict[tuple[str, str, str, int], bool | float | None] = {}

    def verify(
        self, question: Question, samples: Sequence[Sample], *, mode: str = "image+solution", seed: int = 0
    ) -> list[bool | float | None]:
        """A verdict or score a sample; None where it could not be read.

        Raises:
          ValueError: what `build` does not take.
        """
        requests = build(question, samples, mode=mode, controls=self._controls, score=self._kind == "score_text")
        keys = [(question.id, mode, request.text, seed) for request in requests]
        new = {key: request for key, request in zip(keys, requests) if key not in self._known}
        if new:
            self._known.update(zip(new, self._ask(list(new.values()), seed)))
        return [self._known[key] for key in keys]

    def _ask(self, requests: Sequence[Request], seed: int) -> list[bool | float | None]:
        if self._kind == "binary_prob":
            values = self._reader.yes_probabilities(requests, seed=seed)
            return [None if math.isnan(value) else float(value) for value in values]
        if self._kind == "score_text":
            grades = [parse_score(text) for text in self._reader.texts(requests, seed=seed)]
            return [None if grade is None else grade / 10 for grade in grades]
        if self._kind == "binary_text":
            return [parse_verdict(text) for text in self._reader.texts(requests, seed=seed)]
        rounds = [self._reader.texts(requests, seed=seed * self._k + round_) for round_ in range(self._k)]
        votes = [[vote for text in texts if (vote := parse_verdict(text)) is not None] for texts in zip(*rounds)]
        return [sum(each) / len(each) if each else None for each in votes]


def yes_probability(logits: Any, yes_ids: Sequence[int], no_ids: Sequence[int]) -> Any:
    """P(yes) / (P(yes) + P(no)), the probability mass of all spellings of both added up: sigmoid(lse_yes - lse_no).

    Args:
      logits: [..., V], of NumPy or JAX, or anything NumPy makes an array of.
      yes_ids: tokens that mean yes.
      no_ids: tokens that mean no.

    Returns:
      [...], float32 at least; a float for one vector of NumPy.

    Raises:
      ValueError: an empty set, one that holds a token of the other, or ids outside the vocabulary.
    """
    logits = logits if hasattr(logits, "__array_namespace__") else np.asarray(logits)
    size = logits.shape[-1]
    for name, ids in (("yes_ids", yes_ids), ("no_ids", no_ids)):
        if not len(ids):
            raise ValueError(f"{name}: expected at least one token, got none")
        if wrong := [int(token) for token in ids if not 0 <= token < size]:
            raise ValueError(f"{name}: expected ids below {size}, got {wrong}")
    if both := {int(token) for token in yes_ids} & {int(token) for token in no_ids}:
        raise ValueError(f"yes_ids and no_ids: expected different tokens, got {sorted(both)} in both")
    xp = logits.__array_namespace__()
    logits = logits.astype(xp.result_type(logits.dtype, xp.float32))

    def lse(ids: Sequence[int]) -> Any:
        chosen = xp.maximum(logits[..., xp.asarray(sorted({int(token) for token in ids}))], -1e30)  # may be masked
        most = chosen.max(axis=-1, keepdims=True)
        return xp.log(xp.exp(chosen - most).sum(axis=-1)) + most[..., 0]

    gap = xp.clip(lse(yes_ids) - lse(no_ids), -80.0, 80.0)
    return 1 / (1 + xp.exp(-gap))


_YES, _NO = ("yes", "correct", "true", "right"), ("no", "incorrect", "false", "wrong")
_WORDS = "|".join((*_YES, *_NO))
_FIRST = re.compile(
    rf"[\s*_#\"'(`]{{0,12}}+(?:({_WORDS})(?=[\s*_\"')`]{{0,12}}+(?:[.,;:!\n]|\Z))|(yes|no)\b)", re.IGNORECASE
)
_SAID = re.compile(
    rf"(?:\b(?:is|are|was|be)|:)[\s*_\"'(`]{{1,12}}+((?:not|never)\s{{1,4}}+)?(?:({'|'.join((*_YES[1:], *_NO[1:]))})\b"
    rf"(?!\s{{1,4}}+(?:angle|angled|triangle))|(yes|no)(?=[\s*_\"')`]{{0,12}}+(?:[.,;:!\n]|\Z)))",
    re.IGNORECASE,
)
_LAST = re.compile(r"\b(yes|no)[\s.*_\"')!]{0,12}\Z", re.IGNORECASE)
_GRADE = re.compile(r"(?<![\d.])(10|[1-9])(?![\d.]*\d)(?:\s{0,2}+/\s{0,2}+10)?")


def parse_verdict(text: str) -> bool | None:
    """Whether a verifier's text says yes; None where it cannot be read, which never counts as yes.

    Read after the thinking, in the first answer tag or the last box where there is one: a verdict as its first word,
    else the last statement ("... is not correct", "Verdict: yes"), else a closing yes or no.
    """
    rest = strip_thinking(text)
    if rest.startswith("<think>"):
        return None  # cut off
    rest = answer_tag(rest) or boxed(rest) or rest
    if first := _FIRST.match(rest):
        return (first[1] or first[2]).lower() in _YES
    said = None
    for match in _SAID.finditer(rest):
        said = ((match[2] or match[3]).lower() in _YES) != bool(match[1])
    if said is not None:
        return said
    last = _LAST.search(rest[-40:])
    return None if last is None else last[1].lower() in _YES


def parse_score(text: str) -> int | None:
    """The grade from 1 to 10 in a verifier's text, the last one outside its thinking; None where there is none."""
    rest = strip_thinking(text)
    grades = _GRADE.findall(answer_tag(rest) or boxed(rest) or rest)
    return int(grades[-1]) if grades else None
