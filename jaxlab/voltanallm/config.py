"""What a controller can be told, and the checks of clocks and objectives that everything here shares."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = get_args(Phase)

Kind = Literal[
    "static",
    "ecofreq",
    "aimd",
    "throttllem",
    "greenllm",
    "dynamollm",
    "least_energy",
    "model_predictive",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

A100_CLOCKS = (1005, 1095, 1200, 1305, 1410)
"""MHz of an A100 SXM4-80GB that the paper profiles; its demo switches between the first and the last."""


@dataclasses.dataclass(frozen=True)
class ControllerConfig:
    """How the clocks of a cluster are chosen. Defaults are the official demo's where cited, ours otherwise.

    Attributes:
      kind: one of `KINDS`, see `jaxlab.voltanallm.controllers`.
      freqs: MHz to choose from; at least 2, or 1 of a "static" one.
      static_freq: MHz of "static"; None: the highest.
      prefill_slo_ms: objective of the time to first token.
      decode_slo_ms: objective of the inter-token latency.
      margin: by which part of itself an objective is stretched before predictions are compared with it.
      hysteresis: decisions for a lower clock that must follow each other before one is obeyed; 0: none must.
      use_total_batch: count requests that wait for a decode worker, as well as those it runs (EcoFreq).
      tps_threshold: arriving tokens a second above which the highest clock is chosen; None: no such rule (EcoFreq).
      rps_threshold: the same for requests a second.
      window_s: over which arrivals are counted.
      idle_s: without work for longer than this, a worker goes to its lowest clock.

    Raises:
      ValueError: a kind or clock that is not there, too few clocks, or a number out of range.
    """

    kind: Kind
    _: dataclasses.KW_ONLY
    freqs: tuple[int, ...]
    static_freq: int | None = None
    prefill_slo_ms: int | float
    decode_slo_ms: int | float
    margin: int | float = 0.35  # demo
    hysteresis: int = 0
    use_total_batch: bool = False  # official code, like the next four
    tps_threshold: int | float | None = None
    rps_threshold: int | float | None = None
    window_s: int | float = 1.0
    idle_s: int | float = 5.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        object.__setattr__(self, "freqs", check_clocks(self.freqs, least=1 if self.kind == "static" else 2))
        if self.static_freq is not None:
            check_clock("static_freq", self.static_freq, self.freqs)
        for name in ("prefill_slo_ms", "decode_slo_ms"):
            check_objective(getattr(self, name), self.margin, name=name)
        if self.hysteresis < 0:
            raise ValueError(f"hysteresis: expected at least 0 decisions, got {self.hysteresis}")
        check_window(self.window_s, self.idle_s, self.tps_threshold, self.rps_threshold)

    def slo_ms(self, phase: Phase) -> float:
        """The objective of a phase, without the margin."""
        return float(self.decode_slo_ms if phase == "decode" else self.prefill_slo_ms)


def check_clocks(freqs: Sequence[int], *, least: int = 2, name: str = "freqs") -> tuple[int, ...]:
    """Clocks in ascending order.

    Raises:
      ValueError: fewer than `least`, one twice, or one that is not a positive whole number.
    """
    clocks = tuple(sorted(int(freq) if freq == int(freq) else freq for freq in freqs))
    if len(clocks) < least:
        raise ValueError(f"{name}: expected at least {least} clocks, got {clocks}")
    for clock, following in zip(clocks, (*clocks[1:], None)):
        if not isinstance(clock, int) or clock <= 0:
            raise ValueError(f"{name}: expected positive whole numbers of MHz, got {clock}")
        if clock == following:
            raise ValueError(f"{name}: expected every clock once, got {clock} twice")
    return clocks


def check_clock(name: str, freq: float, supported: Sequence[int]) -> None:
    """Raises the ValueError of a clock that is not among the supported ones (ascending), its neighbours named."""
    if freq in supported:
        return
    below = [clock for clock in supported if clock < freq][-1:]
    above = [clock for clock in supported if clock > freq][:1]
    nearest = " and ".join(f"{clock} MHz" for clock in below + above)
    raise ValueError(f"{name}: expected a supported clock, the nearest are {nearest}, got {freq}")


def check_objective(slo_ms: float, margin: float, *, name: str = "slo_ms") -> None:
    """Raises the ValueError of an objective that is not positive, or of a margin that leaves nothing of it."""
    if not 0 < slo_ms < float("inf"):
        raise ValueError(f"{name}: expected a positive number of ms, got {slo_ms}")
    if not -1 < margin < float("inf"):
        raise ValueError(f"margin: expected a value > -1, got {margin}")


def check_window(window_s: float, idle_s: float, tps_threshold: float | None, rps_threshold: float | None) -> None:
    """Raises the ValueError of a window, an idle time or a threshold that is out of range."""
    if not window_s > 0:
        raise ValueError(f"window_s: expected a positive number of seconds, got {window_s}")
    if not idle_s >= 0:
        raise ValueError(f"idle_s: expected at least 0 seconds, got {idle_s}")
    for name, threshold in (("tps_threshold", tps_threshold), ("rps_threshold", rps_threshold)):
        if threshold is not None and not threshold >= 0:
            raise ValueError(f"{name}: expected a rate >= 0 or None, got {threshold}")
