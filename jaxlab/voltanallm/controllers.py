"""Controllers to compare EcoFreq with, and `make_controller`, the one place where a controller is made.

Those named after papers are after their idea, not their code: what each takes from its paper and what is ours is said
in its docstring. What needs an energy table is in `jaxlab.voltanallm.planning`.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from jaxlab.voltanallm.config import ControllerConfig, Phase, check_clock
from jaxlab.voltanallm.controller import (
    Arrivals,
    ClockController,
    EcoFreq,
    Metrics,
    Objective,
    PredictingController,
    batch_and_tokens,
)
from jaxlab.voltanallm.planning import LeastEnergy, ModelPredictive, Rate
from jaxlab.voltanallm.predictor import Predictor


def make_controller(
    config: ControllerConfig,
    phase: Phase,
    table: Predictor | None,
    *,
    energy: Predictor | None = None,
    idle_w: float = 0.0,
) -> ClockController:
    """The controller of one worker.

    Args:
      config: kind, clocks, objectives.
      phase: the worker's.
      table: predicted latencies of that phase; "static" and "aimd" need none.
      energy: predicted energies of that phase; "least_energy" and "model_predictive" need it.
      idle_w: what the GPU draws without work; those two charge a decision only with what it draws above that.

    Raises:
      ValueError: a table of the other phase or one that does not reach a clock, or none where one is needed.
    """
    for name, given in (("table", table), ("energy", energy)):
        if given is not None and given.phase != phase:
            raise ValueError(f"{name}: expected a table of phase {phase!r}, got one of {given.phase!r}")
    slo_ms = config.slo_ms(phase)
    common = {"margin": config.margin, "idle_s": config.idle_s}
    if config.kind == "static":
        return StaticClock(config.freqs, config.static_freq)
    if table is None and config.kind != "aimd":
        raise ValueError(f"table: expected a latency table for controller {config.kind!r}, got None")
    arguments: Any = (table, config.freqs, slo_ms)
    if config.kind == "ecofreq":
        made = EcoFreq(
            *arguments,
            use_total_batch=config.use_total_batch,
            tps_threshold=config.tps_threshold,
            rps_threshold=config.rps_threshold,
            window_s=config.window_s,
            **common,
        )
    elif config.kind == "aimd":
        made = AIMD(config.freqs, slo_ms, phase, **common)
    elif config.kind in _LATENCY_ONLY:
        made = _LATENCY_ONLY[config.kind](*arguments, **common)
    elif energy is None:
        raise ValueError(f"energy: expected an energy table for controller {config.kind!r}, got None")
    else:
        made = _ENERGY[config.kind](*arguments, energy=energy, idle_w=idle_w, **common)
    made.hysteresis = config.hysteresis
    return made


class StaticClock(ClockController):
    """One clock, whatever happens: the paper's baseline.

    Args:
      freqs: MHz that there are.
      freq: the one; None: the highest.

    Raises:
      ValueError: a clock that there is not.
    """

    def __init__(self, freqs: Sequence[int], freq: int | None = None):
        super().__init__(freqs, least=1)
        self.freq = self.freqs[-1] if freq is None else freq
        check_clock("freq", self.freq, self.freqs)
        self._last = self.freq

    def _target(self, metrics: Sequence[Metrics], arrivals: Arrivals, now: float) -> int | None:
        return self.freq


def best_static_clock(
    freqs: Sequence[int], run: Callable[[int], tuple[float, float]], *, at_least: float
) -> tuple[int, float, float]:
    """The oracle among static clocks: the least energy that keeps the objectives, found by trying every clock.

    Args:
      freqs: MHz.
      run: a clock -> energy, and the attainment (0 to 1) of the objectives on the very load that is to be served.
      at_least: attainment that must be kept; if no clock does, the one of highest attainment is taken.

    Returns:
      The clock, its energy and its attainment.
    """
    tried = [(freq, *run(freq)) for freq in freqs]
    kept = [each for each in tried if each[2] >= at_least]
    if kept:
        return min(kept, key=lambda each: each[1])
    return max(tried, key=lambda each: each[2])


class AIMD(Objective, ClockController):
    """Feedback from measured latency, without a model: additive steps down, and back by half after every miss.

    After TCP's congestion control, applied to the clock (the comparison is the specification's, the numbers are ours):
    the saving, the distance in MHz from the highest clock, grows by a step while latency is below a part of the
    objective, and is multiplied by `factor` when it is above. Decode latency is the time between two metrics; that of
    prefill is the longest wait, and the time of the batch before where prompts waited behind it.

    Args:
      freqs: MHz to choose from.
      slo_ms: objective.
      phase: the worker's.
      margin: the objective is stretched by this part of itself.
      step: growth of the saving, as part of the whole range of clocks.
      factor: what a miss leaves of the saving.
      headroom: part of the objective below which the saving grows.
      idle_s: without metrics for longer than this, the lowest clock is named.

    Raises:
      ValueError: fewer than two clocks, one twice, or a number out of range.
    """

    def __init__(
        self,
        freqs: Sequence[int],
        slo_ms: float,
        phase: Phase,
        *,
        margin: float = 0.0,
        step: float = 0.02,
        factor: float = 0.5,
        headroom: float = 0.9,
        idle_s: float = 5.0,
    ):
        ClockController.__init__(self, freqs, idle_s=idle_s)
        Objective.__init__(self, slo_ms, margin)
        for name, value in (("step", step), ("factor", factor), ("headroom", headroom)):
            if not 0 < value < 1:
                raise ValueError(f"{name}: expected a value in (0, 1), got {value}")
        self.phase: Phase = phase
        self._range = self.freqs[-1] - self.freqs[0]
        self._step, self._factor, self._headroom = step * self._range, factor, headroom
        self._saving = float(self._range)
        self._before: Metrics | None = None

    def _target(self, metrics: Sequence[Metrics], arrivals: Arrivals, now: float) -> int | None:
        latencies = self._latencies(metrics)
        if not latencies:
            return None
        if max(latencies) > self.target_ms:
            self._saving *= self._factor
        elif max(latencies) < self._headroom * self.target_ms:
            self._saving = min(self._saving + self._step, self._range)
        wanted = self.freqs[-1] - self._saving
        return next(freq for freq in self.freqs if freq >= wanted - 1e-9)

    def _latencies(self, metrics: Sequence[Metrics]) -> list[float]:
        found = []
        for each in metrics:
            before, self._before = self._before, each
            gap_ms = 0.0 if before is None else 1000 * (each.timestamp - before.timestamp)
            if self.phase == "decode":
                if before is not None and before.running and each.running:
                    found.append(gap_ms)
            else:
                busy = before is not None and before.waiting > 0
                found.append(1000 * max(each.queue_wait_s, default=0.0) + (gap_ms if busy else 0.0))
        return found


class ThrottLLeM(PredictingController):
    """The lowest clock that meets the objective now and at the end of a horizon to which the batch is projected.

    After throttLL'eM (arXiv 2408.05235), which projects batch and cache from predicted output lengths and asks a learnt
    performance model for the lowest clock that keeps the objectives. Here the model is EcoPred's, and lengths are not
    predicted: decode requests come at the rate they came at and leave after a mean length, so the batch tends to what
    keeps both in balance; a prefill batch is followed by one of the prompts that come while it runs (ours).

    Args:
      table: as in `PredictingController`, like the next four.
      freqs: MHz.
      slo_ms: objective.
      margin: stretches it.
      idle_s: until the lowest clock.
      horizon_s: to project to.
      mean_output: tokens of a request.
    """

    def __init__(
        self,
        table: Predictor,
        freqs: Sequence[int],
        slo_ms: float,
        *,
        margin: float = 0.35,
        idle_s: float = 5.0,
        horizon_s: float = 1.0,
        mean_output: float = 200.0,
    ):
        super().__init__(table, freqs, slo_ms, margin=margin, idle_s=idle_s)
        self.horizon_s, self.mean_output = horizon_s, mean_output
        self._rate = Rate(memory_s=2.0)

    def _target(self, metrics: Sequence[Metrics], arrivals: Arrivals, now: float) -> int | None:
        self._rate.see(metrics, self._came)
        state = batch_and_tokens(metrics[-1:], self.phase)
        if state is None:
            return None
        waited, latency = self.waited_ms(metrics), math.nan
        for freq in self.freqs:
            latency = self.table.predict(freq, *state)
            if latency <= self.target_ms - waited and self._later(freq, *state, latency) <= self.target_ms:
                return freq
        self.count_infeasible(latency)
        return self.freqs[-1]

    def _came(self, before: Metrics, each: Metrics) -> float:
        """Tokens of prompts; requests: the batch's growth, and those who will have left it, with lengths as assumed."""
        if self.phase == "prefill":
            return each.tokens
        return each.running - before.running + before.running / self.mean_output

    def _later(self, freq: int, batch: int, tokens: float, latency_ms: float) -> float:
        """Latency at the end of the horizon, in prefill that of a prompt that has just missed the batch."""
        if self.phase == "prefill":
            following = self._rate.per_s * latency_ms / 1000
            return latency_ms + (self.table.predict(freq, 1, following) if following >= 1 else 0.0)
        steps = self.horizon_s / (latency_ms / 1000)
        left = math.exp(-steps / self.mean_output)  # of the requests running now, with memoryless lengths
        balance = self._rate.per_s * self.mean_output * latency_ms / 1000
        later = max(1, math.ceil(batch * left + balance * (1 - left)))
        return self.table.predict(freq, later, later * (tokens / batch + (steps if later <= batch else 0)))


class GreenLLM(PredictingController):
    """Clocks by phase: prefill by the whole queue's deadline, decode by throughput and corrected by measured tails.

    After GreenLLM (arXiv 2508.16449): prefill takes the least clock that drains its queue in time; decode has a coarse
    loop from throughput to a clock and a fine one, every 20 ms, that moves it by a step after the tail of measured
    latencies. Here the coarse loop asks EcoPred for the lowest clock that keeps the largest batch of a period, the fine
    one stays within a step of it (ours).

    Args:
      table: as in `PredictingController`, like the next four.
      freqs: MHz.
      slo_ms: objective.
      margin: stretches it.
      idle_s: until the lowest clock.
      coarse_s: period of the coarse loop.
      fine_s: period of the fine one.
      low: part of the objective below which the tail of latencies lets the clock fall.
    """

    def __init__(
        self,
        table: Predictor,
        freqs: Sequence[int],
        slo_ms: float,
        *,
        margin: float = 0.35,
        idle_s: float = 5.0,
        coarse_s: float = 0.2,
        fine_s: float = 0.02,
        low: float = 0.8,
    ):
        super().__init__(table, freqs, slo_ms, margin=margin, idle_s=idle_s)
        self.coarse_s, self.fine_s, self.low = coarse_s, fine_s, low
        self._batches: list[tuple[int, float]] = []
        self._tail: deque[float] = deque(maxlen=20)
        self._base: int | None = None
        self._shift = 0
        self._coarse_at = self._fine_at = -math.inf
        self._before: Metrics | None = None

    def _target(self, metrics: Sequence[Metrics], arrivals: Arrivals, now: float) -> int | None:
        if not metrics:
            return None
        if self.phase == "prefill":
            state = batch_and_tokens(metrics[-1:], self.phase)
            if state is None:
                return None
            last = metrics[-1]
            queued = state[1] * (1 + last.waiting / max(last.running, 1))
            return self.lowest_feasible(1, queued, self.target_ms - self.waited_ms(metrics))
        for each in metrics:
            if self._before is not None and self._before.running and each.running:
                self._tail.append(1000 * (each.timestamp - self._before.timestamp))
            self._before = each
            if each.running and each.tokens:
                self._batches.append((each.running, each.tokens))
        if now - self._coarse_at >= self.coarse_s and self._batches:
            clock = self.lowest_feasible(*max(self._batches), self.target_ms)
            self._base, self._shift, self._coarse_at, self._batches = self.freqs.index(clock), 0, now, []
        elif now - self._fine_at >= self.fine_s and self._tail:
            self._fine_at = now
            tail = sorted(self._tail)[math.ceil(0.95 * len(self._tail)) - 1]
            if tail > self.target_ms:
                self._shift = min(self._shift + 1, 1)
            elif tail < self.low * self.target_ms:
                self._shift = max(self._shift - 1, -1)
        if self._base is None:
            return None
        return self.freqs[min(max(self._base + self._shift, 0), len(self.freqs) - 1)]


class DynamoLLM(PredictingController):
    """A clock for minutes: the lowest one that would have met the objective through most of the period before.

    After DynamoLLM (arXiv 2408.00741), whose instances are reconfigured at the scale of minutes for the load that is
    predicted; here only the clock is, for the load that was (ours). Until the first period is over it is the highest.

    Args:
      table: as in `PredictingController`, like the next four.
      freqs: MHz.
      slo_ms: objective.
      margin: stretches it.
      idle_s: until the lowest clock.
      period_s: between decisions.
      quantile: share of the iterations, by predicted latency, that must meet it.
    """

    def __init__(
        self,
        table: Predictor,
        freqs: Sequence[int],
        slo_ms: float,
        *,
        margin: float = 0.35,
        idle_s: float = 5.0,
        period_s: float = 60.0,
        quantile: float = 0.95,
    ):
        super().__init__(table, freqs, slo_ms, margin=margin, idle_s=idle_s)
        self.period_s, self.quantile = period_s, quantile
        self._seen: list[tuple[float, int, float]] = []
        self._until: float | None = None
        self._clock = self.freqs[-1]

    def _target(self, metrics: Sequence[Metrics], arrivals: Arrivals, now: float) -> int | None:
        for each in metrics:
            state = batch_and_tokens((each,), self.phase)
            if state is not None:
                # One clock orders them all, nearly: more work takes longer everywhere.
                waited = self.waited_ms((each,))
                latency = self.table.predict(self.freqs[-1], *state) + waited
                self._seen.append((latency if latency == latency else math.inf, *state))
        if self._until is None:
            self._until = now + self.period_s
        elif now >= self._until and self._seen:
            latency, batch, tokens = sorted(self._seen)[math.ceil(self.quantile * len(self._seen)) - 1]
            waited = latency - self.table.predict(self.freqs[-1], batch, tokens) if math.isfinite(latency) else 0.0
            self._clock = self.lowest_feasible(batch, tokens, self.target_ms - waited)
            self._until, self._seen = now + self.period_s, []
        return self._clock if metrics else None


_LATENCY_ONLY = {"throttllem": ThrottLLeM, "greenllm": GreenLLM, "dynamollm": DynamoLLM}
_ENERGY = {"least_energy": LeastEnergy, "model_predictive": ModelPredictive}
