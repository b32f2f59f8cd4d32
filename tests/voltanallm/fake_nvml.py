"""A `pynvml` of made-up GPUs that writes down what it is told; `python -m tests.voltanallm.fake_nvml LOG END`.

As a program it pins a clock and ends by SIGTERM ("term"), at the end of the interpreter ("exit"), or by an exception.
"""

import os
import signal
import sys
import types


class NVMLError(Exception):
    pass


class NVMLError_NoPermission(NVMLError):
    pass


class NVMLError_LibraryNotFound(NVMLError):
    pass


class Fake(types.ModuleType):
    """GPUs support 1005, 1095 and 1410 MHz at their highest memory clock; the second one lacks 1095."""

    NVML_CLOCK_SM = 1
    NVMLError = NVMLError
    NVMLError_NoPermission = NVMLError_NoPermission

    def __init__(self, *, denied=(), broken=(), present=True, log=None):
        super().__init__("pynvml")
        self.calls, self.log = [], log
        self.denied, self.broken, self.present = denied, broken, present
        self.energy_mj = {0: 5_000_000, 1: 7_000_000, 2: 0}
        self.clocks = dict.fromkeys(self.energy_mj, 1410)

    def _said(self, *call):
        self.calls.append(call)
        if self.log:
            with open(self.log, "a") as file:
                file.write(" ".join(map(str, call)) + "\n")

    def nvmlInit(self):
        if not self.present:
            raise NVMLError_LibraryNotFound("NVML Shared Library Not Found")
        self._said("init")

    def nvmlShutdown(self):
        self._said("shutdown")

    def nvmlDeviceGetHandleByIndex(self, index):
        if index not in self.energy_mj:
            raise NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetSupportedMemoryClocks(self, handle):
        return [810, 1593]

    def nvmlDeviceGetSupportedGraphicsClocks(self, handle, memory):
        if memory == 810:
            return [210]
        return [1410, 1005] if handle == 1 else [1410, 1095, 1005]

    def nvmlDeviceSetGpuLockedClocks(self, handle, low, high):
        if handle in self.denied:
            raise NVMLError_NoPermission("Insufficient Permissions")
        if handle in self.broken:
            raise NVMLError("GPU is lost")
        self._said("lock", handle, low, high)
        self.clocks[handle] = high

    def nvmlDeviceResetGpuLockedClocks(self, handle):
        self._said("reset", handle)
        self.clocks[handle] = 1410

    def nvmlDeviceGetClockInfo(self, handle, kind):
        assert kind == self.NVML_CLOCK_SM
        return self.clocks[handle]

    def nvmlDeviceGetPowerUsage(self, handle):
        return 100_500 + handle

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self.energy_mj[handle]


if __name__ == "__main__":
    LOG, END = sys.argv[1:]
    sys.modules["pynvml"] = Fake(log=LOG)
    from jaxlab.voltanallm import NVMLBackend

    if END == "handled":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    backend = NVMLBackend((0, 2))
    backend.set_clock(1005)
    if END in ("term", "handled"):
        os.kill(os.getpid(), signal.SIGTERM)
    elif END == "raise":
        raise RuntimeError("the worker fails")
