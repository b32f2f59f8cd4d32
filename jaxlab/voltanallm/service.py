"""From a request of OpenAI's API to an engine's requests, and from their tokens to its answer."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from jaxlab.inference.params import SamplingParams
from jaxlab.voltanallm.answers import Answer, Choice, GrowingText, event
from jaxlab.voltanallm.engine_loop import EngineLoop, Overloaded, Submission, Unavailable
from jaxlab.voltanallm.limits import Limits
from jaxlab.voltanallm.protocol import ApiError, ChatRequest, CompletionRequest
from jaxlab.voltanallm.telemetry import Telemetry

_LONG = 2**16  # characters from which text is read on another thread, so that others' streams go on


@dataclasses.dataclass
class Job:
    """A request under way: the engine's part of it, and its answers as far as they have come.

    Attributes:
      submission: the engine's requests, one for each choice.
      choices: in order; the answers to one prompt are adjacent.
      answer: makes the objects.
    """

    submission: Submission
    choices: list[Choice]
    answer: Answer


class Service:
    """Answers requests with an engine.

    Args:
      loop: of the engine.
      model_name: the one model there is.
      tokenizer: None: prompts are ids, and so is text.
      room: tokens of prompt and answer that a request may have.
      limits: what one client may take.
      telemetry: is told what happens.
    """

    def __init__(
        self,
        loop: EngineLoop,
        *,
        model_name: str,
        tokenizer: Any,
        room: int,
        limits: Limits,
        telemetry: Telemetry,
    ):
        self.loop, self.model_name, self.limits = loop, model_name, limits
        self.created = int(time.time())
        self._tokenizer, self._room, self._telemetry = tokenizer, room, telemetry
        eos = None if tokenizer is None else tokenizer.eos_token_id
        self._eos = () if eos is None else (int(eos),)

    def check_model(self, name: str) -> None:
        """Raises `ApiError` 404 for a model that is not the one there is."""
        if name != self.model_name:
            message = f"model: expected {self.model_name!r}, got {name[:200]!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def submit(self, request: CompletionRequest | ChatRequest) -> Job:
        """Hands a request to the engine.

        Raises:
          ApiError: it asks for what is not there (400, 404), or the server has no room (429) or no engine (503) for it.
        """
        arrived = time.monotonic()
        self.check_model(request.model)
        if self._tokenizer is None and (request.stop_strings or isinstance(request, ChatRequest)):
            param = "stop" if request.stop_strings else "messages"
            raise ApiError(400, f"{param}: this server has no tokenizer and takes prompts of ids only", param=param)
        prompts = await self._prompts(request)
        answers, most = len(prompts) * request.choices, self.limits.answers
        if answers > most:
            message = f"n: expected prompts times n to be at most {most}, got {len(prompts)} times {request.choices}"
            raise ApiError(400, message, param="n")
        wanted = [(ids, self._sampling(request, ids, choice)) for ids in prompts for choice in range(request.choices)]
        heard: dict[int, float] = {}

        def observe(index: int, when: float, output: Any) -> None:
            if output.new_token_ids:
                took = when - heard.get(index, arrived)
                self._telemetry.tokens(len(output.new_token_ids), took, when, first=index not in heard)
                heard[index] = when

        try:
            # Who waits for the whole is woken at its end, unless the text may end it earlier.
            eager = bool(request.stream or request.stop_strings)
            submission = await self.loop.submit(wanted, eager=eager, observe=observe)
        except (ValueError, TypeError) as error:
            raise ApiError.bad_value(error) from None
        except (Overloaded, Unavailable) as error:
            raise refusal(error) from None
        except asyncio.CancelledError:
            self._telemetry.ended("cancelled", len(wanted))
            raise
        answer = Answer(
            self.model_name,
            chat=isinstance(request, ChatRequest),
            tokenizer=self._tokenizer,
            logprobs=request.wants_logprobs,
            counts_usage=request.counts_usage,
            prompt_tokens=sum(map(len, prompts)),
        )
        stop_ids = (*(request.stop_token_ids or ()), *self._eos)
        echo = isinstance(request, CompletionRequest) and bool(request.echo)
        choices = []
        for index, (ids, _) in enumerate(wanted):
            text = GrowingText(
                self._tokenizer, request.stop_strings, stop_ids, eager=bool(request.stream), continues=echo
            )
            choices.append(Choice(index, text, request.wants_logprobs, [self._text(ids)] if echo else []))
        self._telemetry.prompt_tokens(sum(len(ids) for ids, _ in wanted))
        return Job(submission, choices, answer)

    async def whole(self, job: Job) -> dict[str, Any]:
        """The whole answer.

        Raises:
          ApiError: 503, the engine is lost or too slow.
        """
        async for _ in self._run(job):
            pass
        return job.answer.whole(job.choices)

    async def stream(self, job: Job) -> AsyncIterator[bytes]:
        """The answer as server-sent events, one or more at a time; trouble after the first is an event too.

        Raises:
          ApiError: 503, the engine is lost before anything has come.
        """
        opened: set[int] = set()
        try:
            async for choice in self._run(job):
                sent = b"" if choice.index in opened else job.answer.first(choice)
                opened.add(choice.index)
                sent += job.answer.piece(choice)
                if sent:
                    yield sent
        except ApiError as error:
            if not opened:
                raise
            yield event(error.body)
            return
        yield job.answer.last(job.choices)

    def give_up(self, job: Job, outcome: str = "cancelled") -> None:
        """Ends what is left of a job, whose client has gone or been given up; nothing where all has ended."""
        left = sum(choice.finish_reason is None for choice in job.choices)
        for choice in job.choices:
            choice.finish_reason = choice.finish_reason or "abort"
        self._telemetry.ended(outcome, left)
        self.loop.abort(job.submission)

    async def _run(self, job: Job) -> AsyncIterator[Choice]:
        """Takes what the engine brings; gives each choice that has grown."""
        deadline = asyncio.get_running_loop().time() + self.limits.answer_s
        try:
            async for index, _, output in job.submission.outputs(deadline):
                choice = job.choices[index]
                if choice.take(output):
                    self.loop.abort(job.submission, index)
                if choice.finish_reason is not None:
                    self._telemetry.ended(choice.finish_reason)
                yield choice
        except Unavailable as error:
            self.give_up(job, "failed")
            raise refusal(error) from None
        except TimeoutError:
            self.give_up(job, "failed")
            raise ApiError(503, f"no answer within {self.limits.answer_s:g} s", code="timeout") from None

    def _sampling(self, request: CompletionRequest | ChatRequest, ids: Sequence[int], choice: int) -> SamplingParams:
        limit = request.limit
        if limit is None:
            limit = max(1, self._room - len(ids))
        return request.sampling(choice, limit, self._eos, request.alternatives)

    async def _prompts(self, request: CompletionRequest | ChatRequest) -> list[list[int]]:
        """The prompts as ids."""
        if isinstance(request, ChatRequest):
            texts: Sequence[str | list[int]] = [self._conversation(request)]
        else:
            texts = request.prompts
        if any(isinstance(text, str) for text in texts) and self._tokenizer is None:
            raise ApiError(400, "prompt: this server has no tokenizer; expected token ids, got text", param="prompt")
        special = not isinstance(request, ChatRequest)  # a template writes its own

        def ids(text: str | list[int]) -> list[int]:
            if not isinstance(text, str):
                return text
            return self._tokenizer.encode(text) if special else encode_plain(self._tokenizer, text)

        def all_ids() -> list[list[int]]:
            return [ids(text) for text in texts]

        long = sum(map(len, texts)) > _LONG
        return await asyncio.to_thread(all_ids) if long else all_ids()

    def _conversation(self, request: ChatRequest) -> str:
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise ApiError(400, "messages: this model has no chat template; use /v1/completions", param="messages")
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                [message.plain() for message in request.messages], add_generation_prompt=True, tokenize=False
            )
        except (ValueError, TypeError, TemplateError) as error:
            raise ApiError(400, f"messages: {error}", param="messages") from None

    def _text(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids)) if self._tokenizer is None else self._tokenizer.decode(ids)


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without the special tokens that a tokenizer may add; some add none and do not know the argument."""
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except TypeError:
        return tokenizer.encode(text)


def refusal(error: Exception) -> ApiError:
    """The answer to a request that there is no room or no engine for."""
    if isinstance(error, Overloaded):
        return ApiError(429, str(error), code="overloaded", headers={"Retry-After": "1"})
    return ApiError(503, str(error), code="engine_unavailable", headers={"Retry-After": "1"})
