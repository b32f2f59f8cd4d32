"""Controllers of ours that weigh energy: the least-energy feasible clock, and one that plans over the queue.

EcoFreq takes the lowest clock that is fast enough. That is the cheapest one as long as it is above the sweet spot of
the U of energy against clock. These two look at predicted energy instead, so that all clocks of a GPU can be given.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from jaxlab.voltanallm.controller import Arrivals, Metrics, PredictingController, batch_and_tokens
from jaxlab.voltanallm.predictor import Predictor

_ROUNDS = 6
"""On the way to the balance of a batch and its latency; each leaves the share of the latency that is the batch's."""


class Rate:
    """What comes to a worker, or is done by it, each second, as its metrics tell; old observations fade.

    Args:
      memory_s: after so many seconds an observation counts 1/e.
    """

    def __init__(self, memory_s: float):
        self._memory_s = memory_s
        self._amount = self._time = 0.0
        self._before: Metrics | None = None

    @property
    def per_s(self) -> float:
        """Amount a second; 0 as long as nothing is known."""
        return max(self._amount, 0.0) / self._time if self._time > 0 else 0.0

    def see(self, metrics: Sequence[Metrics], amount: Callable[[Metrics, Metrics], float]) -> None:
        """Takes in metrics, oldest first; `amount` of one, given the one before, happened in the time between them."""
        for each in metrics:
            before, self._before = self._before, each
            if before is None or each.timestamp <= before.timestamp:
                continue
            gap = each.timestamp - before.timestamp
            keep = math.exp(-gap / self._memory_s)
            self._amount, self._time = keep * self._amount + amount(before, each), keep * self._time + gap


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
        table: Predictor,
        freqs: Sequence[int],
        slo_ms: float,
        *,
        energy: Predictor,
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

    def choose(self, latency_ms: np.ndarray, cost: np.ndarray, feasible: np.ndarray) -> int:
        """The cheapest feasible clock, or the highest one, counted, if none is. Arrays are by clock."""
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
        in_time = latency <= self.target_ms - self.waited_ms(metrics)
        return self.choose(latency, self.joules(*state, latency), in_time)


class ModelPredictive(EnergyController):
    """Plans with the tables what follows from a clock, and corrects them by what is measured.

    Prefill: two batches, the one about to run and the one behind it, which is made of the prompts that wait already and
    of those expected to come meanwhile, and `deviations` more where the deadline is concerned (Poisson arrivals of
    exponential lengths). Of all pairs of clocks the cheapest per token counts in which the batch meets its deadline and
    so does the next one, whose oldest prompt has waited longest; the first clock of the pair is named.

    Decode: a clock must meet the objective for the batch as it will be when the clock acts, with those on their way to
    it; and for the batch that it leads to. For requests stay longer at a lower clock: where W tokens a second are asked
    for, b = W * ITL(f, b, K) run at once, and as requests come at random, b is the mean of a Poisson distribution, of
    which `deviations` are allowed for. W is what is done, and what a growing batch adds: `mean_output` tokens for each
    request more. The cheapest clock draws least power in the long run: a batch that never runs empty draws its power
    all the time, however slow its iterations, while one that often does is better done soon; a share 1 - exp(-b) of the
    time is busy (M/G/infinity).

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
      memory_s: seconds over which the tokens asked for are averaged; several times what a request takes.
      mean_output: tokens of a request, as far as is known; it matters while the batch grows or shrinks.
      replan_s: seconds for which the batch that a clock leads to is not worked out anew.
      deviations: standard deviations kept as a reserve.

    Raises:
      ValueError: as `EnergyController`, or a number out of range.
    """

    def __init__(
        self,
        table: Predictor,
        freqs: Sequence[int],
        slo_ms: float,
        *,
        energy: Predictor,
        idle_w: float = 0.0,
        margin: float = 0.35,
        idle_s: float = 5.0,
        steps: int = 2,
        memory: float = 0.95,
        memory_s: float = 10.0,
        mean_output: float = 200.0,
        replan_s: float = 0.1,
        deviations: float = 2.0,
    ):
        super().__init__(table, freqs, slo_ms, energy=energy, idle_w=idle_w, margin=margin, idle_s=idle_s)
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        if not 0 <= memory < 1:
            raise ValueError(f"memory: expected a value in [0, 1), got {memory}")
        if not memory_s > 0:
            raise ValueError(f"memory_s: expected a positive number of seconds, got {memory_s}")
        if not deviations >= 0:
            raise ValueError(f"deviations: expected at least 0, got {deviations}")
        self.steps, self.memory, self.deviations = steps, memory, deviations
        self.mean_output, self.replan_s = mean_output, replan_s
        self._work = Rate(memory_s)
        self._ratio, self._variance = 1.0, 0.0
        self._under_way: tuple[int, float] | None = None
        self._before: Metrics | None = None
        self._balance_until = -math.inf
        self._balance = (np.zeros(0), np.zeros(0))

    @property
    def correction(self) -> float:
        """By which predictions are multiplied before they are compared with the objective."""
        return self._ratio + self.deviations * math.sqrt(self._variance)

    def _target(self, metrics: Sequence[Metrics], arrivals: Arrivals, now: float) -> int | None:
        if not metrics:
            return None
        self._work.see(metrics, self._asked)
        for each in metrics:
            self._learn(each)
        return self._plan_prefill(metrics[-1]) if self.phase == "prefill" else self._plan_decode(metrics[-1])

    def _asked(self, before: Metrics, each: Metrics) -> float:
        if self.phase == "prefill":
            return each.tokens
        return each.running + self.mean_output * (each.running - before.running)

    def _learn(self, seen: Metrics) -> None:
        before, self._before = self._before, seen
        if before is None:
            return
        under_way, self._under_way = self._under_way, None
        # Only a worker that went straight on from one iteration to the next tells how long one takes.
        busy = before.waiting > 0 if self.phase == "prefill" else before.running > 0 < seen.running
        if under_way is not None and busy:
            ratio = 1000 * (seen.timestamp - before.timestamp) / self.table.predict(self._last, *under_way)
            if 0.5 < ratio < 2:  # not where there is no prediction
                surprise = ratio - self._ratio
                self._ratio += (1 - self.memory) * surprise
                self._variance = self.memory * (self._variance + (1 - self.memory) * surprise**2)

    def _plan_prefill(self, last: Metrics) -> int | None:
        if not last.tokens:
            return None
        waits = sorted(last.queue_wait_s, reverse=True)  # first come, first served: the batch has the oldest
        behind = waits[len(waits) - last.waiting :]
        oldest = 1000 * waits[0] if len(waits) > last.waiting else 0.0
        length = last.tokens / max(last.running, 1)
        now_ms = self.table.predict(self._clocks, 1, last.tokens)
        asked = self._work.per_s * now_ms / 1000
        come = asked + last.waiting * length
        come = np.where(come >= 1, come, 0.0)
        # [clock of the next batch, clock of this one]; for the deadline more may come than is expected.
        next_ms = self.table.predict(self._clocks[:, None], 1, come)
        most_ms = self.table.predict(self._clocks[:, None], 1, come + self.deviations * np.sqrt(2 * length * asked))
        waited = 1000 * max(behind, default=0.0)
        slack = self.target_ms / self.correction
        in_time = (now_ms <= slack - oldest) & (now_ms + most_ms <= slack - waited)
        cost = self.joules(1, last.tokens, now_ms) + np.where(come > 0, self.joules(1, come, next_ms), 0.0)
        cost = np.where(in_time, cost / (last.tokens + come), np.inf).min(axis=0)
        self._under_way = (1, last.tokens)
        return self.choose(now_ms, cost, np.isfinite(cost))

    def _plan_decode(self, last: Metrics) -> int | None:
        batch, tokens = last.running, last.tokens
        if not (batch and tokens):
            return None
        length = tokens / batch
        later = max(batch, last.total)
        held = tokens + (later - batch) * length + self.steps * later
        limit = self.target_ms / self.correction
        latency = self.table.predict(self._clocks, later, held)
        if last.timestamp >= self._balance_until:
            self._balance_until = last.timestamp + self.replan_s
            self._balance = self._find_balance(length)
        mean, lasting = self._balance
        watts = 1000 * self.joules(later, held, latency) / latency * -np.expm1(-mean)
        # Where no clock can last the highest is named: it puts off the step for longest.
        self._under_way = (batch, tokens + batch)
        return self.choose(latency, watts, (latency <= limit) & (lasting <= limit))

    def _find_balance(self, length: float) -> tuple[np.ndarray, np.ndarray]:
        """By clock, the least number of requests at once that finish as many tokens as are asked for.

        Latency grows with the batch, so going up from nothing stops at the first balance, below the steps where there
        may be others. With it, the latency of the largest batch to be reckoned with then. NaN: above all segments.
        """
        asked = self._work.per_s / 1000
        mean = np.ones(len(self.freqs))
        for _ in range(_ROUNDS):
            batch = np.maximum(np.ceil(mean), 1)
            mean = asked * self.table.predict(self._clocks, batch, batch * length)
        mean = np.maximum(mean, 1e-3)
        most = np.ceil(mean + self.deviations * np.sqrt(mean))
        return mean, self.table.predict(self._clocks, most, most * length)
