"""The workers of the simulated cluster: queues, batches, clocks and energy meters. Time comes from the caller."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Role = Literal["prefill", "decode", "both"]


class Iteration(NamedTuple):
    """What a controller is told of an iteration; the attributes of the engine's `IterationMetrics`."""

    timestamp: float
    running: int
    total: int
    tokens: int
    waiting: int
    queue_wait_s: tuple[float, ...] = ()


class Clock:
    """A GPU's clock and what it has drawn.

    A change asked for at t is in force from t + delay; changes are made one after the other. An idle GPU draws the idle
    power at any clock.

    Args:
      mhz: at the start.
      delay_s: until a change is in force.
      power_w: of a busy GPU, by clock and phase.
    """

    __slots__ = ("_delay", "_power_w", "busy_j", "busy_s", "mhz", "pending", "switches", "target")

    def __init__(self, mhz: int, delay_s: float, power_w: Mapping[tuple[int, str], float]) -> None:
        self.mhz = self.target = mhz
        self.pending: deque[tuple[float, int]] = deque()
        self.switches = 0
        self.busy_j = 0.0
        self.busy_s: dict[int, float] = {}
        self._delay, self._power_w = delay_s, power_w

    def set(self, mhz: int, now: float) -> None:
        """Asks for a clock; one that is in force or on its way already is no change."""
        if mhz == self.target:
            return
        self.target = mhz
        self.switches += 1
        if self._delay > 0:
            self.pending.append((now + self._delay, mhz))
        else:
            self.mhz = mhz

    def settle(self, now: float) -> None:
        """Makes the changes that are in force by now."""
        while self.pending and self.pending[0][0] <= now:
            self.mhz = self.pending.popleft()[1]

    def run(self, now: float, seconds_at: Callable[[int], float]) -> list[tuple[int, float]]:
        """The stretches, (MHz, seconds), of work that would take `seconds_at(MHz)` at a clock that stayed.

        Where the clock changes on the way, the rest of the work goes on at the new one.
        """
        if self.pending:
            self.settle(now)
        if not self.pending:
            return [(self.mhz, seconds_at(self.mhz))]
        stretches, left, mhz = [], 1.0, self.mhz
        for when, following in self.pending:
            whole = seconds_at(mhz)
            if left * whole <= when - now:
                break
            stretches.append((mhz, when - now))
            left -= (when - now) / whole
            now, mhz = when, following
        stretches.append((mhz, left * seconds_at(mhz)))
        return stretches

    def spend(self, stretches: Sequence[tuple[int, float]], phase: str) -> None:
        """Counts work done."""
        for mhz, seconds in stretches:
            self.busy_j += self._power_w[mhz, phase] * seconds
            self.busy_s[mhz] = self.busy_s.get(mhz, 0.0) + seconds


class Noise:
    """Factors of mean 1 from a lognormal stream of a worker's own; all 1 where sigma is 0."""

    __slots__ = ("_block", "_generator", "_sigma")

    def __init__(self, sigma: float, seed: Sequence[int]) -> None:
        self._sigma, self._generator = sigma, np.random.default_rng(seed)
        self._block: list[float] = []

    def draw(self) -> float:
        """The next factor."""
        if self._sigma == 0:
            return 1.0
        if not self._block:
            drawn = self._generator.standard_normal(256)
            self._block = np.exp(self._sigma * drawn - self._sigma**2 / 2).tolist()
        return self._block.pop()


class Worker:
    """A worker's state; the simulator moves it on.

    Attributes:
      id: such as "decode0".
      role: "prefill", "decode", or "both" in a cluster of one pool.
      clock: of its GPU.
      controller: decides the clock; None: it stays.
      noise: of its iterations.
      queue: requests waiting for their prefill.
      unplaced: requests whose prompts are computed, for which there is no room in the KV pool yet.
      entering: requests that join the batch with the next iteration.
      leaving: number of an iteration -> requests whose last token it makes.
      iterations: decode iterations so far.
      running: requests in the batch.
      kv: tokens in their KV caches.
      reserved: tokens the KV pool has room kept for: every request here at its final length.
      load: tokens in KV caches, and prompts about to come in.
      in_flight: requests dispatched to it that have not finished.
      stretches: of the iteration under way; empty: idle.
      batch: of the prefill under way.
      phase: of the iteration under way.
      joined: members of the batch whose first decode iteration is under way.
      last_end: when the batch made its last tokens.
      idle_since: when it last fell idle.
      window_s: for which its controller wants to know what was dispatched to it; 0: it does not.
      arrivals: (time, prompt tokens) of that.
    """

    __slots__ = (
        "arrivals",
        "batch",
        "clock",
        "controller",
        "entering",
        "id",
        "idle_since",
        "in_flight",
        "iterations",
        "joined",
        "kv",
        "last_end",
        "last_itl_ms",
        "leaving",
        "load",
        "noise",
        "phase",
        "queue",
        "reserved",
        "role",
        "running",
        "started",
        "stretches",
        "unplaced",
        "window_s",
    )

    def __init__(self, id: str, role: Role, clock: Clock, controller: Any, noise: Noise, window_s: float = 0.0) -> None:
        self.id, self.role, self.clock, self.controller, self.noise = id, role, clock, controller, noise
        self.window_s = window_s
        self.queue: deque[int] = deque()
        self.unplaced: deque[int] = deque()
        self.entering: list[int] = []
        self.leaving: dict[int, list[int]] = {}
        self.iterations = self.running = self.kv = self.reserved = self.load = self.in_flight = 0
        self.stretches: list[tuple[int, float]] = []
        self.phase = "decode"
        self.batch: list[int] = []
        self.joined: list[int] = []
        self.started = self.last_end = self.last_itl_ms = self.idle_since = 0.0
        self.arrivals: deque[tuple[float, int]] = deque()
