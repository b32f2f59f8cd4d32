"""What a simulation takes for true of its GPUs, and what controllers and routers believe of them."""

import copy
import dataclasses
import functools
from typing import Any

import numpy as np

from jaxlab.voltanallm.config import A100_CLOCKS, ControllerConfig, Phase
from jaxlab.voltanallm.controller import ClockController
from jaxlab.voltanallm.controllers import make_controller
from jaxlab.voltanallm.fitting import fit_decode, fit_prefill
from jaxlab.voltanallm.power import PowerModel
from jaxlab.voltanallm.predictor import EnergyTable, LatencyTable
from jaxlab.voltanallm.router import Router
from jaxlab.voltanallm.sim.latency import Profile, ProfiledLatency

_BATCHES = sorted(
    {8 * k + more for k in range(16) for more in (0, 1)} | {128 * k + more for k in range(1, 9) for more in (0, 1)}
)
"""Batch sizes that the paper profiles."""
_KV_POINTS, _PREFILL_POINTS = 24, 400
_KV_TOKENS = 457_600
_LONGEST = 8192

_POWER = PowerModel(rho_decode=1.0, voltage_slope=0.47, voltage_floor=0.864)
"""Calibrated at one point, the lowest load of the paper's figure for Llama-8B on ShareGPT (50 requests a second on two
prefill and two decode workers): what the highest clock costs, and the saving of EcoFreq. `PowerModel`'s own defaults
assume that all four GPUs are always busy; those that prefill are idle for more than a third of the simulated time.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class SimModels:
    """The GPUs of a simulation.

    Attributes:
      prefill: true time of a batch of prompts, before the noise: a table, or whatever has a table's `predict`.
      decode: true time of a decode iteration, likewise.
      power: true power.
      energy: joules of a decode iteration as the router believes them, for the policies that look at energy; None: what
        follows from `decode_table` and `power`.
      noise_sigma: of the lognormal factor on every iteration.
      prefill_table: what controllers believe of prefills; None: the truth without its noise.
      decode_table: what controllers and router believe of decode iterations; None: the same.
      synthetic: whether the truth is made up, because the measured profile was not there.

    Raises:
      ValueError: a negative sigma.
    """

    prefill: Any
    decode: Any
    power: PowerModel
    energy: EnergyTable | None = None
    noise_sigma: float = 0.03
    _: dataclasses.KW_ONLY
    prefill_table: Any = None
    decode_table: Any = None
    synthetic: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.noise_sigma < float("inf"):
            raise ValueError(f"noise_sigma: expected a number >= 0, got {self.noise_sigma}")
        for phase in ("prefill", "decode"):
            if getattr(self, f"{phase}_table") is None:
                object.__setattr__(self, f"{phase}_table", getattr(self, phase))

    @classmethod
    def preset(cls, name: str, *, freqs: tuple[int, ...] = A100_CLOCKS, seed: int = 0) -> "SimModels":
        """A known model on a known GPU.

        "llama-3.1-8b-a100": times from the measured profile of Llama-3-8B's layers on an A100 (`sim.latency` says what
        was measured, modelled and assumed), power by `PowerModel`'s calibrated constants. Tables are fitted the way
        the paper does, from a simulated profiling run with noise of 3 %.

        Args:
          name: of the preset.
          freqs: MHz that are profiled; clocks between them are interpolated.
          seed: of the profiling run's noise.

        Raises:
          ValueError: an unknown name.
        """
        if name != "llama-3.1-8b-a100":
            raise ValueError(f"name: expected llama-3.1-8b-a100, got {name!r}")
        return _llama(cls, tuple(freqs), seed)

    def controller(self, config: ControllerConfig, phase: Phase) -> ClockController:
        """A worker's controller, that believes the tables.

        Raises:
          ValueError: a clock that its table does not reach, or no energy where it needs one.
        """
        table = self.decode_table if phase == "decode" else self.prefill_table
        return make_controller(config, phase, table, energy=self._energy(table), idle_w=float(self.power.idle_w))

    def router(self, policy: str | Router, controller: ControllerConfig, seed: int) -> Router:
        """A router that believes what the controllers do; of a router, a copy as it stands.

        Raises:
          ValueError: an unknown policy, or no energy where it needs one.
        """
        if isinstance(policy, Router):
            return copy.deepcopy(policy)
        return Router(
            policy,
            table=self.decode_table,
            energy_table=self._energy(self.decode_table) if self.energy is None else self.energy,
            slo_ms=controller.decode_slo_ms,
            margin=controller.margin,
            seed=seed,
        )

    def _energy(self, table: Any) -> EnergyTable | None:
        """Joules of an iteration of a busy GPU, where they are planes as times are."""
        return self.power.energy_table(table) if isinstance(table, LatencyTable) else None


@functools.lru_cache(maxsize=8)
def _llama(cls: type[SimModels], freqs: tuple[int, ...], seed: int) -> SimModels:
    profile = Profile.a100_llama()
    decode, prefill = ProfiledLatency("decode", profile), ProfiledLatency("prefill", profile)
    sigma = 0.03
    noise = np.random.default_rng(seed)

    def measured(truth: ProfiledLatency, freq: np.ndarray, batch: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return truth.predict(freq, batch, tokens) * np.exp(sigma * noise.standard_normal(freq.shape) - sigma**2 / 2)

    batches = np.array([batch for batch in _BATCHES if batch > 0])
    freq, batch, point = (
        axis.ravel() for axis in np.meshgrid(freqs, batches, np.linspace(0, 1, _KV_POINTS), indexing="ij")
    )
    # Prompts of one token that grow until they reach the longest output or fill 95 % of the pool.
    tokens = batch * np.ceil(1 + point * (np.minimum(_LONGEST, 0.95 * _KV_TOKENS / batch) - 1))
    itl = measured(decode, freq, batch, tokens)
    kept = (itl > 3) & (itl < 300)
    decode_table = fit_decode(freq[kept], batch[kept], tokens[kept], itl[kept])
    freq = np.repeat(freqs, _PREFILL_POINTS)
    tokens = np.ceil(noise.uniform(2000, 16384, len(freq)))
    prefill_table = fit_prefill(freq, tokens, measured(prefill, freq, np.ceil(tokens / 250), tokens))
    return cls(
        prefill,
        decode,
        _POWER,
        noise_sigma=sigma,
        prefill_table=prefill_table,
        decode_table=decode_table,
        synthetic=profile.synthetic,
    )
