"""A load generator: replays a trace against an OpenAI-compatible endpoint and holds the answers to the objectives."""

import asyncio
import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlab import core
from jaxlab.core import jsonl
from jaxlab.inference.client import AsyncClient
from jaxlab.inference.endpoint import EndpointError
from jaxlab.voltanallm.sim.traces import Trace


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one request of a load test met.

    Attributes:
      index: in the trace.
      sent_s: when it was sent, from the test's start.
      prompt_tokens: sent.
      output_tokens: asked for.
      piece_s: when each piece of the stream came, from the test's start. A piece is a token, but for those that end
        inside a character or may begin a stop string.
      error: why it failed; empty if it did not.
    """

    index: int
    sent_s: float
    prompt_tokens: int
    output_tokens: int
    piece_s: tuple[float, ...]
    error: str = ""


@dataclasses.dataclass(frozen=True)
class LoadResult:
    """A load test. Failed requests miss every objective.

    Attributes:
      answers: in the order of the trace.
      duration_s: from the first request to the last answer.
    """

    answers: tuple[Answer, ...]
    duration_s: float

    @property
    def failed(self) -> int:
        """Requests without a whole answer."""
        return sum(bool(answer.error) for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        """Pieces received a second."""
        return sum(len(answer.piece_s) for answer in self.answers) / self.duration_s if self.duration_s else 0.0

    def ttft_ms(self) -> np.ndarray:
        """[N] time to the first piece, infinite for failed requests."""
        return np.array([1000 * (a.piece_s[0] - a.sent_s) if not a.error else np.inf for a in self.answers])

    def itl_ms(self) -> np.ndarray:
        """[N] mean time between pieces, infinite for failed requests, NaN for answers of one piece."""
        return np.array([_mean_gap(answer) for answer in self.answers])

    def gaps_ms(self) -> np.ndarray:
        """All times between two pieces of an answer, failed requests' too."""
        gaps = [1000 * np.diff(answer.piece_s) for answer in self.answers if len(answer.piece_s) > 1]
        return np.concatenate(gaps) if gaps else np.zeros(0)

    def attainment(self, ttft_slo_ms: float, itl_slo_ms: float) -> tuple[float, float]:
        """Shares of requests whose first piece, and whose mean time between pieces, are within the objectives."""
        itl = self.itl_ms()
        judged = itl[~np.isnan(itl)]
        within = float(np.mean(judged <= itl_slo_ms)) if judged.size else 1.0
        return float(np.mean(self.ttft_ms() <= ttft_slo_ms)), within

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one line an answer over what the file had."""
        if os.path.exists(path):
            os.remove(path)
        for answer in self.answers:
            jsonl.append(path, dataclasses.asdict(answer))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LoadResult":
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is something else.
        """
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: expected the answers of a load test")
        rows = jsonl.read(path)
        try:
            answers = tuple(_answer(**row) for row in rows)
            return cls(answers, max((max(a.piece_s, default=a.sent_s) for a in answers), default=0.0))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected the answers of a load test, got {str(rows[:1])[:100]}") from error


def _answer(piece_s: Sequence[float], sent_s: float, **fields: Any) -> Answer:
    return Answer(piece_s=tuple(map(float, piece_s)), sent_s=float(sent_s), **fields)


def _mean_gap(answer: Answer) -> float:
    if answer.error:
        return np.inf
    if len(answer.piece_s) < 2:
        return np.nan
    return 1000 * (answer.piece_s[-1] - answer.piece_s[0]) / (len(answer.piece_s) - 1)


def replay(
    base_url: str,
    trace: Trace,
    *,
    model: str,
    vocab_size: int,
    api_key: str | None = None,
    options: dict[str, Any] | None = None,
    timeout_s: float = 120.0,
    seed: int = 0,
) -> LoadResult:
    """Sends the requests of a trace at their times, as token ids drawn at random, and listens to their streams.

    Nothing is tried twice, so that a refusal is told as one.

    Args:
      base_url: up to and with the version.
      trace: when, how long, and how many tokens are asked for.
      model: the name to ask for.
      vocab_size: of the model; ids are drawn below it.
      api_key: sent as a bearer token.
      options: of the requests, over `max_tokens` and temperature 0.
      timeout_s: for an answer's next piece.
      seed: of the ids.

    Raises:
      MissingExtra: httpx is not installed.
      ValueError: not an HTTP address, or a vocabulary without ids.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size: expected at least 1, got {vocab_size}")
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(vocab_size, size=length).tolist() for length in trace.prompt_tokens]
    client = {"model": model, "api_key": api_key, "max_retries": 0, "concurrency": len(trace), "stall_s": timeout_s}
    return asyncio.run(_replay(base_url, trace, prompts, client, options or {}))


async def _replay(
    base_url: str, trace: Trace, prompts: Sequence[list[int]], client: dict[str, Any], options: dict[str, Any]
) -> LoadResult:
    async with AsyncClient(base_url, **client) as endpoint:
        start = time.perf_counter()

        async def one(index: int) -> Answer:
            await asyncio.sleep(max(0.0, float(trace.arrival_s[index]) - (time.perf_counter() - start)))
            sent, pieces, error = time.perf_counter() - start, [], ""
            asked = int(trace.output_tokens[index])
            body: dict[str, Any] = {"max_tokens": asked, "temperature": 0.0, **options}
            try:
                async for piece in endpoint.stream_complete(prompts[index], **body):
                    if piece.text:
                        pieces.append(time.perf_counter() - start)
            except EndpointError as trouble:
                error = str(trouble)
            if not pieces and not error:
                error = "expected a piece of text, got an empty answer"
            return Answer(index, sent, len(prompts[index]), asked, tuple(pieces), error)

        coming = asyncio.as_completed([one(index) for index in range(len(trace))])
        answers = [await answer for answer in core.progress(coming, "requests", len(trace))]
        return LoadResult(tuple(sorted(answers, key=lambda each: each.index)), time.perf_counter() - start)
