"""The thread that owns the host's queue: dispatching to a CPU can block, and should not block the training loop."""

import queue
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import jax


class HostWorker:
    """Runs functions one after the other, in a thread of its own.

    A function that raises, or takes too long, ends the worker: what it was working on is in no known state.
    """

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._jobs: queue.SimpleQueue[tuple[Future, Callable[..., Any], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._problem: str | None = None
        self.busy_s = 0.0
        """Seconds spent in functions so far."""
        # A daemon, so that a host that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._serve, name="superoffload-host", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """Queues `function(*args)`; its arrays are waited for in the worker.

        Raises:
          RuntimeError: the worker has been closed, or has ended before.
        """
        self.check()
        future: Future = Future()
        self._jobs.put((future, function, args))
        return future

    def check(self) -> None:
        """Raises the RuntimeError that the next job would."""
        if self._problem is not None:
            raise RuntimeError(self._problem)

    def result(self, future: Future, what: str) -> Any:
        """What the function returned.

        Raises:
          RuntimeError: it raised, or did not return in time; the message names `what` and has the traceback.
        """
        try:
            return future.result(self._timeout_s)
        except FutureTimeout:
            self._end(f"the host worker gave no result for {what} within {self._timeout_s:g} s")
        except Exception as error:
            told = "".join(traceback.format_exception(error))
            self._end(f"the host worker died at {what}:\n{told}")
        raise RuntimeError(self._problem)

    def close(self) -> None:
        """Ends the thread after what is queued; waits for it, but not longer than for a result."""
        if self._problem is None:
            self._end("the engine has been closed")
            self._thread.join(self._timeout_s)

    def _end(self, problem: str) -> None:
        self._problem = problem
        self._jobs.put(None)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, function, args = job
            start = time.perf_counter()
            try:
                future.set_result(jax.block_until_ready(function(*args)))
            except BaseException as error:
                future.set_exception(error)
            self.busy_s += time.perf_counter() - start
