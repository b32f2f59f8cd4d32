"""Controllers of ours that weigh energy: the least-energy feasible clock, and one that plans over the queue.

EcoFreq takes the lowest clock that is fast enough. That is the cheapest one as long as it is above the sweet spot of
the U of energy against clock. These two look at predicted energy instead, so that all clocks of a GPU can be given.
"""

import math
from collections.abc import Sequence

import numpy as np

from jaxlab.voltanallm.config import Phase
from jaxlab.voltanallm.controller import Arrivals, Metrics, PredictingController, batch_and_tokens
from jaxlab.voltanallm.predictor import EnergyTable, LatencyTable


class Rate:
    """What comes to a worker each second, as far as its metrics show it: tokens of prompts, or requests that join.

    Prompts that run are those that came. A decode worker's joiners are the growth of its batch and those who must have
    left it meanwhile, one of `mean_output` requests an iteration.

    Args:
      memory_s: over which old observations fade.
    """

    def __init__(self, memory_s: float = 2.0):
        self._memory_s = memory_s
        self._amount = self._time = 0.0
        self._before: Metrics | None = None

    @property
    def per_s(self) -> float:
        """Tokens or requests a second; 0 as long as nothing is known."""
        return max(self._amount, 0.0) / self._time if self._time > 0 else 0.0

    def see(self, metrics: Sequence[Metrics], phase: Phase, mean_output: float = math.inf) -> None:
        """Takes in metrics, oldest first."""
        for each in metrics:
            before, self._before = self._before, each
            if before is None or each.timestamp <= before.timestamp:
                continue
            gap = each.timestamp - before.timestamp
            if phase == "prefill":
                amount = float(each.tokens)
            else:
                amount = each.running - before.running + before.running / mean_output
            keep = math.exp(-gap / self._memory_s)
            self._amount, self._time = keep * self._amount + amount, keep * self._time + gap


class EnergyController(PredictingController):
    """A controller with an energy table.

    Args:
      table: latency; its phase is the worker's.
      freqs: MHz to choose from, within both tables' range.
      slo_ms: objective.
      energy: joules of an iteration.
      idle_w: what the GPU draws without work. Where its energy is paid for anyway, only what comes on top of it should
        decide; 0 charges an iteration with all of its energy.
      margin: the objective is stretched by this part of itself.
      idle_s: without metrics for longer than this, the lowest clock is named.

    Raises:
      ValueError: as `PredictingController`, tables of two phases, or a negative `idle_w`.
    """

    def __init__(
        self,
        table: LatencyTable,
        freqs: Sequence[int],
        slo_ms: float,
        *,
        energy: EnergyTable,
        idle_w: float = 0.0,
        margin: float = 0.35,
        idle_s: float = 5.0,
    ):
        super().__init__(table, freqs, slo_ms, margin=margin, idle_s=idle_s)
        if energy.phase != table.phase:
            raise ValueError(f"energy: expected a table of phase {table.phase!r}, got one of {energy.phase!r}")
        energy.predict(np.array([self.freqs[0], self.freqs[-1]]), 1, 1)  # raises for a clock it does not reach
        if not idle_w >= 0:
            raise ValueError(f"idle_w: expected at least 0, got {idle_w}")
        self.energy, self.idle_w = energy, idle_w
        self._clocks = np.array(self.freqs)

    def choose(self, latency_ms: np.ndarray, cost: np.ndarray, limit_ms: float) -> int:
        """The cheapest clock within a limit, or the highest one, counted, if none is. Arrays are by clock."""
        feasible = latency_ms <= limit_ms
        if not feasible.any():
            self.count_infeasible(float(latency_ms[-1]))
            return self.freqs[-1]
        return self.freqs[int(np.argmin(np.where(feasible, cost, np.inf)))]

    def joules(self, batch: float | np.ndarray, tokens: float | np.ndarray, latency_ms: np.ndarray) -> np.ndarray:
        """By clock, above idle; what has no prediction is never chosen."""
        clocks = self._clocks.reshape(-1, *(1,) * (latency_ms.ndim - 1))
        joules = self.energy.predict(clocks, batch, tokens) - self.idle_w * latency_ms / 1000
        return np.where(np.isnan(joules), np.inf, joules)


class LeastEnergy(EnergyController):
    """Among the clocks predicted to meet the objective, the one of least predicted energy per token.

    State and objective are EcoFreq's; so is the highest clock where prompts wait behind the batch. A batch is what it
    is when the clock is chosen, so least energy per token is least energy per iteration.
    """

    def _target(self, metrics: Sequence[Metrics], arrivals: Arrivals, now: float) -> int | None:
        if not metrics:
            return None
        if metrics[-1].waiting > 0:
            return self.freqs[-1]
        state = batch_and_tokens(metrics, self.phase)
        if state is None:
            return None
        latency = self.table.predict(self._clocks, *state)
        return self.choose(latency, self.joules(*state, latency), self.target_ms - self.waited_ms(metrics))


class ModelPredictive(EnergyController):
    """Plans a step ahead with the tables, and corrects them by what is measured.

    Prefill: two batches, the one about to run and the one behind it, which is made of the prompts that wait already and
    of those expected to come meanwhile. Of all pairs of clocks the cheapest counts in which the batch meets its
    deadline and so does the next one, whose oldest prompt has waited longest; the first clock of the pair is named.

    Decode: the batch joins those on their way to it and goes on growing as it did, by one token a request and
    iteration, until a decision can act. Of the clocks that then meet the objective the one of least power drawn in the
    long run counts: a batch that never runs empty draws its power all the time, however slow its iterations, while one
    that often does is better done soon. With requests that come at random and enough places, a share 1 - exp(-a) of the
    time is busy, a being the mean number in flight, which grows with the latency (M/G/infinity).

    The measured time of an iteration over its prediction is averaged; the objective is reduced by that, and by
    `deviations` of it.

    Args:
      table: as in `EnergyController`, like the next six.
      freqs: MHz.
      slo_ms: objective.
      energy: joules of an iteration.
      idle_w: of the GPU without work.
      margin: stretches the objective.
      idle_s: until the lowest clock.
      steps: decode iterations until a decision acts.
      memory: weight of the past in the averages, an iteration.
      deviations: of the measured ratio, kept as a reserve.

    Raises:
      ValueError: as `EnergyController`, or a number out of range.
    """

    def __init__(
        self,
        table: LatencyTable,
        freqs: Sequence[int],
        slo_ms: float,
        *,
        energy: EnergyTable,
        idle_w: float = 0.0,
        margin: float = 0.35,
        idle_s: float = 5.0,
        steps: int = 2,
        memory: float = 0.95,
        deviations: float = 2.0,
    ):
        super().__init__(table, freqs, slo_ms, energy=energy, idle_w=idle_w, margin=margin, idle_s=idle_s)
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        if not 0 <= memory < 1:
            raise ValueError(f"memory: expected a value in [0, 1), got {memory}")
        if not deviations >= 0:
            raise ValueError(f"deviations: expected at least 0, got {deviations}")
        self.steps, self.memory, self.deviations = steps, memory, deviations
        self._rate = Rate()
        self._growth = 0.0
        self._in_flight: float | None = None
        self._ratio, self._variance = 1.0, 0.0
        self._expected: float | None = None
        self._before: Metrics | None = None

    @property
    def correction(self) -> float:
        """By which predictions are multiplied before they are compared with the objective."""
        return self._ratio + self.deviations * math.sqrt(self._variance)

    def _target(self, metrics: Sequence[Metrics], arrivals: Arrivals, now: float) -> int | None:
        if not metrics:
            return None
        self._rate.see(metrics, self.phase)
        for each in metrics:
            self._learn(each)
        return self._plan_prefill(metrics[-1]) if self.phase == "prefill" else self._plan_decode(metrics[-1])

    def _learn(self, seen: Metrics) -> None:
        before, self._before = self._before, seen
        if self._in_flight is None:
            self._in_flight = float(seen.running)
        self._in_flight += (1 - self.memory) * (seen.running - self._in_flight)
        if before is None:
            return
        self._growth += (1 - self.memory) * (seen.running - before.running - self._growth)
        expected, self._expected = self._expected, None
        # Only a worker that went straight on from one iteration to the next tells how long one takes.
        busy = before.waiting > 0 if self.phase == "prefill" else before.running > 0 < seen.running
        if expected and busy:
            ratio = 1000 * (seen.timestamp - before.timestamp) / expected
            if 0.5 < ratio < 2:
                surprise = ratio - self._ratio
                self._ratio += (1 - self.memory) * surprise
                self._variance = self.memory * (self._variance + (1 - self.memory) * surprise**2)

    def _plan_prefill(self, last: Metrics) -> int | None:
        if not last.tokens:
            return None
        waits = sorted(last.queue_wait_s, reverse=True)  # first come, first served: the batch has the oldest
        behind = waits[len(waits) - last.waiting :]
        oldest = 1000 * waits[0] if len(waits) > last.waiting else 0.0
        now_ms = self.table.predict(self._clocks, 1, last.tokens)
        come = self._rate.per_s * now_ms / 1000 + last.waiting * last.tokens / max(last.running, 1)
        come = np.where(come >= 1, come, 0.0)
        # [clock of the next batch, clock of this one]
        next_ms = self.table.predict(self._clocks[:, None], 1, come)
        waited = 1000 * max(behind, default=0.0)
        slack = self.target_ms / self.correction
        in_time = (now_ms <= slack - oldest) & ((now_ms + next_ms <= slack - waited) | (come == 0))
        cost = self.joules(1, last.tokens, now_ms) + np.where(come > 0, self.joules(1, come, next_ms), 0.0)
        cost = np.where(in_time, cost, np.inf).min(axis=0)
        feasible = np.where(np.isfinite(cost), now_ms, np.inf)
        target = self.choose(feasible, cost, math.inf if np.isfinite(cost).any() else -math.inf)
        self._expected = float(now_ms[self.freqs.index(target)])
        return target

    def _plan_decode(self, last: Metrics) -> int | None:
        batch, tokens = last.running, last.tokens
        if not (batch and tokens):
            return None
        length = tokens / batch
        later = max(1, math.ceil(max(batch, last.total) + self.steps * max(self._growth, 0.0)))
        held = tokens + (later - batch) * length + self.steps * later
        latency = self.table.predict(self._clocks, later, held)
        watts = 1000 * self.joules(later, held, latency) / latency
        here = self.freqs.index(self._last)
        in_flight = (self._in_flight or 0.0) * latency / latency[here]
        busy = -np.expm1(-in_flight) if math.isfinite(latency[here]) else np.ones_like(latency)
        target = self.choose(latency, watts * busy, self.target_ms / self.correction)
        present = self.table.predict(target, batch, tokens + batch)
        self._expected = present if math.isfinite(present) else None
        return target
