"""What an OpenAI-compatible endpoint answers: whole, in pieces, or with an error."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

SHOWN = 300  # characters of an answer's body in an error


class EndpointError(RuntimeError):
    """An endpoint could not be used: it refused, answered nonsense, or was not to be reached, retries included.

    Attributes:
      status: of the last HTTP answer; None where there was none.
      attempts: how often it was tried.
      partial: text that a stream had brought before it broke.
    """

    def __init__(self, message: str, *, status: int | None = None, attempts: int = 1, partial: str = ""):
        super().__init__(message)
        self.status, self.attempts, self.partial = status, attempts, partial


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer, its log-probability, and those of the most likely tokens in its place."""

    token: str
    logprob: float
    top: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One answer: its text, why it ended ("stop", "length", ...), and its tokens' probabilities where asked for."""

    text: str
    finish_reason: str | None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """What an endpoint answered.

    Attributes:
      choices: the answers, in the order of their index.
      usage: token counts as the endpoint reports them.
      raw: its whole answer.
    """

    choices: tuple[Choice, ...]
    usage: Mapping[str, Any]
    raw: Mapping[str, Any] = dataclasses.field(repr=False)

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.choices[0].text


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a stream: new text of one choice, and why it ended where it did."""

    text: str
    index: int = 0
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


def without_password(url: str) -> str:
    """An address as messages and logs may have it: a name and password before the host are left out."""
    return re.sub(r"//[^/?#]*@", "//", url)


def error_text(text: str) -> str:
    """What an error's body says."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:SHOWN]
    except (ValueError, KeyError, TypeError, RecursionError):
        return text[:SHOWN].strip()


def read_completion(answer: Mapping[str, Any], url: str) -> Completion:
    """A whole answer.

    Raises:
      EndpointError: it is not one.
    """
    try:
        choices = sorted(answer["choices"], key=_index)
        made = tuple(
            Choice(_text(choice, "message"), _reason(choice), _logprobs(choice.get("logprobs"))) for choice in choices
        )
        usage = dict(answer.get("usage") or {})
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise EndpointError(f"{url}: expected an answer with choices, got {str(answer)[:SHOWN]}", status=200) from error
    if not made:
        raise EndpointError(f"{url}: expected at least one choice, got none", status=200)
    return Completion(made, usage, answer)


def read_pieces(data: str, fail: Callable[[str], EndpointError]) -> Iterator[Piece]:
    """The pieces in one event of a stream; what `fail` makes of the reason is raised where there are none."""
    try:
        event = json.loads(data)
        if "error" in event:
            raise fail(f"the stream broke: {error_text(data)}")
        for choice in event["choices"]:
            yield Piece(_text(choice, "delta"), _index(choice), _reason(choice), _logprobs(choice.get("logprobs")))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise fail(f"expected a piece of a stream, got {data[:SHOWN]!r}") from error


def _text(choice: Mapping[str, Any], part: str) -> str:
    return _of_type(str, (choice[part].get("content") if part in choice else choice["text"]) or "")


def _reason(choice: Mapping[str, Any]) -> str | None:
    return _of_type(str | None, choice.get("finish_reason"))


def _index(choice: Mapping[str, Any]) -> int:
    return _of_type(int, choice.get("index", 0))


def _of_type(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind}, got {value!r}"[:SHOWN])
    return value


def _logprobs(given: Mapping[str, Any] | None) -> tuple[TokenLogprob, ...] | None:
    """Log-probabilities in the form of chat (a list of contents) or of completions (parallel lists)."""
    if not given:
        return None
    if given.get("content") is not None:
        return tuple(
            TokenLogprob(
                _of_type(str, each["token"]),
                float(each["logprob"]),
                {_of_type(str, top["token"]): float(top["logprob"]) for top in each.get("top_logprobs") or ()},
            )
            for each in given["content"]
        )
    tokens, values = given.get("tokens") or (), given.get("token_logprobs") or ()
    tops = given.get("top_logprobs") or [{}] * len(tokens)
    known = (value if value is not None else float("nan") for value in values)  # the first token of an echo has none
    return tuple(
        TokenLogprob(_of_type(str, token), float(value), {str(name): float(p) for name, p in dict(top or {}).items()})
        for token, value, top in zip(tokens, known, tops)
    )
