"""NVML and Zeus through modules that write down what they are told; clocks are handed back however a process ends."""

import signal
import subprocess
import sys
import types

import pytest

from jaxlab.core import MissingExtra
from jaxlab.voltanallm import GPUBackend, GPUUnavailableError, NVMLBackend, ZeusBackend
from tests.voltanallm.fake_nvml import Fake


def pretend(monkeypatch, **options):
    fake = Fake(**options)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


@pytest.mark.latest
def test_a_group_of_gpus_is_one(monkeypatch):
    fake = pretend(monkeypatch)
    before = signal.getsignal(signal.SIGTERM)
    with NVMLBackend((0, 1)) as gpu:
        assert isinstance(gpu, GPUBackend)
        assert gpu.supported_clocks() == (1005, 1410)  # of both, at the highest memory clock
        gpu.set_clock(1005)
        gpu.set_clock(1005)  # is not sent again
        assert gpu.clock() == 1005
        assert gpu.power_w() == pytest.approx(201.001)
        assert gpu.energy_j() == 0.0
        fake.energy_mj = {0: 5_001_500, 1: 7_000_500}
        assert gpu.energy_j() == pytest.approx(2.0)
        fake.energy_mj = {0: 250, 1: 7_000_500}  # the first one's driver was loaded anew
        assert gpu.energy_j() == pytest.approx(2.25)
        gpu.set_clock(1410)
        assert gpu.controls
    assert fake.calls == [
        ("init",),
        ("lock", 0, 1005, 1005),
        ("lock", 1, 1005, 1005),
        ("lock", 0, 1410, 1410),
        ("lock", 1, 1410, 1410),
        ("reset", 0),
        ("reset", 1),
        ("shutdown",),
    ]
    gpu.close()
    assert fake.calls[-1] == ("shutdown",)
    assert len(fake.calls) == 8
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_clock_that_was_reset_is_sent_again(monkeypatch):
    fake = pretend(monkeypatch)
    with NVMLBackend() as gpu:
        gpu.reset()  # nothing is pinned
        gpu.set_clock(1095)
        gpu.reset()
        gpu.set_clock(1095)
    locks = [call for call in fake.calls if call[0] in ("lock", "reset")]
    assert locks == [("lock", 0, 1095, 1095), ("reset", 0), ("lock", 0, 1095, 1095), ("reset", 0)]


def test_denied(monkeypatch):
    fake = pretend(monkeypatch, denied=(2,))
    with NVMLBackend((0, 2)) as gpu, pytest.raises(PermissionError, match=r"GPU 2: that needs root.*monitor"):
        gpu.set_clock(1005)
    assert fake.calls[1:3] == [("lock", 0, 1005, 1005), ("reset", 0)]  # the first one does not stay pinned
    with NVMLBackend((2,), on_denied="monitor") as gpu:
        with pytest.warns(RuntimeWarning, match="only observes"):
            gpu.set_clock(1005)
        gpu.set_clock(1095)  # says nothing more
        assert not gpu.controls
        assert gpu.power_w() > 0
        with pytest.raises(ValueError, match="supported"):
            gpu.set_clock(1)


def test_failures(monkeypatch, unchecked):
    fake = pretend(monkeypatch, broken=(2,))
    with NVMLBackend((0, 2)) as gpu, pytest.raises(GPUUnavailableError, match="GPU is lost"):
        gpu.set_clock(1005)
    assert fake.clocks == {0: 1410, 1: 1410, 2: 1410}
    with NVMLBackend() as gpu, pytest.raises(ValueError, match="nearest are 1005 MHz and 1095 MHz, got 1050"):
        gpu.set_clock(1050)
    with pytest.raises(GPUUnavailableError, match=r"nvmlDeviceGetHandleByIndex failed for GPUs \(9,\)"):
        NVMLBackend((9,))
    assert fake.calls[-1] == ("shutdown",)
    for arguments, options in (((), {}), ((0, 0), {})):
        with pytest.raises(ValueError, match="indices"):
            NVMLBackend(arguments, **options)
    with pytest.raises(ValueError, match="on_denied"):
        NVMLBackend(on_denied="ignore")
    pretend(monkeypatch, present=False)
    with pytest.raises(GPUUnavailableError, match="Library Not Found"):
        NVMLBackend()
    assert issubclass(GPUUnavailableError, RuntimeError)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MissingExtra, match=r"jaxlab\[serving\]"):
        NVMLBackend()


def test_clocks_are_handed_back_however_a_process_ends(tmp_path):
    ends = {"term": -signal.SIGTERM, "handled": 7, "exit": 0, "raise": 1}
    running = {
        end: subprocess.Popen(
            [sys.executable, "-m", "tests.voltanallm.fake_nvml", str(tmp_path / end), end],
            stderr=subprocess.PIPE,
            text=True,
        )
        for end in ends
    }
    for end, code in ends.items():
        _, errors = running[end].communicate(timeout=60)
        assert running[end].returncode == code, errors
        lines = (tmp_path / end).read_text().splitlines()
        assert lines == ["init", "lock 0 1005 1005", "lock 2 1005 1005", "reset 0", "reset 2", "shutdown"], end


class Zeus:
    """What the adapter calls of Zeus."""

    def __init__(self, error=None):
        self.calls, self.error, self.energy_mj = [], error, [1000, 2000]

    def __len__(self):
        return 2

    def get_supported_memory_clocks(self, index):
        return [810, 1593]

    def get_supported_graphics_clocks(self, index, memory):
        return [1410, 1005] if memory == 1593 else [210]

    def set_gpu_locked_clocks(self, index, low, high):
        if self.error:
            raise self.error
        self.calls.append(("lock", index, low, high))

    def reset_gpu_locked_clocks(self, index):
        self.calls.append(("reset", index))

    def get_instant_power_usage(self, index):
        return 90_000

    def get_total_energy_consumption(self, index):
        return self.energy_mj[index]


class ZeusMonitor:
    def __init__(self, gpu_indices):
        self.indices, self.open = gpu_indices, []

    def begin_window(self, name):
        self.open.append(name)

    def end_window(self, name):
        self.open.remove(name)
        return types.SimpleNamespace(time=2.0, gpu_energy={index: 10.0 + index for index in self.indices})


class ZeusGPUNoPermissionError(Exception):
    pass


def pretend_zeus(monkeypatch, gpus):
    device, monitor = types.ModuleType("zeus.device"), types.ModuleType("zeus.monitor")
    device.get_gpus, monitor.ZeusMonitor = lambda: gpus, ZeusMonitor
    for name, module in (("zeus", types.ModuleType("zeus")), ("zeus.device", device), ("zeus.monitor", monitor)):
        monkeypatch.setitem(sys.modules, name, module)
    return device


def test_zeus(monkeypatch):
    fake = Zeus()
    pretend_zeus(monkeypatch, fake)
    with ZeusBackend((0, 1)) as gpu:
        assert isinstance(gpu, GPUBackend)
        assert gpu.supported_clocks() == (1005, 1410)
        assert gpu.clock() == 1410
        gpu.set_clock(1005)
        gpu.set_clock(1005)
        assert gpu.clock() == 1005
        fake.energy_mj = [1500, 2250]
        assert gpu.energy_j() == pytest.approx(0.75)
        assert gpu.power_w() == 180.0
        with pytest.raises(ValueError, match="a window that was begun"):
            gpu.end_window("slice")
        gpu.begin_window("slice")
        assert gpu.end_window("slice") == (2.0, 21.0)
        with pytest.raises(ValueError, match="nearest are 1005 MHz and 1410 MHz"):
            gpu.set_clock(1200)
    assert fake.calls == [("lock", 0, 1005, 1005), ("lock", 1, 1005, 1005), ("reset", 0), ("reset", 1)]


def test_zeus_refuses(monkeypatch):
    monkeypatch.setitem(sys.modules, "zeus", None)
    with pytest.raises(MissingExtra, match="pip install zeus"):
        ZeusBackend()
    device = pretend_zeus(monkeypatch, Zeus(ZeusGPUNoPermissionError("no")))
    with ZeusBackend() as gpu, pytest.raises(PermissionError, match="root or its daemon"):
        gpu.set_clock(1005)
    pretend_zeus(monkeypatch, Zeus(OSError("bus")))
    with ZeusBackend() as gpu, pytest.raises(OSError, match="bus"):
        gpu.set_clock(1005)
    with pytest.raises(GPUUnavailableError, match="finds 2 GPUs"):
        ZeusBackend((2,))
    with pytest.raises(ValueError, match="indices"):
        ZeusBackend(())

    def none():
        raise RuntimeError("NVML is not here")

    device = pretend_zeus(monkeypatch, None)
    device.get_gpus = none
    with pytest.raises(GPUUnavailableError, match="NVML is not here"):
        ZeusBackend()
