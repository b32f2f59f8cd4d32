"""Who sets a worker's clock while it works: its controller, an operator, or nobody.

A loop is used by the thread that owns the engine; `view` may be read by any.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

_LOG = logging.getLogger("jaxlab.voltanallm")

_COMPUTE = 0.4  # ours: of a decode iteration at the highest clock, the part that a lower clock stretches
_LOOK_S = 0.2  # between two readings of the energy, over which power is averaged


@dataclasses.dataclass(frozen=True)
class WorkerView:
    """A worker as its control loop last saw it.

    Attributes:
      id: its name.
      phase: "prefill" or "decode"; "both" of an engine that does both.
      mode: who sets the clock: "auto" the controller, "set" an operator, "unset" nobody.
      freq_mhz: its clock; None without a GPU.
      freqs_mhz: the clocks that its controller chooses from, ascending.
      slo_ms: the controller's objective; None without one.
      running: requests in its last iteration.
      waiting: requests that waited then.
      power_w: drawn on average since the reading before, by the energy counter; None without a GPU.
      energy_j: since the loop began; None without a GPU.
      switches: of the clock.
      simulated: whether clock, power and energy are a model's.
      trouble: why the GPU does not obey, if it does not.
    """

    id: str
    phase: str
    mode: str = "unset"
    freq_mhz: int | None = None
    freqs_mhz: tuple[int, ...] = ()
    slo_ms: float | None = None
    running: int = 0
    waiting: int = 0
    power_w: float | None = None
    energy_j: float | None = None
    switches: int = 0
    simulated: bool = False
    trouble: str | None = None


def slowdown(phase: str, freq: float, highest: float) -> float:
    """How many times as long an iteration takes as at the highest clock (a model of ours, for simulated clocks).

    Prefill is computation and takes 1/f; of decode only a part does, as reading weights and caches takes what it takes.
    """
    stretched = highest / freq
    return stretched if phase == "prefill" else 1 + _COMPUTE * (stretched - 1)


class ControlLoop:
    """One worker's clock.

    Args:
      worker: its name.
      phase: see `WorkerView`.
      gpu: a backend; None: there is no clock to set.
      controller: with `decide`; None: only operators set the clock.
    """

    def __init__(self, worker: str, phase: str, gpu: Any = None, controller: Any = None):
        if controller is not None and gpu is None:
            raise ValueError(f"gpu: expected one for worker {worker}, which has a controller, got none")
        self._gpu: Any = gpu
        self._controller: Any = controller
        self._set: int | None = None  # what the GPU was last told
        self._looked = 0.0  # when; never yet
        self._simulated = hasattr(gpu, "set_load")
        self._highest = max(gpu.supported_clocks()) if gpu is not None else 0
        self._energy_before = gpu.energy_j() if gpu is not None else 0.0
        self.view = WorkerView(
            worker,
            phase,
            mode="unset" if controller is None else "auto",
            freqs_mhz=tuple(controller.freqs) if controller is not None else (),
            slo_ms=getattr(controller, "slo_ms", None),
            simulated=self._simulated,
        )
        self._look()

    @property
    def pace(self) -> float:
        """How many times as long as at the highest clock the worker's iterations take; 1 on a real GPU."""
        if not self._simulated:
            return 1.0
        return slowdown(self.view.phase, self._gpu.clock(), self._highest)

    def load(self, busy: bool) -> None:
        """Tells a simulated GPU whether the worker computes."""
        if self._simulated:
            phase = "prefill" if self.view.phase == "prefill" else "decode"
            self._gpu.set_load(phase, 1.0 if busy else 0.0)

    def start(self) -> None:
        """Sets the first clock: the controller's, or the lowest where it needs to see something first."""
        self.tick([], (), time.monotonic())
        if self.view.mode == "auto" and self._set is None:
            self._guarded(lambda: self._obey(self._controller.freqs[0]))

    def tick(self, metrics: Sequence[Any], arrivals: Sequence[tuple[float, int]], now: float) -> None:
        """One wake-up. What goes wrong with the GPU or the controller is told by `view.trouble`; serving goes on.

        Args:
          metrics: of the worker's iterations since the last one.
          arrivals: (seconds, prompt tokens) of requests.
          now: seconds of `time.monotonic`, as all times here.
        """
        if self.view.mode == "auto":
            self._guarded(lambda: self._obey(self._controller.decide(metrics, arrivals, now)))
        last = metrics[-1] if metrics else None
        if last is not None and (last.running, last.waiting) != (self.view.running, self.view.waiting):
            self.view = dataclasses.replace(self.view, running=last.running, waiting=last.waiting)
        self._guarded(self._look)

    def rest(self) -> None:
        """The worker has nothing to do."""
        if self.view.running or self.view.waiting:
            self.view = dataclasses.replace(self.view, running=0, waiting=0)

    @property
    def has_clock(self) -> bool:
        """Whether there is a GPU."""
        return self._gpu is not None

    def check(self, mode: str, freq_mhz: int | None) -> None:
        """Raises the ValueError of a command that this worker cannot follow."""
        if self._gpu is None:
            raise ValueError(f"worker: expected one with a GPU, got {self.view.id}")
        if mode == "auto" and self._controller is None:
            raise ValueError(f"mode: expected set or unset, as worker {self.view.id} has no controller, got auto")
        if mode == "slo" and self.view.slo_ms is None:
            raise ValueError(f"mode: expected auto, set or unset, as worker {self.view.id} has no objective, got slo")
        supported = sorted(self._gpu.supported_clocks())
        if mode == "set" and freq_mhz not in supported:
            nearest = sorted(supported, key=lambda clock: abs(clock - (freq_mhz or 0)))[:2]
            raise ValueError(f"freq_mhz: expected a supported clock, the nearest are {sorted(nearest)}, got {freq_mhz}")

    def command(self, mode: str, freq_mhz: int | None, slo_ms: float | None) -> None:
        """What an operator says; checked by `check`."""
        if mode == "slo":
            self._controller.slo_ms = slo_ms
            self.view = dataclasses.replace(self.view, slo_ms=slo_ms)
            return
        self.view = dataclasses.replace(self.view, mode=mode, trouble=None)
        if mode == "set":
            self._guarded(lambda: self._obey(freq_mhz))
        elif mode == "unset":
            self._set = None
            self._gpu.reset()
        self._see_clock()

    def close(self) -> None:
        """Leaves the clock to the GPU."""
        if self._gpu is not None:
            self.load(False)
            self._gpu.reset()

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            if self.view.trouble is None:
                _LOG.warning("worker %s: its clock is not controlled any more: %s", self.view.id, error)
            self.view = dataclasses.replace(self.view, mode="unset", trouble=str(error) or type(error).__name__)

    def _obey(self, freq: int | None) -> None:
        if freq is None or freq == self._set:
            return
        self._gpu.set_clock(freq)
        self.view = dataclasses.replace(self.view, switches=self.view.switches + (self._set is not None))
        self._set = freq
        self._see_clock()

    def _see_clock(self) -> None:
        clock = self._gpu.clock()
        if clock != self.view.freq_mhz:
            self.view = dataclasses.replace(self.view, freq_mhz=clock)

    def _look(self) -> None:
        now = time.monotonic()
        if self._gpu is None or now - self._looked < _LOOK_S:
            return
        energy = self._gpu.energy_j() - self._energy_before
        power = (energy - (self.view.energy_j or 0.0)) / (now - self._looked) if self._looked else self._gpu.power_w()
        self._looked = now
        self.view = dataclasses.replace(self.view, freq_mhz=self._gpu.clock(), power_w=power, energy_j=energy)
