"""A thread that owns an engine, and the way from an event loop to it and back.

An engine is not thread-safe: all that touches it happens on this thread. Orders come in through a queue; what an
iteration brings goes out in one call for each event loop that waits for some of it.
"""

import asyncio
import collections
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar, runtime_checkable

from jaxlab.inference.params import SamplingParams

T = TypeVar("T")

_LOG = logging.getLogger("jaxlab.voltanallm")
_IDLE_S = 0.2  # between two looks at the clocks where there is nothing to do


class Unavailable(RuntimeError):
    """The engine does not answer: it failed, lost the request, or is being closed."""


class Overloaded(RuntimeError):
    """There are as many requests under way as are let in."""


@runtime_checkable
class Controls(Protocol):
    """What acts on the hardware while an engine works; everything is called on the engine's thread."""

    def start(self) -> None:
        """The engine is ready."""

    def arrived(self, prompt_tokens: int) -> None:
        """A request has come."""

    def before_step(self) -> None:
        """An iteration begins."""

    def after_step(self, seconds: float) -> float:
        """An iteration took so long; gives how much longer it would have taken at the clocks that are set."""
        ...

    def after_pause(self) -> None:
        """That time is over."""

    def idle(self) -> None:
        """There is nothing to do; called now and then."""

    def close(self) -> None:
        """Leaves the hardware as it was."""


class Submission:
    """Requests that came together, and what the engine makes of them.

    Args:
      count: of requests.
      eager: wake who iterates `outputs` for every output, otherwise only when a request has ended.
      observe: told every output as it comes: `(which request, time.monotonic(), StepOutput)`.
    """

    def __init__(self, count: int, *, eager: bool = True, observe: Callable[[int, float, Any], None] | None = None):
        self.ids: list[Any] = [None] * count  # the engine's
        self.open = [True] * count  # in the engine; guarded by the loop's lock
        self.given_up: set[int] = set()  # by who reads `outputs`
        self.loop = asyncio.get_running_loop()
        self._eager, self._observe = eager, observe
        self._outputs: collections.deque[tuple[int, float, Any]] = collections.deque()
        self._news = asyncio.Event()

    async def outputs(self, deadline_s: float) -> AsyncIterator[tuple[int, float, Any]]:
        """`(which request, time.monotonic() when it came, StepOutput)`, until all have ended or been given up.

        Args:
          deadline_s: limit for the whole, as `asyncio`'s clock tells time.

        Raises:
          Unavailable: the engine fails or loses one of them.
          TimeoutError: the deadline has come.
        """
        left = set(range(len(self.ids)))
        while left:
            if not self._outputs:
                self._news.clear()
                async with asyncio.timeout_at(deadline_s):
                    await self._news.wait()
            index, when, output = self._outputs.popleft()
            if isinstance(output, Exception):
                raise output
            if index in self.given_up:
                continue
            if output.finish_reason == "abort":
                raise Unavailable(f"the engine lost this request: {getattr(output, 'error', None) or 'it was aborted'}")
            yield index, when, output
            if output.finish_reason is not None or index in self.given_up:
                left.discard(index)

    def put(self, index: int, when: float, output: Any) -> None:
        """Takes an output or an exception; in the event loop."""
        self._outputs.append((index, when, output))
        if isinstance(output, Exception):
            self._news.set()
            return
        if self._observe is not None and index not in self.given_up:
            self._observe(index, when, output)
        if self._eager or output.finish_reason is not None:
            self._news.set()


class EngineLoop:
    """Runs an engine on a thread of its own.

    Args:
      engine: an `Engine` or a `DisaggregatedEngine`, used by nobody else until `close`.
      max_requests: how many may be under way at once.
      controls: act on the hardware; None: nothing does.
      warm: compile everything before the first request.

    Attributes:
      failure: what the engine failed with, after which it takes no request any more.
      ready: set when the engine is compiled, or has failed.
      snapshot: `(metrics, free pages, preemptions)` after the last iteration; None before the first.
    """

    def __init__(self, engine: Any, *, max_requests: int = 1024, controls: Controls | None = None, warm: bool = True):
        self.failure: BaseException | None = None
        self.ready = threading.Event()
        self.snapshot: tuple[Any, int, int] | None = None
        self._engine, self._controls = engine, controls
        self._apart = hasattr(engine, "drain_metrics")  # its workers go on by themselves, and tell of it later
        self._warm, self._max_requests = warm, max_requests
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._rows: dict[Any, tuple[Submission, int]] = {}  # by the engine's id; its thread only
        self._under_way = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._refusing: str | None = None
        self._closing = self._ended = False

    @property
    def under_way(self) -> int:
        """Requests let in that have not ended."""
        return self._under_way

    @property
    def unavailable(self) -> str | None:
        """Why no request is taken; None if they are."""
        if self.failure is not None:
            return f"the engine failed ({type(self.failure).__name__})"
        return self._refusing

    def start(self) -> None:
        """Starts the thread; a second time does nothing."""
        with self._lock:
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, daemon=True, name="jaxlab-engine")
                self._thread.start()

    async def submit(
        self,
        requests: Sequence[tuple[Sequence[int], SamplingParams]],
        *,
        eager: bool = True,
        observe: Callable[[int, float, Any], None] | None = None,
    ) -> Submission:
        """Hands requests to the engine, all or none, and waits until it has taken them.

        Args:
          requests: prompts, and how to sample.
          eager: see `Submission`.
          observe: see `Submission`.

        Raises:
          Overloaded: there is no room for them.
          Unavailable: the engine is not there.
          ValueError: the engine refuses one of them, as `Engine.add_request` does.
        """
        if self.unavailable is not None:
            raise Unavailable(self.unavailable)
        self.start()
        submission = Submission(len(requests), eager=eager, observe=observe)
        with self._lock:
            if self._under_way + len(requests) > self._max_requests:
                raise Overloaded(
                    f"{self._under_way} requests are under way and {self._max_requests} are let in; try again later"
                )
            self._under_way += len(requests)
        try:
            await asyncio.wrap_future(self.call(lambda: self._add(submission, requests)))
        except BaseException:
            self.abort(submission)
            raise
        return submission

    def abort(self, submission: Submission, which: int | None = None) -> None:
        """Gives a request up, or all of them; those that have ended stay as they are."""
        with self._lock:
            indices = [
                index for index, is_open in enumerate(submission.open) if is_open and (which is None or index == which)
            ]
            for index in indices:
                submission.open[index] = False
            self._under_way -= len(indices)
            submission.given_up.update(range(len(submission.open)) if which is None else {which})
        if indices:
            self._order(lambda: self._drop([submission.ids[index] for index in indices]))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs a function on the engine's thread, between two iterations; `Unavailable` once that has ended."""
        future: Future[T] = Future()

        def order() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._ended:
                    raise Unavailable(self.unavailable or "the engine is closed")
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._order(order)
        return future

    def refuse(self, why: str = "the server is shutting down") -> None:
        """Takes no more requests; those under way go on."""
        self._refusing = why

    def fail_all(self) -> None:
        """Fails what is under way."""
        self._order(self._fail_all)

    def close(self, timeout_s: float = 30.0) -> None:
        """Ends the thread; requests still under way fail and leave the engine, which stays usable."""
        self.refuse()
        self._closing = True
        self._orders.put(lambda: None)
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.put(order)
        if self._ended:  # nobody else looks there any more
            self._follow_orders(0.0)

    def _follow_orders(self, wait_s: float) -> None:
        with contextlib.suppress(queue.Empty):
            order = self._orders.get(timeout=wait_s) if wait_s else self._orders.get_nowait()
            while True:
                order()
                order = self._orders.get_nowait()

    def _run(self) -> None:
        try:
            if self._warm:
                self._engine.warmup()
            self._look()
            if self._controls is not None:
                self._controls.start()
            self.ready.set()
            while not self._closing:
                if self._rows:  # rather than `has_work`: somebody may use the engine while no request is here
                    self._iterate()
                    self._follow_orders(0.0)
                    continue
                if self._controls is not None:
                    self._controls.idle()
                if self._apart:
                    self._look()
                self._follow_orders(_IDLE_S)
        except BaseException as error:
            _LOG.exception("the engine failed")
            self.failure = error
        finally:
            self._end()

    def _iterate(self) -> None:
        if self._controls is not None:
            self._controls.before_step()
        started = time.monotonic()
        outputs = self._engine.step()
        if self._controls is not None:
            time.sleep(self._controls.after_step(time.monotonic() - started))
            self._controls.after_pause()
        self._look()
        self._hand_out(outputs)

    def _look(self) -> None:
        self.snapshot = self._engine.metrics(), self._engine.free_pages, self._engine.preemptions

    def _add(self, submission: Submission, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> None:
        for index, (ids, sampling) in enumerate(requests):
            submission.ids[index] = self._engine.add_request(ids, sampling)
            self._rows[submission.ids[index]] = submission, index
            if self._controls is not None:
                self._controls.arrived(len(ids))

    def _drop(self, ids: Sequence[Any]) -> None:
        for each in ids:
            if self._rows.pop(each, None) is not None and self.failure is None:
                self._engine.abort(each)
        if not self._ended and self.failure is None:
            self._look()

    def _hand_out(self, outputs: Sequence[Any]) -> None:
        now = time.monotonic()
        found: list[tuple[Submission, int, Any]] = []
        for output in outputs:
            if output.request_id not in self._rows:
                continue
            submission, index = self._rows[output.request_id]
            if output.finish_reason is not None:
                del self._rows[output.request_id]
                with self._lock:
                    self._under_way -= submission.open[index]
                    submission.open[index] = False
            found.append((submission, index, output))
        _post(found, now)

    def _fail_all(self) -> None:
        error = Unavailable(self.unavailable or "the engine is closed")
        submissions = {submission for submission, _ in self._rows.values()}
        _post([(submission, 0, error) for submission in submissions], time.monotonic())
        for submission in submissions:
            self.abort(submission)

    def _end(self) -> None:
        """Fails whatever is under way or still comes in, once each."""
        self._fail_all()
        self._follow_orders(0.0)
        self._ended = True
        self._follow_orders(0.0)
        self.ready.set()
        if self._controls is not None:
            self._controls.close()


def _post(outputs: Sequence[tuple[Submission, int, Any]], when: float) -> None:
    """Hands outputs over from another thread, waking each event loop once."""

    def put(loop: asyncio.AbstractEventLoop) -> None:
        for submission, index, output in outputs:
            if submission.loop is loop:
                submission.put(index, when, output)

    for loop in {submission.loop for submission, _, _ in outputs}:
        with contextlib.suppress(RuntimeError):  # it has been closed: nobody waits
            loop.call_soon_threadsafe(put, loop)
