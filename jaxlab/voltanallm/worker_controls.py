"""The control loops of all workers of an engine, beside the thread that owns it."""

import collections
import time
from collections.abc import Mapping
from typing import Any

from jaxlab.voltanallm.control_loop import ControlLoop, WorkerView

_TICK_S = 0.005  # between two looks at workers that run by themselves
_KEPT_S = 10.0  # how long arrivals are kept where no controller says


class WorkerControls:
    """Feeds every worker's controller, and lets its clock act on the engine where it is simulated.

    A plain `Engine` is one worker named "engine"; its iterations are lengthened by who calls `after_step`. The workers
    of a `DisaggregatedEngine` run by themselves and are told their pace.

    Args:
      engine: see above.
      gpu: a backend, or `{worker id: backend}`; None: none.
      controller: with `decide`, or `{worker id: controller}`; None: none.

    Raises:
      ValueError: an unknown worker, one backend for several workers, or a controller without a backend.
    """

    def __init__(self, engine: Any, gpu: Any = None, controller: Any = None):
        self._engine = engine
        self._own_steps = not hasattr(engine, "drain_metrics")
        phases: dict[Any, str] = (
            {"engine": "both"} if self._own_steps else {worker.id: worker.mode for worker in engine.workers()}
        )
        gpus, controllers = _each("gpu", gpu, phases), _each("controller", controller, phases)
        self._loops = {
            worker: ControlLoop(str(worker), phase, gpus.get(worker), controllers.get(worker))
            for worker, phase in phases.items()
        }
        self._told: dict[Any, tuple[float, int | None]] = {}
        self._arrivals: collections.deque[tuple[float, int]] = collections.deque()
        windows = [getattr(each, "window_s", _KEPT_S) for each in controllers.values()]
        self._kept_s = max(windows, default=_KEPT_S)
        self._ticked = 0.0

    def states(self) -> list[WorkerView]:
        """The workers as they were last seen; from any thread."""
        return [loop.view for loop in self._loops.values()]

    def command(
        self, mode: str, freq_mhz: int | None = None, slo_ms: float | None = None, worker: str | int | None = None
    ) -> None:
        """What an operator says, to one worker or to all that have a GPU.

        Args:
          mode: "set" pins the clock to `freq_mhz`, "unset" leaves it to the GPU, "auto" to the controller, "slo" gives
            the controller another objective.
          freq_mhz: see above.
          slo_ms: see above.
          worker: its name; None: all.

        Raises:
          ValueError: no such worker, clock or controller; then nothing has changed.
        """
        named = {str(key): loop for key, loop in self._loops.items()}
        if worker is not None and str(worker) not in named:
            raise ValueError(f"worker: expected one of {', '.join(named)}, got {worker!r}")
        with_clock = [loop for loop in named.values() if loop.has_clock]
        meant = [named[str(worker)]] if worker is not None else with_clock or list(named.values())
        for loop in meant:
            loop.check(mode, freq_mhz)
        for loop in meant:
            loop.command(mode, freq_mhz, slo_ms)
        self._tell()

    def start(self) -> None:
        """Sets the first clocks."""
        for loop in self._loops.values():
            loop.start()
        self._tell()

    def arrived(self, prompt_tokens: int) -> None:
        """A request has come."""
        self._arrivals.append((time.monotonic(), prompt_tokens))

    def before_step(self) -> None:
        """An iteration begins."""
        if self._own_steps:
            self._loops["engine"].load(True)

    def after_step(self, seconds: float) -> float:
        """An iteration took so long; gives how much longer it would have taken at the clock that is set."""
        if not self._own_steps:
            if time.monotonic() - self._ticked >= _TICK_S:
                self._tick_workers()
            return 0.0
        loop = self._loops["engine"]
        pause = seconds * (loop.pace - 1)
        loop.tick([self._engine.metrics()], self._recent(), time.monotonic())
        return pause

    def after_pause(self) -> None:
        """The iteration is over."""
        if self._own_steps:
            self._loops["engine"].load(False)

    def idle(self) -> None:
        """There is nothing to do."""
        if not self._own_steps:
            self._tick_workers()
            return
        loop = self._loops["engine"]
        loop.rest()
        loop.tick([], self._recent(), time.monotonic())

    def close(self) -> None:
        """Leaves all clocks to the GPUs."""
        for loop in self._loops.values():
            loop.close()

    def _recent(self) -> list[tuple[float, int]]:
        oldest = time.monotonic() - self._kept_s
        while self._arrivals and self._arrivals[0][0] < oldest:
            self._arrivals.popleft()
        return list(self._arrivals)

    def _tick_workers(self) -> None:
        self._ticked = now = time.monotonic()
        arrivals = self._recent()
        alike = collections.Counter(loop.view.phase for loop in self._loops.values())
        turn: collections.Counter[str] = collections.Counter()
        in_flight = {status.id: status.in_flight for status in self._engine.workers()}
        for worker, loop in self._loops.items():
            phase = loop.view.phase
            # Who got which request is not known here; thresholds are a worker's, so each is told its share.
            share = arrivals[turn[phase] :: alike[phase]]
            turn[phase] += 1
            loop.load(in_flight.get(worker, 0) > 0)
            if not in_flight.get(worker):
                loop.rest()
            loop.tick(self._engine.drain_metrics(worker), share, now)
        self._tell()

    def _tell(self) -> None:
        """Tells workers that run by themselves their pace and clock, where these have changed."""
        if self._own_steps:
            return
        for worker, loop in self._loops.items():
            told = loop.pace, loop.view.freq_mhz
            if self._told.get(worker) == told or told[1] is None:
                continue
            self._told[worker] = told
            self._engine.set_pace(worker, told[0])
            self._engine.status_freq(worker, told[1])


def _each(name: str, given: Any, workers: Mapping[Any, str]) -> dict[Any, Any]:
    """`{worker id: what it has}` of one thing for the only worker, or of a mapping."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        if len(workers) != 1:
            raise ValueError(f"{name}: expected one for each of the workers {', '.join(map(str, workers))}, got one")
        return dict.fromkeys(workers, given)
    unknown = [key for key in given if key not in workers]
    if unknown:
        raise ValueError(f"{name}: expected workers of {', '.join(map(str, workers))}, got {unknown[0]!r}")
    return dict(given)
