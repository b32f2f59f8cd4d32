"""What a GPU draws at a clock, and the clock of least energy. Modelled: no figure from here is a measurement.

    P = P_idle + u * (P_tdp - P_idle) * rho_phase * g(f),   g(f) = x * V(x)^2,   x = f / f_max
    V = max(v0, 1 - s * (1 - x))     of its voltage at f_max

Above the knee, where V reaches v0, power falls faster than speed; below it in proportion only, while the idle power is
paid for longer: energy against clock is a U.
"""

import dataclasses
from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import ArrayLike

from jaxlab.voltanallm.config import PHASES, Phase, check_clocks
from jaxlab.voltanallm.predictor import EnergyTable, LatencyTable


@dataclasses.dataclass(frozen=True)
class PowerModel:
    """Power of one GPU. Defaults are an A100's, calibrated to the paper's result figure (see the attributes).

    The figure implies some 371 W a GPU at 1410 MHz and 238 W at 1005 MHz, over as many prefill as decode workers, if
    its runs last 120 s (ours: the demo's value): 0.57 times the power above idle at 0.713 times the clock.

    Attributes:
      idle_w: without work, at any clock (ours, from the figure; Splitwise measures 63).
      tdp_w: at full utilisation of a phase with rho = 1 (the data sheet's).
      max_mhz: f_max.
      rho_prefill: share of the power above idle that a busy prefill draws at f_max (Splitwise: the whole).
      rho_decode: the same of a busy decode; with rho_prefill it gives the mean of the figure.
      voltage_slope: s; 0.37 gives the figure's ratio.
      voltage_floor: v0 (ours): the knee is at 991 MHz, so that the paper's lowest clock lies just above it.

    Raises:
      ValueError: a number out of range.
    """

    idle_w: int | float = 62.0
    tdp_w: int | float = 400.0
    max_mhz: int | float = 1410
    rho_prefill: int | float = 1.0
    rho_decode: int | float = 0.83
    voltage_slope: int | float = 0.37
    voltage_floor: int | float = 0.89

    def __post_init__(self):
        if not 0 <= self.idle_w < self.tdp_w < float("inf"):
            raise ValueError(f"idle_w: expected 0 <= idle_w < tdp_w, got {self.idle_w} and {self.tdp_w}")
        if not 0 < self.max_mhz < float("inf"):
            raise ValueError(f"max_mhz: expected a positive clock, got {self.max_mhz}")
        for name in ("rho_prefill", "rho_decode", "voltage_floor"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a value in (0, 1], got {getattr(self, name)}")
        if not 0 <= self.voltage_slope < 1:
            raise ValueError(f"voltage_slope: expected a value in [0, 1), got {self.voltage_slope}")

    @classmethod
    def preset(cls, name: str) -> "PowerModel":
        """A known GPU.

        Args:
          name: "a100" is the default. "a100-splitwise" and "h100-splitwise" have the constants of Splitwise's simulator
            (idle 63 and 75 W, prompts 400 and 700 W, tokens 250 and 380 W) and the default's voltages.

        Raises:
          ValueError: no such preset.
        """
        if name not in _PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(_PRESETS)}, got {name!r}")
        return cls(**_PRESETS[name])

    @overload
    def power_w(self, freq: float, phase: Phase, utilisation: float) -> float: ...
    @overload
    def power_w(self, freq: ArrayLike, phase: Phase, utilisation: ArrayLike) -> np.ndarray: ...
    def power_w(self, freq: ArrayLike, phase: Phase, utilisation: ArrayLike) -> float | np.ndarray:
        """Watts; the arguments broadcast.

        Args:
          freq: MHz, at most `max_mhz`.
          phase: "decode" or "prefill".
          utilisation: share of the time in which it works, 0 to 1.

        Raises:
          ValueError: an argument out of range.
        """
        if phase not in PHASES:
            raise ValueError(f"phase: expected one of {', '.join(PHASES)}, got {phase!r}")
        x, busy = np.asarray(freq, np.float64) / self.max_mhz, np.asarray(utilisation, np.float64)
        if not ((x > 0) & (x <= 1)).all():
            raise ValueError(f"freq: expected clocks in (0, {self.max_mhz}] MHz, got {freq}")
        if not ((busy >= 0) & (busy <= 1)).all():
            raise ValueError(f"utilisation: expected values in [0, 1], got {utilisation}")
        voltage = np.maximum(self.voltage_floor, 1 - self.voltage_slope * (1 - x))
        rho = self.rho_decode if phase == "decode" else self.rho_prefill
        watts = self.idle_w + busy * (self.tdp_w - self.idle_w) * rho * x * voltage**2
        return watts if watts.ndim else float(watts)

    def energy_table(self, latency: LatencyTable, *, utilisation: float = 1.0) -> EnergyTable:
        """Joules of an iteration: power at its clock times its predicted time, planes again."""
        planes = []
        for plane in latency.planes:
            kilowatts = self.power_w(plane.freq, latency.phase, utilisation) / 1000
            scaled = {name: getattr(plane, name) * kilowatts for name in ("batch", "tokens", "intercept")}
            planes.append(dataclasses.replace(plane, **scaled))
        return EnergyTable(latency.phase, planes)


_PRESETS = {
    "a100": {},
    "a100-splitwise": {"idle_w": 63.0, "rho_decode": (250 - 63) / (400 - 63)},
    "h100-splitwise": {"idle_w": 75.0, "tdp_w": 700.0, "max_mhz": 1980, "rho_decode": (380 - 75) / (700 - 75)},
}


def sweet_spot(energy: EnergyTable, *, batch: float = 1, tokens: float, freqs: Sequence[int] | None = None) -> int:
    """The clock that takes least energy for an iteration, the bottom of the U.

    Args:
      energy: measured, or a model's (`PowerModel.energy_table`).
      batch: running requests; prefill ignores it.
      tokens: in their cache, or of the prompts.
      freqs: clocks to choose from; None: the table's.

    Raises:
      ValueError: a clock outside the table, or nothing predicted for this batch.
    """
    clocks = np.array(energy.freqs if freqs is None else check_clocks(freqs, least=1))
    joules = energy.predict(clocks, batch, tokens)
    if np.isnan(joules).any():
        raise ValueError(f"batch: expected one that the table has a segment for, got {batch}")
    return int(clocks[np.argmin(joules)])


def wasteful_clocks(freqs: Sequence[int], energy: EnergyTable, *, batch: float = 1, tokens: float) -> tuple[int, ...]:
    """Clocks below the sweet spot: slower than it, and for more energy.

    EcoFreq takes the lowest feasible clock, so it should be given none of these: min(freqs) belongs at or above the
    sweet spot of the table.

    Args:
      freqs: a controller's.
      energy: over all clocks of the GPU.
      batch: as in `sweet_spot`.
      tokens: as in `sweet_spot`.

    Raises:
      ValueError: as `sweet_spot`.
    """
    best = sweet_spot(energy, batch=batch, tokens=tokens)
    return tuple(clock for clock in check_clocks(freqs, least=1) if clock < best)
