"""What an engine is told, and what it tells."""

import dataclasses
import itertools
from numbers import Integral
from typing import Any

_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine. Checked when made.

    Attributes:
        num_pages: of the pool of keys and values, the scratch page included.
        page_size: tokens in a page.
        max_running: requests decoded together, at most.
        prefill_chunk: prompt tokens read in one step, at most.
        batch_buckets: sizes that a batch is padded to, ascending, the last bounding `max_running`; None: 1, 2, 4, 8,
            by 8 up to 128, by 32 up to 256, then by 128.
        kv_dtype: of the stored keys and values.
        num_reserved_decode_tokens: a prompt is admitted if it, and all that runs, can grow by so many tokens (SGLang's
            setting of this name).
        prefix_cache: prompts that begin alike share their full pages.
    """

    num_pages: int
    _: dataclasses.KW_ONLY
    page_size: int = 16
    max_running: int = 256
    prefill_chunk: int = 512
    batch_buckets: tuple[int, ...] | None = None
    kv_dtype: str = "bfloat16"
    num_reserved_decode_tokens: int = 8
    prefix_cache: bool = True

    def __post_init__(self):
        least = {"num_pages": 2, "page_size": 1, "max_running": 1, "prefill_chunk": 1, "num_reserved_decode_tokens": 0}
        for name, lowest in least.items():
            value = _integer(name, getattr(self, name))
            if value < lowest:
                raise ValueError(f"{name}: expected at least {lowest}, got {value}")
        if self.kv_dtype not in _DTYPES:
            raise ValueError(f"kv_dtype: expected one of {', '.join(_DTYPES)}, got {self.kv_dtype!r}")
        if self.batch_buckets is None:
            object.__setattr__(self, "batch_buckets", _default_buckets(self.max_running))
            return
        buckets = tuple(_integer("batch_buckets", size) for size in self.batch_buckets)
        if not buckets or buckets[0] < 1 or any(a >= b for a, b in itertools.pairwise(buckets)):
            raise ValueError(f"batch_buckets: expected ascending sizes of at least 1, got {self.batch_buckets!r}")
        object.__setattr__(self, "batch_buckets", buckets)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    return int(value)


def _default_buckets(most: int) -> tuple[int, ...]:
    sizes = [1, 2, 4, *range(8, 129, 8), *range(160, 257, 32)]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + 128)
    return (*(size for size in sizes if size < most), most)


@dataclasses.dataclass(frozen=True)
class IterationMetrics:
    """One step of an engine, as a controller sees it, made before the step computes anything.

    Attributes:
        timestamp: seconds of `time.monotonic`.
        running: requests decoded; where the step only reads prompts, those read.
        total: requests in the engine.
        tokens: keys and values of the running requests (of each: its tokens - 1); where the step only reads prompts,
            the tokens it reads.
        waiting: requests that hold no pages yet.
        queue_wait_s: seconds each of them has waited.
    """

    timestamp: float
    running: int
    total: int
    tokens: int
    waiting: int
    queue_wait_s: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What one step gave one request.

    Attributes:
        request_id: of `Engine.add_request`.
        new_token_ids: drawn in this step.
        finish_reason: None while it goes on; "stop" (a stop id or string), "length" or "abort".
        logprobs: of the new tokens.
        top_logprobs: of each new token the `SamplingParams.logprobs` likeliest ids and their log-probabilities.
    """

    request_id: int
    new_token_ids: list[int]
    finish_reason: str | None
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    Attributes:
        request_id: of `Engine.add_request`.
        token_ids: drawn, the stop token included.
        finish_reason: as in `StepOutput`.
        text: of the tokens, without stop token or string; None without a tokenizer.
        logprobs: of the tokens, of the temperature-scaled, untruncated distribution (greedy: temperature 1).
        top_logprobs: as in `StepOutput`; empty dictionaries if none were asked for.
    """

    request_id: int
    token_ids: list[int]
    finish_reason: str
    text: str | None
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
