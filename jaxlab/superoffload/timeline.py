"""An engine that notes what runs when, and may pretend that a slow link lies between the two memories."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from jaxlab.superoffload.engine import Metrics, SuperOffload, TrainState
from jaxlab.superoffload.schedule import LANES, Intervals, Schedule


class TimedSuperOffload(SuperOffload):
    """`SuperOffload` with a measured `timeline()` of its last step, of the same form as a simulated schedule.

    What the accelerator computes is watched from a thread of its own, in the order in which it was asked for: a task
    begins when the one before has ended, or when it was asked for. On a machine whose host is the accelerator nothing
    is sent; `link_bw` makes up for that: every gradient, and every new weight, then sleeps as long as a link of so many
    bytes/s each way would take. Nothing else changes: results are those of `SuperOffload`, bit for bit.

    Args:
      loss: as for `SuperOffload`, like the other ones that are not named here.
      optimizer: an `AdamHyper`, or an Optax transformation.
      *args: further arguments.
      link_bw: bytes/s; None sends nothing.
      **settings: further arguments.
    """

    def __init__(self, loss: Any, optimizer: Any, *args: Any, link_bw: float | None = None, **settings: Any):
        super().__init__(loss, optimizer, *args, **settings)
        self._link_bw = link_bw
        self._spans: list[tuple[str, str, float, float]] = []
        self._lanes = {lane: ThreadPoolExecutor(1, f"superoffload-{lane}") for lane in ("gpu", "d2h", "h2d")}
        self._ends = dict.fromkeys(LANES, 0.0)
        self._sent: dict[int, Future] = {}
        self._watched: list[Future] = []
        self._returned: list[Future] = []
        self._lock = threading.Lock()
        self._began = self._ended = 0.0

    def __enter__(self) -> "TimedSuperOffload":
        return self

    def close(self) -> None:
        """Ends the worker and the threads that watch."""
        super().close()
        for lane in self._lanes.values():
            lane.shutdown()

    def _compile(self, layout: Any) -> None:
        super()._compile(layout)
        backward: Any = self._backward
        backward._forward = [self._seen(fn, f"forward {i}") for i, fn in enumerate(backward._forward)]
        backward._pullbacks = [
            self._seen(fn, f"backward {i}", lambda out: out[0]) for i, fn in enumerate(backward._pullbacks)
        ]
        backward._head = self._seen(backward._head, f"backward {len(layout.specs) - 1}", lambda out: out[1])
        rebuild, validate = self._seen(self._rebuild, "weights 0"), self._validate

        def rebuild_from_arrived(*args: Any) -> Any:
            for arrival in self._returned:
                arrival.result()
            return rebuild(*args)

        def validate_watched(*args: Any) -> Any:
            asked = time.perf_counter()
            verdict = validate(*args)
            self._watch("gpu", "validator", "verdict 0", verdict, asked)
            return verdict

        self._rebuild: Any = rebuild_from_arrived
        self._validate: Any = validate_watched

    def train_step(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """As `SuperOffload.train_step`."""
        self._spans.clear()
        self._sent.clear()
        self._returned.clear()
        self._began = time.perf_counter()
        made = super().train_step(state, batch)
        for watched in self._watched:
            watched.result()
        self._watched.clear()
        self._ended = time.perf_counter()
        return made

    def timeline(self) -> Schedule:
        """What the last step did, in seconds from its begin."""
        lanes: dict[str, Intervals] = {lane: [] for lane in LANES}
        for lane, label, start, end in sorted(self._spans, key=lambda span: span[2]):
            lanes[lane].append((label, start - self._began, end - self._began))
        took = self._ended - self._began
        busy = sum(end - start for _, start, end in lanes["gpu"])
        return Schedule(step_time=took, tflops=0.0, gpu_idle=max(0.0, 1 - busy / took), lanes=lanes, source="measured")

    def _seen(
        self, function: Callable[..., Any], label: str, sent: Callable[[Any], Any] = lambda out: ()
    ) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            asked = time.perf_counter()
            out = function(*args)
            self._watch("gpu", "gpu", label, out, asked)
            for g in sent(out):
                self._sent[id(g)] = self._send("d2h", f"send {label.split()[1]}", g.nbytes, g)
            return out

        return run

    def _watch(self, thread: str, lane: str, label: str, out: Any, asked: float) -> None:
        def wait() -> None:
            jax.block_until_ready(out)
            self._note(lane, label, max(asked, self._ends[thread]), time.perf_counter())
            self._ends[thread] = time.perf_counter()

        self._watched.append(self._lanes[thread].submit(wait))

    def _send(self, lane: str, label: str, nbytes: int, awaited: Any = ()) -> Future:
        def send() -> None:
            jax.block_until_ready(awaited)
            if self._link_bw is not None:
                start = time.perf_counter()
                time.sleep(nbytes / self._link_bw)
                self._note(lane, label, start, time.perf_counter())

        future = self._lanes[lane].submit(send)
        self._watched.append(future)
        return future

    def _note(self, lane: str, label: str, start: float, end: float) -> None:
        with self._lock:
            self._spans.append((lane, label, start, end))

    def _speculate(self, master: Any, b: int, g: Any, scale: Any, scalars: Any) -> Any:
        return self._timed("adam", b, g, super()._speculate, master, b, g, scale, scalars)

    def _step(self, master: Any, b: int, g: Any, scale: Any, coef: Any) -> Any:
        return self._timed("adam", b, g, super()._step, master, b, g, scale, coef)

    def _undo(self, new: Any, g: Any, count: Any, scalars: Any, log: Any) -> Any:
        return self._timed("undo", 0, None, super()._undo, new, g, count, scalars, log)

    def _timed(self, kind: str, b: int, g: Any, function: Callable[..., Any], *args: Any) -> Any:
        """Runs in the worker: waits until the gradient is there, then works, then sends the new weights off."""
        if g is not None:
            jax.block_until_ready(g)
            if id(g) in self._sent:
                self._sent[id(g)].result()
        start = time.perf_counter()
        out = jax.block_until_ready(function(*args))
        self._note("host", f"{kind} {b}", start, time.perf_counter())
        if g is not None:
            self._returned.append(self._send("h2d", f"return {b}", out[1].nbytes))
        return out
