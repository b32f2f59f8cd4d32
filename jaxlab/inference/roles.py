"""The two kinds of worker of a disaggregated engine, each a thin role around an `Engine`.

A worker is told what to do by calls, and tells what happened through `emit(event, ...)`, so that it is the same
whether it lives in the caller's process or in one of its own. The events:

    "output", key, StepOutput           new tokens of a request
    "offered", key, offer               it has left this prefill worker; its pages wait for a decode worker
    "received", key, bytes              its pages are here
    "lost", key, message, peer_lost     its pages did not come
    "refused", key, message             the engine would not take it
    "metrics", IterationMetrics         one iteration: of prefill before it computes, so that a clock can still follow
    "stats", WorkerStats                after whatever changed them

A key names one attempt at a request.
"""

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxlab.inference.engine import Engine
from jaxlab.inference.paged import KVPages
from jaxlab.inference.params import SamplingParams
from jaxlab.inference.serving import StepOutput
from jaxlab.inference.transfer import KVTransfer, KVTransferError, Offer, byte_count

Emit = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class WorkerStats:
    """What a worker reports of itself.

    Attributes:
        free_pages: of its pool.
        load: tokens whose keys and values it holds, and prompt tokens that wait for it.
        held_bytes: keys and values that it offers and nobody has fetched.
        last_itl_ms: what its last iteration took, its pace included.
        preemptions: of its engine.
        compile_count: of its engine.
    """

    free_pages: int
    load: int
    held_bytes: int
    last_itl_ms: float
    preemptions: int
    compile_count: int


@dataclasses.dataclass(frozen=True)
class DrawnTokens:
    """Tokens of a request, with their log-probabilities."""

    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)

    def extend(self, output: StepOutput) -> None:
        """Adds what a step gave."""
        self.ids.extend(output.new_token_ids)
        self.logprobs.extend(output.logprobs)
        self.top_logprobs.extend(output.top_logprobs)

    def first(self, count: int) -> "DrawnTokens":
        """The first `count` tokens."""
        return DrawnTokens(self.ids[:count], self.logprobs[:count], self.top_logprobs[:count])


class Worker:
    """What both kinds share.

    Args:
        engine: theirs alone.
        transfer: this worker's end.
        emit: takes the events; called by the thread that calls this worker.
    """

    def __init__(self, engine: Engine, transfer: KVTransfer, emit: Emit):
        self.engine, self.transfer, self.emit = engine, transfer, emit
        self._pace = 1.0
        self._last_itl_ms = 0.0
        self._keys: dict[int, str] = {}  # engine's name of a request -> ours
        self._ids: dict[str, int] = {}
        self._held: list[tuple[Any, ...]] | None = None  # events of an iteration that is not over yet
        self._started = self._took_s = self._over_at = 0.0  # of the latest iteration

    @property
    def idle_s(self) -> float:
        """How long nothing needs to be done, if nothing is told: infinite where only others can change that."""
        if self._held is not None:
            return max(0.0, self._over_at - time.monotonic())
        return 0.0 if self._has_work() else float("inf")

    def pace(self, factor: float) -> None:
        """Each iteration takes `factor` times as long from now on."""
        self._pace = factor
        self._over_at = self._started + factor * self._took_s  # also the one that is not over yet

    def step(self) -> bool:
        """Does what can be done without waiting; whether anything was."""
        if self._held is not None:
            if time.monotonic() < self._over_at:
                return False
            self._tell()
            return True
        if not self._has_work():
            return False
        started = time.monotonic()
        self._held = self._iterate()
        if self._held is None:
            self.tell_stats()
            return True
        self._started, self._took_s = started, time.monotonic() - started
        self._over_at = started + self._pace * self._took_s
        if self._pace == 1:
            self._tell()
        return True

    def abort(self, key: str) -> None:
        """Frees everything of a request, wherever it is; of unknown ones there is nothing."""
        self.transfer.drop(key)
        if key in self._ids:
            self.engine.abort(self._forget(key))
        self.tell_stats()

    def tell_stats(self) -> None:
        """Emits "stats"."""
        engine = self.engine
        stats = WorkerStats(
            free_pages=engine.free_pages,
            load=self._load(),
            held_bytes=self.transfer.held_bytes,
            last_itl_ms=self._last_itl_ms,
            preemptions=engine.preemptions,
            compile_count=engine.compile_count,
        )
        self.emit("stats", stats)

    def close(self) -> None:
        """Frees what the transfers hold."""
        self.transfer.close()

    def _has_work(self) -> bool:
        return self.engine.has_work

    def _iterate(self) -> list[tuple[Any, ...]] | None:
        """An iteration and its events; None if there was nothing to compute."""
        raise NotImplementedError

    def _load(self) -> int:
        raise NotImplementedError

    def _tell(self) -> None:
        events, self._held = self._held or (), None
        self._last_itl_ms = 1e3 * (self._over_at - self._started)
        self.tell_stats()  # first: who hears of a request's end finds its pages free
        for event in events:
            self.emit(*event)

    def _know(self, key: str, engine_id: int) -> None:
        self._keys[engine_id], self._ids[key] = key, engine_id

    def _forget(self, key: str) -> int:
        engine_id = self._ids.pop(key)
        del self._keys[engine_id]
        return engine_id


class PrefillWorker(Worker):
    """Reads prompts, draws first tokens, and offers the pages of requests that go on.

    Args:
        engine: as `Worker`.
        transfer: as `Worker`.
        emit: as `Worker`.
        max_held_bytes: it reads no further prompt while it holds so much that nobody has fetched.
    """

    mode = "prefill"

    def __init__(self, engine: Engine, transfer: KVTransfer, emit: Emit, *, max_held_bytes: int = 1 << 32):
        super().__init__(engine, transfer, emit)
        self._max_held_bytes = max_held_bytes
        self._waiting: dict[str, int] = {}  # prompt tokens
        engine.on_metrics = lambda metrics: emit("metrics", metrics)

    def add(self, key: str, ids: Sequence[int], sampling: SamplingParams) -> None:
        """Queues a prompt."""
        try:
            self._know(key, self.engine.add_request(ids, sampling))
        except (ValueError, TypeError) as error:
            self.emit("refused", key, str(error))
            return
        self._waiting[key] = len(ids)
        self.tell_stats()

    def received(self, key: str) -> None:
        """The decode worker has the pages of a request."""
        self.transfer.drop(key, received=True)
        self.tell_stats()

    def abort(self, key: str) -> None:
        """See `Worker`."""
        self._waiting.pop(key, None)
        super().abort(key)

    def _has_work(self) -> bool:
        return super()._has_work() and self.transfer.held_bytes < self._max_held_bytes

    def _iterate(self) -> list[tuple[Any, ...]]:
        events: list[tuple[Any, ...]] = []
        for output in self.engine.step():
            if output.request_id not in self._keys:  # aborted
                continue
            key = self._keys[output.request_id]
            events.append(("output", key, output))
            self._waiting.pop(key, None)
            self._forget(key)
            if output.finish_reason is None:
                events.append(("offered", key, self.transfer.send(key, self.engine.take(output.request_id))))
        return events

    def _load(self) -> int:
        return sum(self._waiting.values())


@dataclasses.dataclass(eq=False)
class _Incoming:
    """A request on its way here: told of, being fetched, or fetched and waiting for pages."""

    key: str
    offer: Offer
    prompt: list[int]
    sampling: SamplingParams
    drawn: DrawnTokens
    pages: int
    fetch: concurrent.futures.Future | None = None
    here: KVPages | None = None


class DecodeWorker(Worker):
    """Fetches the pages of prefilled requests when it has room for them, and decodes.

    Args:
        engine: as `Worker`.
        transfer: as `Worker`.
        emit: as `Worker`.
        wake: called, by any thread, when a fetch has ended.
        timeout_s: how long a fetch may take.
        fetches: at a time.
    """

    mode = "decode"

    def __init__(
        self,
        engine: Engine,
        transfer: KVTransfer,
        emit: Emit,
        *,
        wake: Callable[[], None] = lambda: None,
        timeout_s: float = 30.0,
        fetches: int = 4,
    ):
        super().__init__(engine, transfer, emit)
        self._wake, self._timeout_s = wake, timeout_s
        self._incoming: collections.OrderedDict[str, _Incoming] = collections.OrderedDict()
        self._tokens: dict[str, int] = {}  # keys and values here
        self._fetchers = concurrent.futures.ThreadPoolExecutor(fetches, thread_name_prefix="kv-fetch")

    def fetch(
        self, key: str, offer: Mapping[str, Any], prompt: list[int], sampling: SamplingParams, drawn: DrawnTokens
    ) -> None:
        """Queues a prefilled request. The prompt that was read for it may end with tokens `drawn` earlier."""
        tokens = len(prompt) + len(drawn.ids) + 1
        page = self.engine.config.page_size
        self._incoming[key] = _Incoming(key, offer, prompt, sampling, drawn, -(-tokens // page))
        self.tell_stats()

    def abort(self, key: str) -> None:
        """See `Worker`. A fetch under way ends by itself, and what it brings is dropped."""
        incoming = self._incoming.pop(key, None)
        if incoming is not None and incoming.fetch is not None:
            incoming.fetch.cancel()
        self._tokens.pop(key, None)
        super().abort(key)

    def close(self) -> None:
        """See `Worker`."""
        super().close()
        self._fetchers.shutdown(wait=True, cancel_futures=True)

    def _has_work(self) -> bool:
        fetches = (incoming.fetch for incoming in self._incoming.values())
        return super()._has_work() or any(fetch and fetch.done() for fetch in fetches) or self._next() is not None

    def _next(self) -> _Incoming | None:
        """The first request not fetched yet, if its pages are free beside those of the fetches under way.

        An idle engine lets one in without asking.
        """
        first = next((incoming for incoming in self._incoming.values() if incoming.fetch is None), None)
        if first is None:
            return None
        kept = sum(other.pages for other in self._incoming.values() if other.fetch is not None)
        fits = first.pages <= self.engine.free_pages - kept or not (kept or self.engine.has_work)
        return first if fits else None

    def _iterate(self) -> list[tuple[Any, ...]] | None:
        self._arrive()
        self._admit()
        self._allocate()
        if not self.engine.has_work:
            return None
        events: list[tuple[Any, ...]] = []
        for output in self.engine.step():
            if output.request_id not in self._keys:  # aborted
                continue
            key = self._keys[output.request_id]
            events.append(("output", key, output))
            self._tokens[key] += len(output.new_token_ids)
            if output.finish_reason is not None:
                self._forget(key)
                del self._tokens[key]
        return [("metrics", self.engine.metrics()), *events]

    def _arrive(self) -> None:
        for incoming in list(self._incoming.values()):
            if incoming.here is None and incoming.fetch is not None and incoming.fetch.done():
                try:
                    incoming.here = incoming.fetch.result()
                except (KVTransferError, MemoryError) as error:
                    del self._incoming[incoming.key]
                    self.emit("lost", incoming.key, str(error), getattr(error, "peer_lost", False))
                else:
                    self.emit("received", incoming.key, byte_count(incoming.here))

    def _admit(self) -> None:
        """Lets fetched requests in, first come, first served, as far as pages go; preempted ones go before them."""
        for incoming in list(self._incoming.values()):
            preempted = self.engine.has_work and self.engine.metrics().waiting
            if incoming.here is not None and not preempted:
                drawn, here = incoming.drawn, incoming.here
                pages = dataclasses.replace(
                    here,
                    prompt=incoming.prompt,
                    generated=[*drawn.ids, *here.generated],
                    logprobs=[*drawn.logprobs, *here.logprobs],
                    top_logprobs=[*drawn.top_logprobs, *here.top_logprobs],
                )
                try:
                    self._know(incoming.key, self.engine.give(incoming.prompt, incoming.sampling, pages))
                    self._tokens[incoming.key] = pages.tokens
                except MemoryError:
                    return
                except (ValueError, TypeError) as error:
                    self.emit("refused", incoming.key, str(error))
                del self._incoming[incoming.key]

    def _allocate(self) -> None:
        """Sets pages aside for the next requests, and fetches what belongs in them."""
        while (incoming := self._next()) is not None:
            incoming.fetch = self._fetchers.submit(
                self.transfer.recv, incoming.key, incoming.offer, timeout_s=self._timeout_s
            )
            incoming.fetch.add_done_callback(lambda _: self._wake())

    def _load(self) -> int:
        coming = sum(len(incoming.prompt) + len(incoming.drawn.ids) for incoming in self._incoming.values())
        return coming + sum(self._tokens.values())
