"""Samples and verdicts of a model behind an OpenAI-compatible endpoint; images go as data URLs.

    from jaxlab.inference import Client
    from jaxlab.vlm_scaling import endpoint, verify
    with Client("http://localhost:8000/v1", model="qwen") as client:
        sampler = endpoint.EndpointSampler(client, temperature=0.8)
        verifier = verify.Verifier(endpoint.EndpointReader(client))

Requests run side by side, as many as the client allows.
"""

import concurrent.futures
import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from jaxlab.inference.client import Client
from jaxlab.inference.endpoint import Completion
from jaxlab.vlm_scaling import images
from jaxlab.vlm_scaling.inputs import MODES, Request, check_blind, without_placeholders
from jaxlab.vlm_scaling.samples import Question, Sample

I = TypeVar("I")
O = TypeVar("O")

_AT_ONCE = 64  # threads; the client holds back what exceeds its own limit


class EndpointSampler:
    """Draws samples over chat completions: all that strategies ask of a sampler."""

    def __init__(
        self,
        client: Client,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 1024,
        system: str | None = None,
        instruction: str = "",
        allow_duplicates: bool = False,
        logprobs: bool = False,
    ):
        """Asks nothing yet.

        Args:
          client: of the endpoint.
          temperature: of the samples.
          top_p: nucleus of the samples.
          max_tokens: of a sample.
          system: message that comes first.
          instruction: put after each question, such as what to put the answer in.
          allow_duplicates: at temperature 0 several samples of a question may be asked for, with a warning.
          logprobs: ask for log-probabilities of the tokens, for the mean in `Sample.logprob`.

        Raises:
          ValueError: a temperature below 0, or `top_p` outside (0, 1].
        """
        if not temperature >= 0:
            raise ValueError(f"temperature: expected at least 0, got {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected a value in (0, 1], got {top_p}")
        self._client, self._temperature, self._allow_duplicates = client, temperature, allow_duplicates
        self._options: dict[str, Any] = {"top_p": top_p, "max_tokens": max_tokens, "logprobs": logprobs or None}
        self._system, self._instruction = system, instruction

    def sample(self, question: Question, indices: Sequence[int], *, seed: int) -> list[Sample]:
        """Samples of these indices, a request each, with a seed made of `seed` and the index.

        Raises:
          ValueError: several at temperature 0.
          EndpointError: the endpoint cannot be used, after its retries.
        """
        if self._temperature == 0 and any(indices):
            message = f"temperature: expected above 0 for several samples, got 0 and the indices {list(indices)}"
            if not self._allow_duplicates:
                raise ValueError(message)
            warnings.warn(f"{message}; they will be the same", RuntimeWarning, stacklevel=2)
        messages = self._messages(question, question.text)
        return _side_by_side(lambda index: self._ask(messages, _seed(seed, index)), indices)

    def greedy(self, question: Question) -> Sample:
        """The sample at temperature 0."""
        return self._ask(self._messages(question, question.text), 0, temperature=0.0)

    def ask(self, question: Question, prompt: str, *, seed: int) -> Sample:
        """The answer to another prompt about the same images."""
        return self._ask(self._messages(question, prompt), seed)

    def extend(
        self, question: Question, prefixes: Sequence[str], *, seed: int, max_tokens: int | None = None, stop: str = ""
    ) -> list[Sample]:
        """What follows begun answers; the endpoint must know `continue_final_message`, as vLLM and SGLang do."""
        messages = self._messages(question, question.text)
        options: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
        options["stop"] = [stop] if stop else None
        if max_tokens is not None:
            options["max_tokens"] = max_tokens

        def go_on(prefix: str) -> Sample:
            return self._ask([*messages, {"role": "assistant", "content": prefix}], seed, **options)

        return _side_by_side(go_on, prefixes)

    def _messages(self, question: Question, text: str) -> list[dict[str, Any]]:
        shown = f"{text}\n\n{self._instruction}" if self._instruction else text
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, {"role": "user", "content": content(shown, question.images)}]

    def _ask(self, messages: Sequence[dict[str, Any]], seed: int, **options: Any) -> Sample:
        options = {"temperature": self._temperature, **self._options, **options, "seed": seed}
        answer = self._client.chat(messages, **options)
        return Sample(answer.text, _generated(answer), _mean_logprob(answer))


class EndpointReader:
    """Reads a verifier's requests over chat completions: a `verify.TextReader` and `verify.ProbabilityReader`."""

    def __init__(
        self,
        client: Client,
        *,
        temperature: float = 0.0,
        max_tokens: int = 256,
        yes: Sequence[str] = ("yes",),
        no: Sequence[str] = ("no",),
        top_logprobs: int = 20,
    ):
        """Asks nothing yet.

        Args:
          client: of the endpoint.
          temperature: of written verdicts; above 0 for `kind="k_vote"`.
          max_tokens: of a written verdict.
          yes: what counts as yes among the likeliest first tokens, blanks and case aside.
          no: what counts as no.
          top_logprobs: how many of those are looked at; endpoints allow 20.

        Raises:
          ValueError: a temperature below 0, or no spelling of yes or of no.
        """
        if not temperature >= 0:
            raise ValueError(f"temperature: expected at least 0, got {temperature}")
        if not yes or not no:
            raise ValueError(f"yes and no: expected at least one spelling each, got {list(yes)} and {list(no)}")
        self._client, self._temperature, self._max_tokens = client, temperature, max_tokens
        self._yes, self._no, self._top = {text.lower() for text in yes}, {text.lower() for text in no}, top_logprobs

    def texts(self, requests: Sequence[Request], *, seed: int) -> list[str]:
        """What the model writes."""

        def ask(request: Request) -> str:
            options = {"temperature": self._temperature, "max_tokens": self._max_tokens, "seed": seed}
            return self._client.chat(_verification(request), **options).text

        return _side_by_side(ask, requests)

    def yes_probabilities(self, requests: Sequence[Request], *, seed: int) -> list[float]:
        """P(yes) / (P(yes) + P(no)) for the first token; NaN where neither is among the likeliest."""

        def ask(request: Request) -> float:
            options = {"max_tokens": 1, "logprobs": True, "top_logprobs": self._top, "temperature": 0.0, "seed": seed}
            tokens = self._client.chat(_verification(request), **options).choices[0].logprobs
            top = tokens[0].top if tokens else {}
            mass = [sum(math.exp(p) for token, p in top.items() if token.strip().lower() in words) for words in known]
            return mass[0] / sum(mass) if sum(mass) else math.nan

        known = (self._yes, self._no)
        return _side_by_side(ask, requests)


def content(text: str, pictures: Sequence[Any]) -> list[dict[str, Any]]:
    """A message's content: images as data URLs, then the text without its placeholders."""
    shown = [{"type": "image_url", "image_url": {"url": images.data_url(picture)}} for picture in pictures]
    return [*shown, {"type": "text", "text": without_placeholders(text)}]


def _verification(request: Request) -> list[dict[str, Any]]:
    if MODES[request.mode].image == "none":
        check_blind(request.text)
    return [{"role": "user", "content": content(request.text, request.images)}]


def _generated(answer: Completion) -> int:
    return int(answer.usage.get("completion_tokens") or len(answer.choices[0].logprobs or ()))


def _mean_logprob(answer: Completion) -> float:
    values = [token.logprob for token in answer.choices[0].logprobs or ()]
    return sum(values) / len(values) if values else 0.0


def _seed(seed: int, index: int) -> int:
    return zlib.crc32(f"{seed} {index}".encode()) >> 1


def _side_by_side(function: Callable[[I], O], items: Iterable[I]) -> list[O]:
    items = list(items)
    with concurrent.futures.ThreadPoolExecutor(max(1, min(_AT_ONCE, len(items)))) as pool:
        return list(pool.map(function, items))
