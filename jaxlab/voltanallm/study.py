"""What ways of choosing clocks and workers cost on a simulated cluster, by load: the table behind `simulate`."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab import core
from jaxlab.voltanallm.config import A100_CLOCKS, KINDS, ControllerConfig
from jaxlab.voltanallm.sim import ClusterConfig, SimModels, SimResult, Simulator, Trace, sharegpt
from jaxlab.voltanallm.sim.traces import AZURE_CODE, AZURE_CONVERSATION, read_lengths

TRACES = {"azure-conversation": AZURE_CONVERSATION, "azure-code": AZURE_CODE}
"""Traces with arrival times of their own; "sharegpt" has lengths only, and a file is either."""


@dataclasses.dataclass(frozen=True)
class Way:
    """How clocks and workers are chosen.

    Attributes:
      kind: of the controller, see `ControllerConfig`.
      policy: of the router.
      freq: MHz of a "static" controller.
      pooled: one pool of workers that do both phases.
    """

    kind: str
    policy: str = "rr"
    freq: int | None = None
    pooled: bool = False

    def __str__(self) -> str:
        clock = f"{self.freq} MHz" if self.kind == "static" else self.kind
        return f"{clock}, {self.policy}" + (", one pool" if self.pooled else "")

    @classmethod
    def read(cls, text: str) -> "Way":
        """A way from its short form: "1410", "ecofreq", "ecofreq/state_space", with "/pool" at the end for one pool.

        Raises:
          ValueError: an unknown controller.
        """
        kind, *more = text.split("/")
        pooled = more[-1:] == ["pool"]
        policy = (more[:-1] if pooled else more) or ["rr"]
        if len(policy) > 1 or not (kind in KINDS or kind.isdigit()):
            raise ValueError(f"ways: expected MHz or one of {', '.join(KINDS)}, then /policy, got {text!r}")
        if kind.isdigit():
            return cls("static", policy[0], int(kind), pooled)
        return cls(kind, policy[0], pooled=pooled)


@dataclasses.dataclass(frozen=True)
class SimulationConfig:
    """A study in simulation. Defaults: the paper's cluster and demo.

    Attributes:
      trace: "sharegpt", "azure-conversation", "azure-code", or a CSV of such columns.
      rates: requests a second; none: as the trace has them.
      seconds: of arrivals.
      seeds: of arrivals and noise.
      ways: see `Way.read`; the first one is what savings are told against.
      num_prefill: workers for prompts.
      num_decode: workers for decoding.
      freqs: MHz.
      prefill_slo_ms: objective of the time to first token (demo).
      decode_slo_ms: objective of the time between tokens (demo).
      margin: of both (demo).
      models: a preset of `SimModels`.

    Raises:
      ValueError: nothing to simulate, or a number out of range.
    """

    trace: str = "sharegpt"
    rates: tuple[float, ...] = (20.0, 40.0, 60.0)
    seconds: float = 60.0
    seeds: tuple[int, ...] = (0,)
    ways: tuple[str, ...] = ("1410", "1005", "ecofreq", "ecofreq/state_space")
    num_prefill: int = 2
    num_decode: int = 2
    freqs: tuple[int, ...] = A100_CLOCKS
    prefill_slo_ms: float = 800.0
    decode_slo_ms: float = 50.0
    margin: float = 0.35
    models: str = "llama-3.1-8b-a100"

    def __post_init__(self) -> None:
        for name in ("seeds", "ways"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one, got none")
        for name, values in (("rates", self.rates), ("seconds", (self.seconds,))):
            if not all(value > 0 for value in values):
                raise ValueError(f"{name}: expected positive numbers, got {values}")
        for text in self.ways:
            self.controller(Way.read(text))

    def controller(self, way: Way) -> ControllerConfig:
        """The controller of a way."""
        return ControllerConfig(
            way.kind,  # pyrefly: ignore[bad-argument-type]
            freqs=self.freqs,
            static_freq=way.freq,
            prefill_slo_ms=self.prefill_slo_ms,
            decode_slo_ms=self.decode_slo_ms,
            margin=self.margin,
        )

    def cluster(self, way: Way) -> ClusterConfig:
        """The machines of a way."""
        if way.pooled:
            return ClusterConfig(0, self.num_prefill + self.num_decode)
        return ClusterConfig(self.num_prefill, self.num_decode)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A way at a load.

    Attributes:
      way: which.
      rate: requests a second.
      results: one a seed.
    """

    way: Way
    rate: float
    results: tuple[SimResult, ...]

    def mean(self, name: str) -> float:
        """An attribute of the results, on average."""
        return float(np.mean([getattr(result, name) for result in self.results]))

    def saving(self, base: "Outcome") -> float:
        """Part of another way's energy that this one does not need, over the same arrivals."""
        return 1 - self.mean("energy_j") / base.mean("energy_j")


def arrivals(config: SimulationConfig, rate: float | None, seed: int) -> tuple[Trace, bool]:
    """The requests of one run, and whether their lengths are made up.

    Raises:
      DataUnavailable: Azure's trace is not here and cannot be downloaded.
      ValueError: a file that is no trace, or lengths without a rate.
    """
    if config.trace in TRACES:
        whole = Trace.azure(core.data_path(TRACES[config.trace]))
        return _slice(whole if rate is None else whole.at_rate(rate), config.seconds, seed), False
    if config.trace == "sharegpt" or "arrived_at_s" not in _header(config.trace):
        if rate is None:
            raise ValueError("rates: expected some, as lengths have no times of their own")
        lengths = sharegpt() if config.trace == "sharegpt" else read_lengths(config.trace)
        count = max(1, round(rate * config.seconds))
        return (
            Trace.from_lengths(lengths.prompt, lengths.output, rate=rate, num_requests=count, seed=seed),
            lengths.synthetic,
        )
    whole = Trace.azure(config.trace)
    return _slice(whole if rate is None else whole.at_rate(rate), config.seconds, seed), False


def _header(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError(f"trace: expected sharegpt, {', '.join(TRACES)} or a file, got {path!r}")
    with open(path) as file:
        return file.readline()


def _slice(trace: Trace, seconds: float, seed: int) -> Trace:
    """So many seconds of a trace, beginning elsewhere for each seed."""
    span = float(trace.arrival_s[-1])
    begin = max(0.0, span - seconds) * float(np.random.default_rng([seed, 2]).random()) if seed else 0.0
    first, last = np.searchsorted(trace.arrival_s, [begin, begin + seconds])
    return trace.part(int(first), max(int(last), int(first) + 1))


def study(config: SimulationConfig) -> tuple[list[Outcome], bool]:
    """Every way at every load, and whether anything of it is made up instead of measured."""
    models = SimModels.preset(config.models, freqs=config.freqs)
    rates: Sequence[float | None] = config.rates or (None,)
    made_up = models.synthetic
    outcomes = []
    runs = [(rate, way) for rate in rates for way in map(Way.read, config.ways)]
    for rate, way in core.progress(runs, "simulations"):
        results = []
        for seed in config.seeds:
            trace, synthetic = arrivals(config, rate, seed)
            made_up |= synthetic
            results.append(
                Simulator(config.cluster(way), trace, way.policy, config.controller(way), models, seed).run()
            )
        outcomes.append(Outcome(way, trace.rate if rate is None else rate, tuple(results)))
    return outcomes, made_up


COLUMNS = ("req/s", "way", "kJ", "saved", "J/token", "TTFT", "ITL", "ITL mean", "p95 TTFT", "switches")
"""TTFT, ITL, ITL mean: shares of requests, tokens, and requests by their mean, that kept the objective; p95 in ms."""


def rows(outcomes: Sequence[Outcome]) -> Iterator[tuple[Any, ...]]:
    """Rows of the table `COLUMNS`; savings are against the first way at the same load."""
    first: dict[float, Outcome] = {}
    for each in outcomes:
        base = first.setdefault(each.rate, each)
        waits = np.concatenate([result.ttft_ms for result in each.results])
        yield (
            *(round(each.rate, 1), str(each.way), each.mean("energy_j") / 1000, each.saving(base)),
            *(each.mean("joules_per_token"), each.mean("ttft_attainment"), each.mean("itl_token_attainment")),
            *(each.mean("itl_request_attainment"), float(np.nanpercentile(waits, 95)), each.mean("clock_switches")),
        )
