"""Clocks and energy counters through Zeus, which knows several vendors' GPUs (https://ml.energy/zeus)."""

import importlib
import math
from collections.abc import Sequence
from typing import Any

from jaxlab.core.errors import MissingExtra
from jaxlab.voltanallm.config import check_clock
from jaxlab.voltanallm.gpu import GPUUnavailableError
from jaxlab.voltanallm.nvml import EnergyCounter, ResetOnExit


class ZeusBackend:
    """The GPUs of one worker, as `NVMLBackend`, through Zeus.

    Args:
      indices: Zeus's numbers of the GPUs, one group of tensor parallelism.

    Raises:
      MissingExtra: Zeus is not installed (`pip install zeus`; it is in no extra of ours).
      GPUUnavailableError: Zeus finds no such GPU.
      ValueError: no indices, or one twice.
    """

    def __init__(self, indices: Sequence[int] = (0,)):
        if not indices or len(set(indices)) != len(indices):
            raise ValueError(f"indices: expected different GPUs, at least one, got {tuple(indices)}")
        device = _zeus("zeus.device")
        try:
            self._gpus = device.get_gpus()
        except Exception as error:  # Zeus's own, by vendor
            raise GPUUnavailableError(f"Zeus finds no GPU: {error}") from error
        if max(indices) >= len(self._gpus):
            raise GPUUnavailableError(f"Zeus finds {len(self._gpus)} GPUs, expected one with index {max(indices)}")
        self._indices = tuple(indices)
        self._supported = self._common_clocks()
        self._locked: int | None = None
        self._energy = EnergyCounter(self._counters)
        self._monitor: Any = None
        self._guard = ResetOnExit(self.reset)

    def __enter__(self) -> "ZeusBackend":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Hands the clocks back; a second call does nothing."""
        self._guard.close()

    def supported_clocks(self) -> tuple[int, ...]:
        """MHz that every GPU of the group supports, ascending."""
        return self._supported

    def set_clock(self, mhz: int) -> None:
        """Pins the SM clock of every GPU; the one that is pinned already is not sent again.

        Raises:
          ValueError: not supported; the neighbours are named.
          PermissionError: Zeus says that the right is missing; no GPU stays pinned.
        """
        check_clock("mhz", mhz, self._supported)
        if mhz == self._locked:
            return
        try:
            for index in self._indices:
                self._gpus.set_gpu_locked_clocks(index, mhz, mhz)
        except Exception as error:
            self._unlock()
            if "permission" not in f"{type(error).__name__} {error}".lower():
                raise
            raise PermissionError(
                f"Zeus may not set the clocks of GPUs {self._indices}: that needs root or its daemon ({error})"
            ) from error
        self._locked = mhz

    def reset(self) -> None:
        """Hands the clocks back to the driver."""
        if self._locked is not None:
            self._unlock()

    def clock(self) -> int:
        """MHz that is pinned, else the highest supported: Zeus does not read clocks."""
        return self._supported[-1] if self._locked is None else self._locked

    def power_w(self) -> float:
        """Watts, summed."""
        return sum(self._gpus.get_instant_power_usage(index) for index in self._indices) / 1000

    def energy_j(self) -> float:
        """Joules since this was opened, summed."""
        return self._energy.joules()

    def begin_window(self, name: str) -> None:
        """Begins a measurement of Zeus's monitor."""
        if self._monitor is None:
            self._monitor = _zeus("zeus.monitor").ZeusMonitor(gpu_indices=list(self._indices))
        self._monitor.begin_window(name)

    def end_window(self, name: str) -> tuple[float, float]:
        """Ends it.

        Returns:
          Seconds, and joules summed over the GPUs.

        Raises:
          ValueError: no window was begun.
        """
        if self._monitor is None:
            raise ValueError(f"name: expected a window that was begun, got {name!r}")
        window = self._monitor.end_window(name)
        return window.time, math.fsum(window.gpu_energy.values())

    def _counters(self) -> list[int]:
        return [self._gpus.get_total_energy_consumption(index) for index in self._indices]

    def _common_clocks(self) -> tuple[int, ...]:
        memory = [max(self._gpus.get_supported_memory_clocks(index)) for index in self._indices]
        clocks = [set(self._gpus.get_supported_graphics_clocks(*each)) for each in zip(self._indices, memory)]
        return tuple(sorted(set.intersection(*clocks)))

    def _unlock(self) -> None:
        self._locked = None
        for index in self._indices:
            self._gpus.reset_gpu_locked_clocks(index)


def _zeus(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{module} is not installed: pip install zeus") from error
