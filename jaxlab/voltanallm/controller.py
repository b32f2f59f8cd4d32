"""EcoFreq: the lowest clock whose predicted latency meets the objective, at every wake-up (arXiv 2509.04827).

A controller is woken with the metrics of the iterations since the last time and says what the clock shall be. There is
no feedback but the measured state.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxlab.voltanallm.config import Phase, check_clocks, check_objective, check_window
from jaxlab.voltanallm.predictor import Predictor


@runtime_checkable
class Metrics(Protocol):
    """One iteration of a worker; `jaxlab.inference.IterationMetrics` is one.

    A prefill worker tells it before the batch runs, a decode worker after the step.
    """

    @property
    def timestamp(self) -> float:
        """Seconds."""
        ...

    @property
    def running(self) -> int:
        """Requests in the batch."""
        ...

    @property
    def total(self) -> int:
        """Those and the ones that wait for a place: in transfer, without pages yet, queued."""
        ...

    @property
    def tokens(self) -> int:
        """In the running requests' caches, or of the batch's prompts."""
        ...

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        ...

    @property
    def queue_wait_s(self) -> Sequence[float]:
        """Seconds that prompts have waited, one each: the batch's, where it has not run yet, and the queue's."""
        ...


Arrivals = Sequence[tuple[float, int]]


@dataclasses.dataclass
class Counters:
    """What a controller has done.

    Attributes:
      decisions: calls that named a clock.
      switches: of those, to another clock than before.
      infeasible: of those, for the highest clock because no clock was predicted to meet the objective.
      unpredicted: of those, because the table has no prediction: the batch is above its last segment.
    """

    decisions: int = 0
    switches: int = 0
    infeasible: int = 0
    unpredicted: int = 0


class ClockController:
    """What all controllers share: their clocks, their counters, and the drop to the lowest clock when idle.

    Args:
      freqs: MHz to choose from.
      idle_s: without metrics for longer than this, the lowest clock is named. The time before the first call does not
        count.
      least: clocks that it needs at least.

    Attributes:
      freqs: ascending.
      counters: see `Counters`.
      hysteresis: decisions for a lower clock that are withheld before one is obeyed (ours); 0, the paper's: none.

    Raises:
      ValueError: too few clocks, or one twice.
    """

    def __init__(self, freqs: Sequence[int], *, idle_s: float = 5.0, least: int = 2):
        self.freqs = check_clocks(freqs, least=least)
        self.idle_s = idle_s
        self.counters = Counters()
        self.hysteresis = 0
        self._last = self.freqs[0]
        self._withheld = 0
        self._busy_at: float | None = None

    def decide(self, metrics: Sequence[Metrics], arrivals: Arrivals = (), now: float = 0.0) -> int | None:
        """The clock from now on.

        Args:
          metrics: of the iterations since the last call, oldest first.
          arrivals: (seconds, prompt tokens) of requests; those too old to count may be among them.
          now: seconds, on the clock of the metrics and arrivals.

        Returns:
          MHz, even if it is the clock already; None to keep what is.
        """
        if metrics or self._busy_at is None:
            idle_for, self._busy_at = 0.0, now
        else:
            idle_for = now - self._busy_at
        target = self._target(metrics, arrivals, now)
        if target is None and not metrics and idle_for > self.idle_s:
            target = self.freqs[0]
        elif target is not None and target < self._last and self._withheld < self.hysteresis:
            self._withheld += 1
            target = self._last
        else:
            self._withheld = 0
        if target is not None:
            self.counters.decisions += 1
            self.counters.switches += target != self._last
            self._last = target
        return target

    def _target(self, metrics: Sequence[Metrics], arrivals: Arrivals, now: float) -> int | None:
        raise NotImplementedError


class Objective:
    """An objective that may be changed while a controller is in use; the margin stays.

    Args:
      slo_ms: time to first token of prefill, inter-token latency of decode.
      margin: the objective is stretched by this part of itself.

    Attributes:
      margin: see above.

    Raises:
      ValueError: a number out of range.
    """

    def __init__(self, slo_ms: float, margin: float):
        self.margin = margin
        self.slo_ms = slo_ms

    @property
    def slo_ms(self) -> float:
        """The objective."""
        return self._slo_ms

    @slo_ms.setter
    def slo_ms(self, slo_ms: float) -> None:
        check_objective(slo_ms, self.margin)
        self._slo_ms = slo_ms

    @property
    def target_ms(self) -> float:
        """The stretched objective."""
        return self.slo_ms * (1 + self.margin)


class PredictingController(Objective, ClockController):
    """A controller that compares predicted latencies with its objective.

    Args:
      table: latency; its phase is the worker's.
      freqs: MHz to choose from, within the table's range.
      slo_ms: objective: time to first token of prefill, inter-token latency of decode.
      margin: the objective is stretched by this part of itself (demo).
      idle_s: without metrics for longer than this, the lowest clock is named.

    Raises:
      ValueError: fewer than two clocks, one twice or outside the table, or a number out of range.
    """

    def __init__(
        self,
        table: Predictor,
        freqs: Sequence[int],
        slo_ms: float,
        *,
        margin: float = 0.35,
        idle_s: float = 5.0,
    ):
        ClockController.__init__(self, freqs, idle_s=idle_s)
        for freq, nearest in ((self.freqs[0], table.freqs[0]), (self.freqs[-1], table.freqs[-1])):
            if not table.freqs[0] <= freq <= table.freqs[-1]:
                raise ValueError(f"freqs: expected clocks within the table, the nearest is {nearest} MHz, got {freq}")
        Objective.__init__(self, slo_ms, margin)
        self.table = table

    @property
    def phase(self) -> Phase:
        """The table's."""
        return self.table.phase

    def waited_ms(self, metrics: Sequence[Metrics]) -> float:
        """What the oldest prompt has used up of the objective; 0 for decode."""
        return 1000 * max(metrics[-1].queue_wait_s, default=0.0) if self.phase == "prefill" else 0.0

    def lowest_feasible(self, batch: float, tokens: float, limit_ms: float) -> int:
        """The lowest clock within a limit, or the highest one, counted, if none is."""
        latency = math.nan
        for freq in self.freqs:
            latency = self.table.predict(freq, batch, tokens)
            if latency <= limit_ms:
                return freq
        self.count_infeasible(latency)
        return self.freqs[-1]

    def count_infeasible(self, latency_ms: float) -> None:
        """Counts a decision for the highest clock although it is too slow, or has no prediction (NaN)."""
        self.counters.infeasible += 1
        self.counters.unpredicted += math.isnan(latency_ms)


class EcoFreq(PredictingController):
    """The paper's controller, as in its code; the batch size is rounded up, so that it always falls in a segment.

    It takes the lowest feasible clock, not the one of least energy: its lowest clock belongs at or above the sweet spot
    (`jaxlab.voltanallm.wasteful_clocks`).

    Args:
      table: latency; its phase is the worker's.
      freqs: MHz to choose from, within the table's range.
      slo_ms: objective: time to first token of prefill, inter-token latency of decode.
      margin: the objective is stretched by this part of itself (demo).
      use_total_batch: take `total` for the batch size instead of `running`.
      tps_threshold: arriving tokens a second above which the highest clock is named; None: no such rule.
      rps_threshold: the same for requests a second.
      window_s: over which arrivals are counted.
      idle_s: without metrics for longer than this, the lowest clock is named.

    Raises:
      ValueError: fewer than two clocks, one twice or outside the table, or a number out of range.
    """

    def __init__(
        self,
        table: Predictor,
        freqs: Sequence[int],
        slo_ms: float,
        *,
        margin: float = 0.35,
        use_total_batch: bool = False,
        tps_threshold: float | None = None,
        rps_threshold: float | None = None,
        window_s: float = 1.0,
        idle_s: float = 5.0,
    ):
        super().__init__(table, freqs, slo_ms, margin=margin, idle_s=idle_s)
        check_window(window_s, idle_s, tps_threshold, rps_threshold)
        self.use_total_batch = use_total_batch
        self.tps_threshold, self.rps_threshold, self.window_s = tps_threshold, rps_threshold, window_s

    def _target(self, metrics: Sequence[Metrics], arrivals: Arrivals, now: float) -> int | None:
        highest = self.freqs[-1]
        if self.tps_threshold is not None or self.rps_threshold is not None:
            recent = [tokens for time, tokens in arrivals if now - time < self.window_s]
            if self.tps_threshold is not None and sum(recent) / self.window_s > self.tps_threshold:
                return highest
            if self.rps_threshold is not None and len(recent) / self.window_s > self.rps_threshold:
                return highest
        if not metrics:
            return None
        if metrics[-1].waiting > 0:
            return highest
        state = batch_and_tokens(metrics, self.phase, use_total_batch=self.use_total_batch)
        if state is None:
            return None
        return self.lowest_feasible(*state, self.target_ms - self.waited_ms(metrics))


def batch_and_tokens(
    metrics: Sequence[Metrics], phase: str, *, use_total_batch: bool = False
) -> tuple[int, float] | None:
    """Median batch size, rounded up (1 for prefill), and median of the tokens that are not 0; None if all are."""
    tokens = [each.tokens for each in metrics if each.tokens]
    if not tokens:
        return None
    if phase == "prefill":
        return 1, statistics.median(tokens)
    batches = [each.total if use_total_batch else each.running for each in metrics]
    return math.ceil(statistics.median(batches)), statistics.median(tokens)
