"""The calibration's numbers, the U of energy against clock, and a simulated GPU whose meter is checked by summing."""

import numpy as np
import pytest

from jaxlab.voltanallm import GPUBackend, PowerModel, SimulatedGPU, sweet_spot, wasteful_clocks
from tests.oracles import voltanallm as oracle
from tests.voltanallm import tables
from tests.voltanallm.tables import CLOCKS

A100 = PowerModel()
FINE = tuple(range(210, 1411, 15))


@pytest.mark.latest
def test_the_calibration_gives_the_figures_numbers():
    """Of the specification's section 4.4: a mean over as many prefill as decode workers."""
    full, low = ([A100.power_w(f, phase, 1.0) for phase in ("prefill", "decode")] for f in (1410, 1005))
    assert np.mean(full) == pytest.approx(371, abs=1)
    assert np.mean(low) == pytest.approx(238, abs=1)
    for at_full, at_low in zip(full, low):
        assert (at_low - 62) / (at_full - 62) == pytest.approx(0.57, abs=0.005)
    assert full[0] == 400


def test_power_by_hand():
    model = PowerModel(50, 450, 1000, 1.0, 0.5, voltage_slope=0.4, voltage_floor=0.8)
    assert model.power_w(1000, "prefill", 1.0) == 450
    assert model.power_w(1000, "decode", 0.5) == pytest.approx(50 + 0.5 * 400 * 0.5)
    assert model.power_w(750, "prefill", 1) == pytest.approx(50 + 400 * 0.75 * 0.9**2)
    assert model.power_w(250, "prefill", 1) == pytest.approx(50 + 400 * 0.25 * 0.8**2)  # below the knee
    assert model.power_w(250, "prefill", 0) == model.power_w(1000, "decode", 0.0) == 50
    np.testing.assert_allclose(model.power_w(np.array([250, 1000]), "prefill", 1), [50 + 64, 450])


def test_presets():
    assert PowerModel.preset("a100") == A100
    for name, prompt, token in (("a100-splitwise", 400, 250), ("h100-splitwise", 700, 380)):
        model = PowerModel.preset(name)
        assert model.power_w(model.max_mhz, "prefill", 1.0) == pytest.approx(prompt)
        assert model.power_w(model.max_mhz, "decode", 1.0) == pytest.approx(token)


def test_energy_against_clock_is_a_u():
    latency = tables.prefill_table(FINE)
    energy = A100.energy_table(latency)
    joules = energy.predict(np.array(FINE), 1, 4000)
    assert joules[-1] == pytest.approx(A100.power_w(1410, "prefill", 1.0) * latency.predict(1410, 1, 4000) / 1000)
    best = int(np.argmin(joules))
    assert (np.diff(joules[: best + 1]) < 0).all()
    assert (np.diff(joules[best:]) > 0).all()
    assert FINE[best] == sweet_spot(energy, tokens=4000) == 990  # the knee is at 991 MHz
    assert joules[0] > 1.1 * joules[best] < joules[-1]
    assert sweet_spot(energy, tokens=4000, freqs=(600, 1200, 1410)) == 1200


def test_clocks_below_the_sweet_spot_are_named():
    energy = A100.energy_table(tables.prefill_table(FINE))
    assert wasteful_clocks(CLOCKS, energy, tokens=4000) == ()
    assert wasteful_clocks((1410, 1005, 900, 300), energy, tokens=4000) == (300, 900)
    with pytest.raises(ValueError, match="expected one that the table has a segment for, got 999"):
        sweet_spot(tables.energy_table(), batch=999, tokens=4000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"idle_w": -1.0}, "idle_w"),
        ({"idle_w": 400.0}, "idle_w: expected 0 <= idle_w < tdp_w"),
        ({"max_mhz": 0}, "max_mhz"),
        ({"rho_decode": 1.5}, "rho_decode"),
        ({"voltage_floor": 0.0}, "voltage_floor"),
        ({"voltage_slope": 1.0}, "voltage_slope"),
    ],
)
def test_models_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PowerModel(**change)


@pytest.mark.parametrize(
    "arguments", [(1500, "decode", 1.0), (0, "decode", 1.0), (1410, "both", 1.0), (1410, "decode", 2.0)]
)
def test_power_out_of_range(unchecked, arguments):
    with pytest.raises(ValueError, match="expected"):
        A100.power_w(*arguments)
    with pytest.raises(ValueError, match="preset: expected one of a100"):
        PowerModel.preset("b200")


class Time:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_energy_is_power_over_time_through_late_clocks():
    time = Time()
    gpu = SimulatedGPU(CLOCKS, switch_ms=10, time_fn=time)
    assert isinstance(gpu, GPUBackend)
    assert (gpu.clock(), gpu.power_w(), gpu.energy_j()) == (1410, 62.0, 0.0)
    gpu.set_load("decode", 0.75)
    time.now += 0.1
    gpu.set_clock(1005)
    time.now += 0.004
    assert gpu.clock() == 1410
    gpu.set_clock(1200)  # while the first is under way: each takes its time
    time.now += 0.006
    assert gpu.clock() == 1005
    time.now += 0.004
    assert gpu.clock() == 1200
    time.now += 0.086
    events = [(0.0, 1410), (0.11, 1005), (0.114, 1200)]
    wanted = oracle.energy_j(events, lambda f: A100.power_w(f, "decode", 0.75), 0.2)
    assert gpu.energy_j() == pytest.approx(wanted, rel=1e-9)
    gpu.set_load("prefill", 0.0)
    before = gpu.energy_j()
    time.now += 2.0
    assert gpu.energy_j() - before == pytest.approx(2 * 62)  # idle at any clock
    gpu.reset()
    time.now += 0.01
    assert gpu.clock() == 1410
    time.now -= 5.0
    assert gpu.energy_j() == pytest.approx(gpu.energy_j())  # time does not run backwards


def test_a_clock_that_switches_at_once():
    gpu = SimulatedGPU((1000, 2000), switch_ms=0, time_fn=Time())
    gpu.set_clock(1000)
    assert gpu.clock() == 1000
    assert gpu.supported_clocks() == (1000, 2000)
    assert gpu.power_w() == 62.0


def test_what_a_gpu_refuses(unchecked):
    gpu = SimulatedGPU(CLOCKS)
    with pytest.raises(ValueError, match="nearest are 1095 MHz and 1200 MHz, got 1100"):
        gpu.set_clock(1100)
    with pytest.raises(ValueError, match="nearest are 1410 MHz, got 1500"):
        gpu.set_clock(1500)
    with pytest.raises(ValueError, match="utilisation"):
        gpu.set_load("decode", 1.5)
    for supported, options in (((), {}), ((1000, 1000), {}), ((1500,), {"power": A100}), ((1000,), {"switch_ms": -1})):
        with pytest.raises(ValueError, match="expected"):
            SimulatedGPU(supported, **options)
