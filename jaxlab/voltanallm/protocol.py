"""What may be asked of the server, as OpenAI's API has it: requests, checked when read, and the errors that answer."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field

from jaxlab.inference.params import SamplingParams

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_INT32 = 2**31 - 1

# Fields that would change the answer and are not supported, with the values that change nothing. All others that are
# not known (user, metadata, store, ...) are left unread.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (None,),
    "audio": (None,),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "ignore_eos": (None, False),
    "length_penalty": (None, 1),
    "logit_bias": (None, {}),
    "min_tokens": (None, 0),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "prompt_embeds": (None,),
    "reasoning_effort": (None, "none"),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
      status: of HTTP.
      headers: sent along.
      body: OpenAI's error object.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @classmethod
    def bad_value(cls, error: Exception) -> "ApiError":
        """400 for a complaint of the library, whose messages start with the argument's name."""
        named = re.match(r"(\w+)[^:]{0,40}: ", str(error))
        return cls(400, str(error), param=named and {"prompts": "prompt"}.get(named[1], named[1]))


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="allow")

    def check(self) -> None:
        """Raises `ApiError` 400 for what the types do not forbid."""


R = TypeVar("R", bound=_Strict)


class StreamOptions(_Strict):
    """How a stream is sent: `include_usage` adds a last piece that counts tokens."""

    include_usage: bool | None = None


class _Generation(_Strict):
    """What both kinds of request share; null stands for the default everywhere."""

    model: str
    n: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=1024)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=16, fail_fast=True)]
        | None
    ) = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0, le=_INT32)]], Field(max_length=256, fail_fast=True)] | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT32)] | None = None
    min_p: float | None = None
    max_tokens: Annotated[int, Field(ge=0, le=_INT32)] | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def counts_usage(self) -> bool:
        """Whether a stream ends with a piece that counts tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check(self) -> None:
        """Raises `ApiError` 400 for what the types do not forbid."""
        for name, neutral in _NEUTRAL.items():
            value = (self.model_extra or {}).get(name)
            if value not in neutral and not (name == "best_of" and value == self.choices):
                message = f"{name}: is not supported by this server"
                raise ApiError(400, message, param=name, code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: expected stream to be true", param="stream_options")

    def sampling(self, choice: int, max_tokens: int, stop_ids: Sequence[int], alternatives: int) -> SamplingParams:
        """How one answer is sampled; with a seed, each of n answers has the next one.

        Raises:
          ApiError: 400, a value out of range.
        """
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=max(0, self.top_k or 0),
                top_p=1.0 if self.top_p is None else self.top_p,
                min_p=self.min_p or 0.0,
                stop_ids=(*(self.stop_token_ids or ()), *stop_ids),
                # Seeds wrap, as the largest has a next one too.
                seed=None if self.seed is None else (self.seed + choice + 2**63) % 2**64 - 2**63,
                logprobs=alternatives,
            )
        except (ValueError, TypeError) as error:
            raise ApiError.bad_value(error) from None


class CompletionRequest(_Generation):
    """POST /v1/completions: `prompt` is a text, ids, or a list of either."""

    prompt: Any
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or ids.

        Raises:
          ApiError: 400, it is something else, or empty.
        """
        given: list[Any] = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if given and all(map(_is_id, given)):
            given = [given]
        texts = all(isinstance(each, str) for each in given)
        ids = all(isinstance(each, list) and all(map(_is_id, each)) for each in given)
        if not (texts or ids):
            raise ApiError(400, "prompt: expected a string, token ids, or a list of either", param="prompt")
        if not given or not all(given):
            raise ApiError(400, "prompt: expected at least one token, got none", param="prompt")
        return given

    @property
    def wants_logprobs(self) -> bool:
        """Whether tokens are told with their log-probabilities."""
        return self.logprobs is not None

    @property
    def alternatives(self) -> int:
        """How many likely tokens are told in each place."""
        return self.logprobs or 0

    @property
    def limit(self) -> int | None:
        """Tokens of an answer at most; OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    def check(self) -> None:
        """Raises `ApiError` 400 for what the types do not forbid."""
        super().check()
        if self.echo and self.wants_logprobs:
            raise ApiError(400, "echo: log-probabilities of a prompt are not supported", param="echo")


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _INT32


class Part(_Strict):
    """A part of a message; only text is read."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)]

    def plain(self) -> dict[str, str]:
        """As chat templates read it; what OpenAI calls developer is system there."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether tokens are told with their log-probabilities."""
        return bool(self.logprobs)

    @property
    def alternatives(self) -> int:
        """How many likely tokens are told in each place."""
        return self.top_logprobs or 0

    @property
    def limit(self) -> int | None:
        """Tokens of an answer at most; None: what the context has room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        """Raises `ApiError` 400 for what the types do not forbid."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: expected logprobs to be true", param="top_logprobs")
        for message in self.messages:
            if (message.model_extra or {}).get("tool_calls") or (message.model_extra or {}).get("function_call"):
                raise ApiError(400, "tools: are not supported by this server", param="tools")


class FrequencyRequest(_Strict):
    """POST /control/freq.

    `set` pins the clock to `freq_mhz`, `unset` leaves it to the GPU, `auto` to the controller, and `slo` changes the
    controller's objective to `slo_ms`; of one `worker`, or of all.
    """

    mode: Literal["set", "unset", "auto", "slo"]
    freq_mhz: int | None = None
    slo_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    worker: str | int | None = None

    def check(self) -> None:
        """Raises `ApiError` 400 where a mode lacks its value."""
        for mode, name in (("set", "freq_mhz"), ("slo", "slo_ms")):
            if self.mode == mode and getattr(self, name) is None:
                raise ApiError(400, f"{name}: expected a number with mode {mode!r}, got none", param=name)


def read(kind: type[R], body: bytes) -> R:
    """A request's body.

    Raises:
      ApiError: 400, it is no JSON, or not such a request.
    """
    try:
        request = kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        param = str(first["loc"][0]) if first["loc"] else None
        raise ApiError(400, f"{place}: {first['msg']}" if place else first["msg"], param=param) from None
    request.check()
    return request
