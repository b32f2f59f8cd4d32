"""The workers of a disaggregated engine: who works where, whether they live, and starting those that died again."""

import collections
import dataclasses
import queue
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxlab.inference.roles import WorkerStats
from jaxlab.inference.serving import IterationMetrics
from jaxlab.inference.transfer import RequestFailed

_METRICS_KEPT = 10_000  # of a worker whose metrics nobody drains


class WorkerLost(RequestFailed):
    """The worker that had a request died, as did the one before it, or there is none left to give it to."""


@dataclasses.dataclass(frozen=True)
class WorkerStatus:
    """A worker as those who choose between workers see it.

    Attributes:
        id: its name.
        mode: "prefill" or "decode".
        in_flight: requests given to it and not finished; for a decode worker those that are still prefilled too.
        freq: MHz, as `status_freq` was told last.
        load: tokens whose keys and values it holds, and prompt tokens that wait for it.
        last_itl_ms: what its last iteration took.
        timestamp: when it was heard of last, by `time.monotonic`.
    """

    id: str
    mode: str
    in_flight: int
    freq: float
    load: int
    last_itl_ms: float
    timestamp: float


@dataclasses.dataclass(eq=False)
class Slot:
    """The place of a worker; who works there may change.

    Attributes:
        id: its name.
        mode: "prefill" or "decode".
        starts_left: how often somebody may yet be started here.
        worker: who works here, or is being started; None where nobody does, nor will.
        ready: whether it takes requests.
        requests: given to it and not finished.
        stats: its latest.
        metrics: since they were drained.
        freq: MHz that it is said to run at.
        pace: how many times as long its iterations take.
        model_config: of the model it serves.
        failure: why it could not be started.
    """

    id: str
    mode: str
    starts_left: int
    worker: Any = None
    ready: bool = False
    requests: set[int] = dataclasses.field(default_factory=set)
    stats: WorkerStats | None = None
    metrics: collections.deque[IterationMetrics] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_METRICS_KEPT)
    )
    freq: float = 0.0
    pace: float = 1.0
    model_config: Any = None
    failure: Exception | None = None
    start_by: float = float("inf")

    def order(self, word: str, *arguments: Any) -> None:
        """Tells who works here to call `word`; where nobody does nothing happens."""
        if self.worker is not None:
            self.worker.order(word, *arguments)

    def status(self) -> WorkerStatus:
        """As those who choose see it."""
        stats = self.stats
        return WorkerStatus(
            id=self.id,
            mode=self.mode,
            in_flight=len(self.requests),
            freq=self.freq,
            load=0 if stats is None else stats.load,
            last_itl_ms=0.0 if stats is None else stats.last_itl_ms,
            timestamp=self.worker.heard_at,
        )


class LocalWorker:
    """A role that lives in this process, with the methods of a `WorkerProcess`; `step` moves it on.

    Args:
        role: `emit -> PrefillWorker | DecodeWorker`.
        deliver: as `WorkerProcess`.
    """

    pid = None

    def __init__(self, role: Callable[..., Any], deliver: Callable[..., None]):
        self._deliver = deliver
        self._role = role(lambda *event: deliver(self, *event))
        self._role.tell_stats()
        deliver(self, "ready", self._role.engine.model.config)

    @property
    def heard_at(self) -> float:
        """It is always heard of."""
        return time.monotonic()

    @property
    def idle_s(self) -> float:
        """How long `step` has nothing to do."""
        return self._role.idle_s

    def order(self, word: str, *arguments: Any) -> None:
        """Calls `word`."""
        getattr(self._role, word)(*arguments)

    def ask(self, number: int, method: str, *arguments: Any) -> None:
        """Calls a method of its engine, whose errors are the caller's."""
        self._deliver(self, "answer", number, getattr(self._role.engine, method)(*arguments))
        self._role.tell_stats()

    def step(self) -> bool:
        """See `Worker`."""
        return self._role.step()

    def close(self) -> None:
        """Frees what it holds."""
        self._role.close()


class Crew:
    """Slots and their workers.

    Args:
        counts: how many workers of each mode.
        make: `(slot, deliver) -> WorkerProcess | LocalWorker`.
        restarts: how often each may be started again.
        start_timeout_s: a worker that is not ready by then is killed.
        heartbeat_timeout_s: a worker that is not heard of for so long is killed.
    """

    def __init__(
        self,
        counts: Mapping[str, int],
        make: Callable[..., Any],
        *,
        restarts: int = 0,
        start_timeout_s: float = 300.0,
        heartbeat_timeout_s: float = 30.0,
    ):
        self._make, self._start_timeout_s, self._heartbeat_timeout_s = make, start_timeout_s, heartbeat_timeout_s
        self._inbox: queue.SimpleQueue[tuple[Slot, Any, tuple[Any, ...]]] = queue.SimpleQueue()
        self._closed = False
        self.slots = {
            f"{mode}-{index}": Slot(f"{mode}-{index}", mode, restarts + 1)
            for mode, count in counts.items()
            for index in range(count)
        }
        try:
            for slot in self.slots.values():
                self._start(slot)
        except BaseException:
            self.close()
            raise

    def wait(self) -> None:
        """Waits until all are ready.

        Raises:
            WorkerLost: one cannot be started; all are ended. Where it said why, that is raised.
        """
        while not all(slot.ready for slot in self.slots.values()):
            self.poll(0.1)
            for slot in self.slots.values():
                if slot.failure is not None or slot.worker is None:
                    self.close()
                    raise slot.failure or WorkerLost(f"worker {slot.id} dies when it is started")

    def of(self, mode: str, *, ready: bool = False) -> list[Slot]:
        """Slots of a mode where somebody works, or (`ready`) takes requests."""
        return [slot for slot in self.slots.values() if slot.mode == mode and slot.worker and (slot.ready or not ready)]

    def poll(self, timeout_s: float) -> list[tuple[Slot, str, tuple[Any, ...]]]:
        """What workers told, waiting a little for the first of it. "died" comes after a slot got, or lost, its next."""
        self._watch()
        local = [slot.worker for slot in self.slots.values() if isinstance(slot.worker, LocalWorker)]
        if timeout_s > 0:
            moved = [worker.step() for worker in local]
            timeout_s = 0.0 if any(moved) else min([timeout_s, *(worker.idle_s for worker in local)])
        events = []
        while True:
            try:
                slot, worker, (event, *arguments) = self._inbox.get(block=timeout_s > 0, timeout=timeout_s or None)
            except queue.Empty:
                return events
            timeout_s = 0.0
            if worker is slot.worker:
                self._note(slot, event, arguments)
                events.append((slot, event, tuple(arguments)))

    def close(self) -> None:
        """Ends all workers."""
        self._closed = True
        workers = [slot.worker for slot in self.slots.values() if slot.worker is not None]
        for worker in workers:
            worker.order("close")
        for slot in self.slots.values():
            slot.worker, slot.ready = None, False
        for worker in workers:
            worker.close()

    def _start(self, slot: Slot) -> None:
        def deliver(worker: Any, *event: Any) -> None:
            self._inbox.put((slot, worker, event))

        slot.starts_left -= 1
        slot.start_by = time.monotonic() + self._start_timeout_s
        slot.worker = self._make(slot, deliver)

    def _note(self, slot: Slot, event: str, arguments: Any) -> None:
        if event == "stats":
            (slot.stats,) = arguments
        elif event == "metrics":
            slot.metrics.append(arguments[0])
        elif event == "ready":
            slot.ready, slot.model_config = True, arguments[0]
            slot.order("pace", slot.pace)
        elif event == "failed":
            (slot.failure,) = arguments
        elif event == "died":
            slot.worker.close()
            slot.worker, slot.ready, slot.stats = None, False, None
            if slot.starts_left > 0 and not self._closed:
                self._start(slot)

    def _watch(self) -> None:
        now = time.monotonic()
        for slot in self.slots.values():
            if slot.worker is not None and slot.worker.pid is not None:
                late = not slot.ready and now > slot.start_by
                if late or now - slot.worker.heard_at > self._heartbeat_timeout_s:
                    slot.worker.kill()
