"""The clocks and meters of GPUs: what a backend can do, and one that is simulated."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from jaxlab.voltanallm.config import Phase, check_clock, check_clocks
from jaxlab.voltanallm.power import PowerModel


class GPUUnavailableError(RuntimeError):
    """There is no GPU, driver or counter of the kind asked for."""


@runtime_checkable
class GPUBackend(Protocol):
    """One worker's GPU, or the group of GPUs that it runs on as one."""

    def supported_clocks(self) -> tuple[int, ...]:
        """MHz that `set_clock` takes, ascending."""
        ...

    def set_clock(self, mhz: int) -> None:
        """Pins the SM clock; ValueError with the nearest ones if it is not supported."""
        ...

    def reset(self) -> None:
        """Hands the clock back."""
        ...

    def clock(self) -> int:
        """MHz now."""
        ...

    def power_w(self) -> float:
        """Watts now, over all GPUs."""
        ...

    def energy_j(self) -> float:
        """Joules since the backend was opened, over all GPUs."""
        ...


class SimulatedGPU:
    """A GPU of a power model: clocks act late, energy is power integrated over time. It is idle until `set_load`.

    Safe to use from several threads.

    Args:
      supported: its clocks in MHz; it starts at the highest.
      power: its power; None: `PowerModel` with the highest clock as f_max.
      switch_ms: from `set_clock` until the clock has changed (ours).
      time_fn: seconds.

    Raises:
      ValueError: no clocks, one twice, one above the power model's, or a negative `switch_ms`.
    """

    def __init__(
        self,
        supported: Sequence[int],
        *,
        power: PowerModel | None = None,
        switch_ms: float = 10.0,
        time_fn: Callable[[], float] = time.monotonic,
    ):
        self._supported = check_clocks(supported, least=1, name="supported")
        self._power = PowerModel(max_mhz=self._supported[-1]) if power is None else power
        highest = self._supported[-1]
        if highest > self._power.max_mhz:
            raise ValueError(
                f"supported: expected clocks up to the power model's {self._power.max_mhz} MHz, got {highest}"
            )
        if not switch_ms >= 0:
            raise ValueError(f"switch_ms: expected at least 0, got {switch_ms}")
        self._switch_s = switch_ms / 1000
        self._now = time_fn
        self._time = time_fn()
        self._clock = self._target = highest
        self._pending: list[tuple[float, int]] = []
        self._load: tuple[Phase, float] = ("decode", 0.0)
        self._joules = 0.0
        self._lock = threading.Lock()

    def supported_clocks(self) -> tuple[int, ...]:
        """MHz, ascending."""
        return self._supported

    def set_clock(self, mhz: int) -> None:
        """Asks for a clock, which is there `switch_ms` later.

        Raises:
          ValueError: not supported; the neighbours are named.
        """
        check_clock("mhz", mhz, self._supported)
        with self._lock:
            self._advance()
            if mhz != self._target:
                self._target = int(mhz)
                self._pending.append((self._time + self._switch_s, self._target))
                self._advance()

    def reset(self) -> None:
        """Goes back to the highest clock."""
        self.set_clock(self._supported[-1])

    def set_load(self, phase: Phase, utilisation: float) -> None:
        """What it does from now on.

        Args:
          phase: "decode" or "prefill".
          utilisation: 0 (idle) to 1.

        Raises:
          ValueError: an argument out of range.
        """
        self._power.power_w(self._supported[-1], phase, utilisation)
        with self._lock:
            self._advance()
            self._load = (phase, float(utilisation))

    def clock(self) -> int:
        """MHz now."""
        with self._lock:
            self._advance()
            return self._clock

    def power_w(self) -> float:
        """Watts now."""
        with self._lock:
            self._advance()
            return self._watts()

    def energy_j(self) -> float:
        """Joules since it was made."""
        with self._lock:
            self._advance()
            return self._joules

    def _watts(self) -> float:
        return self._power.power_w(self._clock, *self._load)

    def _advance(self) -> None:
        """Integrates up to now, through the clock changes that have come due."""
        now = max(self._now(), self._time)
        while self._pending and self._pending[0][0] <= now:
            due, clock = self._pending.pop(0)
            self._joules += self._watts() * (due - self._time)
            self._time, self._clock = due, clock
        self._joules += self._watts() * (now - self._time)
        self._time = now
