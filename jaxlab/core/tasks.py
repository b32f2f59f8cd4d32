"""One map for all work that is not JAX: environments, feature building, simulation sweeps, answer checking.

    from jaxlab.core import tasks
    for result in tasks.map(check_answer, answers, timeout_s=10, folder="work/checks"):
        print(result.item, result.error or result.value)

A function that needs something costly (an environment, a verifier) keeps it in a module-level cache: a worker process
lives on from item to item, and from call to call.
"""

import collections
import dataclasses
import functools
import hashlib
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from jaxlab.core import jsonl, plain_values
from jaxlab.core.workers import LocalCrew, RayCrew

I = TypeVar("I")
V = TypeVar("V")

_START_FAILURES = 3  # worker deaths before the first item, in a row, that mean "it cannot start here at all"


@dataclasses.dataclass(frozen=True)
class TaskResult(Generic[I, V]):
    """What became of one item.

    Attributes:
      item: the item.
      value: what the function returned; None where it failed.
      error: None, or why there is no value: the traceback, "died" or "time limit" with details.
    """

    item: I
    value: V | None = None
    error: str | None = None


def map(
    fn: Callable[[I], V],
    items: Iterable[I],
    *,
    workers: int | None = None,
    timeout_s: float | None = None,
    retries: int = 1,
    ray: str | None = None,
    folder: str | os.PathLike | None = None,
) -> Iterator[TaskResult[I, V]]:
    """Applies `fn` to every item in worker processes and yields the results in the order of the items.

    Items are taken, and results kept, only a little ahead of what was yielded, so `items` may be endless. An item
    whose worker raises, dies or exceeds `timeout_s` costs that item alone: after the retries its result has an `error`.

    Args:
      fn: a picklable function of one item, importable by a fresh process (spawned, never forked).
      items: picklable items.
      workers: how many processes; default one a CPU (of this machine, or of the Ray cluster).
      timeout_s: limit for one item, counted from when a loaded worker gets it.
      retries: how many more times a failed item is tried.
      ray: None for processes on this machine, which stay warm for the next call and end with this process; "auto" or
        an address for actors of a Ray cluster (extra `ray`).
      folder: where finished results are kept, in `results.jsonl`; called again with the same function, only items
        without a value, or with another content at their position, are computed. Values must be numbers, text, bytes,
        NumPy arrays, or lists, tuples, sets and dicts of such: another is an error of its item.

    Returns:
      An iterator; closing it early stops the work.

    Raises:
      TypeError: `fn` cannot be pickled, or (when iterating) cannot be loaded by a worker.
      ValueError: an argument out of range, or a `folder` that holds the results of another function.
      MissingExtra: `ray` is given and Ray is not installed.
      RuntimeError: (when iterating) workers cannot be started.
    """
    if not callable(fn):
        raise TypeError(f"fn: expected a function, got {fn!r}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    if timeout_s is not None and not timeout_s > 0:
        raise ValueError(f"timeout_s: expected more than 0 seconds, got {timeout_s}")
    if retries < 0:
        raise ValueError(f"retries: expected at least 0, got {retries}")
    crew: Any
    if ray is None:
        try:
            pickled = pickle.dumps(fn, protocol=5)
        except Exception as error:
            raise TypeError(
                f"fn: expected a function that pickles (defined at the top of a module, not a lambda or a closure), "
                f"got {fn!r}: {error}"
            ) from error
        crew = functools.partial(LocalCrew, pickled)
        workers = workers or len(os.sched_getaffinity(0))
    else:
        connected = RayCrew(fn, ray)
        crew, workers = (lambda: connected), workers or connected.cpus()
    store = None if folder is None else _Store(Path(folder), _name(fn))
    return _results(_Run(crew, iter(items), workers, timeout_s, retries, store))


def _results(run: "_Run") -> Iterator[TaskResult]:
    run.start()
    try:
        index = 0
        while (result := run.take(index)) is not None:
            yield result
            index += 1
    finally:
        run.stop()


@dataclasses.dataclass(eq=False)
class _Task:
    index: int
    item: Any
    payload: bytes
    attempts: int = 0
    deadline: float = float("inf")


class _Run:
    """One call of `map`: a thread that takes items ahead, and one that keeps the workers busy.

    The threads and the consumer meet at one condition; `_results` holds what is finished and not yet taken.
    """

    def __init__(
        self,
        crew: Callable[[], Any],
        items: Iterator[Any],
        workers: int,
        timeout_s: float | None,
        retries: int,
        store: "_Store | None",
    ):
        self._make_crew, self._items, self._limit = crew, items, workers
        self._timeout_s, self._retries, self._store = timeout_s, retries, store
        self._room = threading.Semaphore(4 * workers)  # items taken and not yet yielded
        self._condition = threading.Condition()
        self._waiting: collections.deque[_Task] = collections.deque()
        self._results: dict[int, TaskResult] = {}
        self._total: int | None = None  # known once the items have ended, or failed
        self._items_error: BaseException | None = None
        self._failure: BaseException | None = None
        self._stopping = False
        self._busy: dict[Any, _Task] = {}
        self._starting: set[Any] = set()
        self._idle: list[Any] = []

    def start(self) -> None:
        """Begins to work."""
        self._crew = self._make_crew()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._feed, self._schedule)]
        for thread in self._threads:
            thread.start()

    def take(self, index: int) -> TaskResult | None:
        """Waits for a result; None when the items have ended before it."""
        with self._condition:
            while True:
                if index in self._results:
                    self._room.release()
                    return self._results.pop(index)
                if self._failure is not None:
                    raise self._failure
                if self._total is not None and index >= self._total:
                    if self._items_error is not None:
                        raise self._items_error
                    return None
                self._condition.wait()

    def stop(self) -> None:
        """Ends the work: running items are given up. An items iterator that blocks is left to its thread."""
        with self._condition:
            self._stopping = True
        self._room.release()
        self._crew.wake()
        self._threads[1].join()

    def _feed(self) -> None:
        index = 0
        try:
            while True:
                self._room.acquire()
                if self._stopping:
                    return
                try:
                    item = next(self._items)
                except StopIteration:
                    return
                known = None if self._store is None else self._store.find(index, item)
                if known is not None:
                    self._finish(index, TaskResult(item, value=known[0]))
                else:
                    try:
                        payload = pickle.dumps(item, protocol=5)
                    except Exception as error:
                        self._finish(index, TaskResult(item, error=f"the item cannot be pickled: {error!r}"))
                    else:
                        with self._condition:
                            self._waiting.append(_Task(index, item, payload))
                        self._crew.wake()
                index += 1
        except BaseException as error:  # what the caller's iterator raises is raised in its place among the results
            self._items_error = error
        finally:
            with self._condition:
                self._total = index
                self._condition.notify_all()
            self._crew.wake()

    def _schedule(self) -> None:
        try:
            failures = 0
            while not self._stopping and (self._total is None or self._waiting or self._busy):
                self._assign()
                for worker, report, payload in self._crew.poll(self._until_deadline()):
                    if worker in self._starting:
                        self._starting.discard(worker)
                        failures = 0 if report == "ready" else failures + 1
                        self._started(worker, report, payload, failures)
                    elif worker in self._busy:
                        self._finished(worker, report, payload)
                    else:
                        self._idle.remove(worker)  # died with nothing to do
                self._enforce()
        except BaseException as error:
            with self._condition:
                self._failure = error
                self._condition.notify_all()
        finally:
            self._crew.close(self._idle)

    def _assign(self) -> None:
        with self._condition:
            while self._waiting and self._idle:
                task, worker = self._waiting.popleft(), self._idle.pop()
                task.attempts += 1
                task.deadline = time.monotonic() + (self._timeout_s or float("inf"))
                self._busy[worker] = task
                self._crew.send(worker, task.payload)
            room = self._limit - len(self._busy) - len(self._idle) - len(self._starting)
            missing = min(room, len(self._waiting) - len(self._starting))
        for _ in range(missing):
            self._starting.add(self._crew.start())

    def _until_deadline(self) -> float:
        soonest = min((task.deadline for task in self._busy.values()), default=float("inf"))
        return min(max(0.0, soonest - time.monotonic()), 3600.0)

    def _enforce(self) -> None:
        now = time.monotonic()
        for worker, task in list(self._busy.items()):
            if task.deadline < now:
                del self._busy[worker]
                self._crew.kill(worker)
                self._failed(task, f"time limit of {self._timeout_s:g} s exceeded; the worker was killed")

    def _started(self, worker: Any, report: str, payload: Any, failures: int) -> None:
        if report == "ready":
            self._idle.append(worker)
        elif report == "unloadable":
            self._crew.kill(worker)
            raise TypeError(
                "fn: a worker process cannot load it; it must be defined in a module that a fresh process can import, "
                f"not in a notebook or at a prompt:\n{payload}"
            )
        elif failures >= _START_FAILURES:
            raise RuntimeError(f"worker processes die before their first item ({payload}); {self._crew.hint}")

    def _finished(self, worker: Any, report: str, payload: Any) -> None:
        task = self._busy.pop(worker)
        if report == "died":
            self._failed(task, f"the worker died: {payload}")
            return
        self._idle.append(worker)
        if report == "failed":
            self._failed(task, payload)
            return
        try:
            value = pickle.loads(payload)
        except Exception as error:
            self._failed(task, f"the value cannot be unpickled: {error!r}")
            return
        self._finish(task.index, TaskResult(task.item, value=value), store=True)

    def _failed(self, task: _Task, error: str) -> None:
        if task.attempts <= self._retries:
            with self._condition:
                self._waiting.appendleft(task)
        else:
            self._finish(task.index, TaskResult(task.item, error=error), store=True)

    def _finish(self, index: int, result: TaskResult, store: bool = False) -> None:
        if store and self._store is not None:
            try:
                self._store.add(index, result)
            except TypeError as error:
                result = TaskResult(result.item, error=f"the value cannot be kept in the folder: {error}")
                self._store.add(index, result)
        with self._condition:
            self._results[index] = result
            self._condition.notify_all()


class _Store:
    """Finished results in `<folder>/results.jsonl`, found again by position and content of the item.

    In memory there is only where each line begins. Values are stored as plain ones (`plain_values`): a file that
    somebody else wrote cannot run code.
    """

    def __init__(self, folder: Path, name: str):
        self._path = folder / "results.jsonl"
        self._lines: dict[int, tuple[str, int]] = {}
        if not self._path.exists():
            jsonl.append(self._path, {"fn": name})
        for number, (offset, row) in enumerate(jsonl.locate(self._path)):
            if number == 0:
                if not isinstance(row, dict) or row.get("fn") != name:
                    raise ValueError(f"folder: {self._path} holds the results of {row!r}, expected those of {name!r}")
            elif row["error"] is None:
                self._lines[row["index"]] = row["item"], offset

    def find(self, index: int, item: Any) -> tuple[Any] | None:
        """The stored value of the item at this position, in a tuple, or None."""
        digest, offset = self._lines.pop(index, (None, 0))
        if digest is None or digest != _digest(item):
            return None
        row = jsonl.read_at(self._path, offset)
        return (plain_values.decode(row["value"]),)

    def add(self, index: int, result: TaskResult) -> None:
        """Stores a result before it is yielded."""
        row = {"index": index, "item": _digest(result.item), "error": result.error}
        if result.error is None:
            row["value"] = plain_values.encode(result.value)
        jsonl.append(self._path, row)


def _name(fn: Any) -> str:
    """What tells one function from another between runs."""
    if isinstance(fn, functools.partial):
        return f"partial({_name(fn.func)}, {_digest((fn.args, fn.keywords))})"
    if hasattr(fn, "__qualname__"):
        owner = getattr(fn, "__self__", None)
        return f"{fn.__module__}.{fn.__qualname__}" + ("" if owner is None else f" of {_digest(owner)}")
    return f"{type(fn).__module__}.{type(fn).__qualname__}({_digest(fn)})"


def _digest(item: Any) -> str:
    """A hash of an item's content that does not depend on the run (as the order of a pickled set does)."""
    state = hashlib.blake2b(digest_size=16)
    _absorb(state, item)
    return state.hexdigest()


def _absorb(state: Any, item: Any) -> None:
    def absorb(kind: str, parts: Iterable[Any], count: int) -> None:
        state.update(f"{kind}:{count}|".encode())
        for part in parts:
            _absorb(state, part)

    if item is None or isinstance(item, bool | int | float | complex | str | bytes | os.PathLike):
        text = f"{type(item).__name__}:{item!r}".encode()
        state.update(f"{len(text)}|".encode() + text)
    elif isinstance(item, np.ndarray) and item.dtype != object:
        state.update(f"array:{item.dtype.str}:{item.shape}|".encode() + np.ascontiguousarray(item).tobytes())
    elif type(item) in (tuple, list):
        absorb(type(item).__name__, item, len(item))
    elif type(item) is dict:
        absorb("dict", (part for pair in sorted(item.items(), key=repr) for part in pair), len(item))
    elif type(item) in (set, frozenset):
        absorb("set", sorted(item, key=_digest), len(item))
    elif dataclasses.is_dataclass(item) and not isinstance(item, type):
        fields = [(field.name, getattr(item, field.name)) for field in dataclasses.fields(item)]
        absorb(type(item).__qualname__, fields, len(fields))
    else:
        state.update(pickle.dumps(item, protocol=5))
