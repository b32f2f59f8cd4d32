"""Clocks and energy counters of NVIDIA GPUs through NVML (`nvidia-ml-py`, extra "serving")."""

import atexit
import os
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Literal

from jaxlab.core.errors import require
from jaxlab.voltanallm.config import check_clock
from jaxlab.voltanallm.gpu import GPUUnavailableError

_DENIED = (
    "NVML may not set the clock of GPU {index}: that needs root, or an administrator's helper that sets it for you; "
    'on_denied="monitor" only observes'
)


class ResetOnExit:
    """Calls a function once: when told, when the interpreter ends, or on SIGTERM, whose former handler then goes on.

    Args:
      reset: the function.
    """

    def __init__(self, reset: Callable[[], None]):
        self._reset = reset
        self._done = False
        self._former: Any = None
        atexit.register(self.close)
        self._signals = threading.current_thread() is threading.main_thread()  # only that one may take signals
        if self._signals:
            self._former = signal.signal(signal.SIGTERM, self._terminate)

    def close(self) -> None:
        """Calls the function, the first time, and takes the handlers back."""
        if self._done:
            return
        self._done = True
        atexit.unregister(self.close)
        here = threading.current_thread() is threading.main_thread()
        if self._signals and here and signal.getsignal(signal.SIGTERM) == self._terminate:
            signal.signal(signal.SIGTERM, self._former or signal.SIG_DFL)
        self._reset()

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        try:
            self.close()
        finally:
            if callable(self._former):
                self._former(number, frame)
            elif self._former != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)


class EnergyCounter:
    """Joules since it was made, from counters of millijoules that may start again at 0 when a driver is reloaded.

    Args:
      read: the counters now, one a GPU.
    """

    def __init__(self, read: Callable[[], Sequence[int]]):
        self._read = read
        self._last = list(read())
        self._millijoules = 0

    def joules(self) -> float:
        """Summed over the GPUs."""
        now = list(self._read())
        self._millijoules += sum(new - old if new >= old else new for new, old in zip(now, self._last))
        self._last = now
        return self._millijoules / 1000


class NVMLBackend:
    """The GPUs of one worker: clocks set alike, power and energy summed. Their clocks are handed back when it closes.

    It closes at the end of a `with` block, at the end of the interpreter, and on SIGTERM.

    Args:
      indices: NVML's numbers of the GPUs, one group of tensor parallelism.
      on_denied: without the right to set clocks "raise", or "monitor": warn once and only observe.

    Attributes:
      controls: False once the right was denied.

    Raises:
      MissingExtra: nvidia-ml-py is not installed.
      GPUUnavailableError: no driver, no such GPU, or a counter that it lacks.
      ValueError: no indices, one twice, or an unknown `on_denied`.
    """

    def __init__(self, indices: Sequence[int] = (0,), *, on_denied: Literal["raise", "monitor"] = "raise"):
        if not indices or len(set(indices)) != len(indices):
            raise ValueError(f"indices: expected different GPUs, at least one, got {tuple(indices)}")
        if on_denied not in ("raise", "monitor"):
            raise ValueError(f"on_denied: expected raise or monitor, got {on_denied!r}")
        self._nvml = require("pynvml", "serving")
        self._indices = tuple(indices)
        self._on_denied = on_denied
        self.controls = True
        self._locked: int | None = None
        self._call("nvmlInit")
        try:
            self._handles = [self._call("nvmlDeviceGetHandleByIndex", index) for index in self._indices]
            self._supported = self._common_clocks()
            self._energy = EnergyCounter(self._counters)
        except BaseException:
            self._nvml.nvmlShutdown()
            raise
        self._guard = ResetOnExit(self._shut_down)

    def __enter__(self) -> "NVMLBackend":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Hands the clocks back and lets go of NVML; a second call does nothing."""
        self._guard.close()

    def supported_clocks(self) -> tuple[int, ...]:
        """MHz that every GPU of the group supports at its highest memory clock, ascending."""
        return self._supported

    def set_clock(self, mhz: int) -> None:
        """Pins the SM clock of every GPU; the one that is pinned already is not sent again.

        Raises:
          ValueError: not supported; the neighbours are named.
          PermissionError: denied, with `on_denied="raise"`; no GPU stays pinned.
          GPUUnavailableError: NVML fails.
        """
        check_clock("mhz", mhz, self._supported)
        if mhz == self._locked or not self.controls:
            return
        pinned = 0
        try:
            for handle in self._handles:
                self._call("nvmlDeviceSetGpuLockedClocks", handle, mhz, mhz)
                pinned += 1
        except (PermissionError, GPUUnavailableError) as error:
            self._unlock(self._handles[:pinned])
            if not isinstance(error, PermissionError):
                raise
            denied = _DENIED.format(index=self._indices[pinned])
            if self._on_denied == "raise":
                raise PermissionError(denied) from error
            self.controls = False
            warnings.warn(denied, RuntimeWarning, stacklevel=2)
            return
        self._locked = mhz

    def reset(self) -> None:
        """Hands the clocks back to the driver.

        Raises:
          GPUUnavailableError: NVML fails.
        """
        if self._locked is not None:
            self._unlock(self._handles)

    def clock(self) -> int:
        """MHz of the SMs of the last GPU, as in the official monitor."""
        return self._call("nvmlDeviceGetClockInfo", self._handles[-1], self._nvml.NVML_CLOCK_SM)

    def power_w(self) -> float:
        """Watts, summed. The driver's average over some time: integrate `energy_j`, not this."""
        return sum(self._call("nvmlDeviceGetPowerUsage", handle) for handle in self._handles) / 1000

    def energy_j(self) -> float:
        """Joules since this was opened, summed."""
        return self._energy.joules()

    def _counters(self) -> list[int]:
        return [self._call("nvmlDeviceGetTotalEnergyConsumption", handle) for handle in self._handles]

    def _common_clocks(self) -> tuple[int, ...]:
        common: set[int] | None = None
        for handle in self._handles:
            memory = max(self._call("nvmlDeviceGetSupportedMemoryClocks", handle))
            clocks = set(self._call("nvmlDeviceGetSupportedGraphicsClocks", handle, memory))
            common = clocks if common is None else common & clocks
        return tuple(sorted(common or ()))

    def _unlock(self, handles: Sequence[Any]) -> None:
        self._locked = None
        for handle in handles:
            self._call("nvmlDeviceResetGpuLockedClocks", handle)

    def _shut_down(self) -> None:
        try:
            self.reset()
        finally:
            self._nvml.nvmlShutdown()

    def _call(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError as error:
            if isinstance(error, self._nvml.NVMLError_NoPermission):
                raise PermissionError(f"{function}: {error}") from error
            raise GPUUnavailableError(f"NVML: {function} failed for GPUs {self._indices}: {error}") from error
