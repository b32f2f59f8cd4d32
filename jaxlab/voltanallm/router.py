"""EcoRoute: which decode worker takes a request, so that no batch is pushed over a step of its latency staircase.

`tile_aware` is what the official demo calls EcoRoute, `state_space` the closest to the paper's what-if over batch size
and tokens (arXiv 2509.04827 and its code), `min_delta_energy` ours. Among equals the first in the list is taken.
"""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, cast, runtime_checkable

import numpy as np

from jaxlab.voltanallm.config import check_objective
from jaxlab.voltanallm.predictor import Predictor

ENERGY_DIFF_MIN = 64
"""Requests in flight at one worker below which `energy_diff` does not predict (official code, as the next ones)."""
ENERGY_DIFF_RESERVE_MS = 3.0
HEADROOM = 0.8
"""Part of the objective within which `hfl` takes a worker for fast enough."""
TOKENS_NOW, TOKENS_NEXT = 2, 50
"""Tokens that `state_space` adds for every request in flight, in the present state and in the next."""


@dataclasses.dataclass(frozen=True)
class RequestInfo:
    """What a router knows of a request.

    Attributes:
      id: its name.
      prompt_tokens: l, its length.
    """

    id: Hashable
    prompt_tokens: int


@runtime_checkable
class Worker(Protocol):
    """What a router knows of a worker; `WorkerState` is one, `jaxlab.inference`'s status of a worker another."""

    @property
    def id(self) -> Hashable:
        """Its name, which `route` returns."""
        ...

    @property
    def in_flight(self) -> int:
        """n, requests sent there and not done, by the front's own count; some may still be prefilling."""
        ...

    @property
    def freq(self) -> int:
        """Its clock in MHz."""
        ...

    @property
    def load(self) -> int:
        """Tokens it holds in its cache, and those of prompts that wait."""
        ...

    @property
    def last_itl_ms(self) -> float:
        """Its last inter-token latency."""
        ...

    @property
    def timestamp(self) -> float | None:
        """When it reported, in seconds; None: not told, never stale."""
        ...


@dataclasses.dataclass(frozen=True)
class WorkerState:
    """A worker's state by itself; the attributes are `Worker`'s."""

    id: Hashable
    in_flight: int
    freq: int
    load: int
    last_itl_ms: float = 0.0
    timestamp: float | None = None


Workers = Sequence[Worker]


class Router:
    """Chooses a worker from the states it is given; it keeps nothing but its place in the round and its random stream.

    The policies:

    - "rr": one after the other, the first worker first.
    - "ln": fewest in flight.
    - "ll": least load.
    - "hfl": among those whose last latency is within 0.8 of the objective the highest clock, then the most in flight;
      if there are none, the lowest last latency.
    - "tile_aware": below `tile` in flight everywhere, the lowest clock, then the fewest in flight; else the fullest
      worker that does not open another tile.
    - "state_space": the worker whose clock need not rise.
    - "energy_diff": the least predicted energy of an iteration with the request at the lowest feasible clock, minus
      that of one without it at the present clock (in the official code, unused).
    - "min_delta_energy": the same difference with both at their feasible clock of least energy (ours).
    - "random": uniformly (the paper's choice of a prefill worker).

    Args:
      policy: one of `POLICIES`.
      table: of decode latency; "state_space", "energy_diff" and "min_delta_energy" need it.
      energy_table: of decode energy; the last two need it.
      slo_ms: objective of the inter-token latency; those three and "hfl" need it.
      margin: the objective is stretched by this part of itself.
      tile: T, requests of a step of the staircase.
      seed: of the random stream.
      stale_s: workers that reported longer ago than this are passed over; None: none are.

    Raises:
      ValueError: an unknown policy, something missing that it needs, or a number out of range.
    """

    def __init__(
        self,
        policy: str,
        *,
        table: Predictor | None = None,
        energy_table: Predictor | None = None,
        slo_ms: float | None = None,
        margin: float = 0.0,
        tile: int = 128,
        seed: int = 0,
        stale_s: float | None = None,
    ):
        if policy not in _NEEDS:
            raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
        for name, value in (("table", table), ("energy_table", energy_table), ("slo_ms", slo_ms)):
            if value is None and name in _NEEDS[policy]:
                raise ValueError(f"{name}: expected one for policy {policy!r}, got None")
        for name, value in (("table", table), ("energy_table", energy_table)):
            if value is not None and value.phase != "decode":
                raise ValueError(f"{name}: expected a decode table, got one of phase {value.phase!r}")
        check_objective(1.0 if slo_ms is None else slo_ms, margin)
        if tile < 1:
            raise ValueError(f"tile: expected at least 1 request, got {tile}")
        if stale_s is not None and not stale_s > 0:
            raise ValueError(f"stale_s: expected a positive number of seconds or None, got {stale_s}")
        self.policy = policy
        self._table, self._energy = cast(Predictor, table), cast(Predictor, energy_table)  # where needed
        self._target_ms = math.inf if slo_ms is None else slo_ms * (1 + margin)
        self._tile = tile
        self._stale_s = stale_s
        self._turn = itertools.count()
        self._stream = np.random.default_rng(seed)
        self._choose: Callable[[RequestInfo, Workers], Worker] = getattr(self, f"_{policy}")

    def route(self, request: RequestInfo, workers: Workers, now: float | None = None) -> Hashable:
        """The id of the worker that shall take a request.

        If all are stale, the one with the fewest in flight takes it, with a warning.

        Args:
          request: the request.
          workers: in an order that is kept among equals.
          now: seconds, on the clock of their time stamps; needed with `stale_s`.

        Raises:
          ValueError: no workers, no `now` with `stale_s`, or a clock outside the energy table ("energy_diff").
        """
        if not workers:
            raise ValueError("workers: expected at least one, got none")
        if self._stale_s is None:
            return self._choose(request, workers).id
        if now is None:
            raise ValueError("now: expected the time, as stale_s is set, got None")
        fresh = [each for each in workers if each.timestamp is None or now - each.timestamp <= self._stale_s]
        if fresh:
            return self._choose(request, fresh).id
        warnings.warn(
            f"none of {len(workers)} workers has reported within {self._stale_s} s; the fewest in flight decide",
            RuntimeWarning,
            stacklevel=2,
        )
        return self._ln(request, workers).id

    def _rr(self, request: RequestInfo, workers: Workers) -> Worker:
        return workers[next(self._turn) % len(workers)]

    def _random(self, request: RequestInfo, workers: Workers) -> Worker:
        return workers[int(self._stream.integers(len(workers)))]

    def _ln(self, request: RequestInfo, workers: Workers) -> Worker:
        return min(workers, key=lambda each: each.in_flight)

    def _ll(self, request: RequestInfo, workers: Workers) -> Worker:
        return min(workers, key=lambda each: each.load)

    def _fastest(self, workers: Workers) -> Worker:
        return min(workers, key=lambda each: each.last_itl_ms)

    def _hfl(self, request: RequestInfo, workers: Workers) -> Worker:
        quick = [each for each in workers if each.last_itl_ms <= HEADROOM * self._target_ms]
        return min(quick, key=lambda each: (-each.freq, -each.in_flight)) if quick else self._fastest(workers)

    def _light(self, workers: Workers, limit: int) -> Worker | None:
        """Where nobody has reached the limit: the lowest clock, then the fewest in flight."""
        if max(each.in_flight for each in workers) >= limit:
            return None
        return min(workers, key=lambda each: (each.freq, each.in_flight))

    def _tiles(self, worker: Worker) -> tuple[int, int]:
        return -(-worker.in_flight // self._tile), -worker.in_flight

    def _tile_aware(self, request: RequestInfo, workers: Workers) -> Worker:
        light = self._light(workers, self._tile)
        if light is not None:
            return light
        ordered = sorted(workers, key=self._tiles)
        return next((each for each in ordered if each.in_flight == 0 or each.in_flight % self._tile), ordered[0])

    def _state_space(self, request: RequestInfo, workers: Workers) -> Worker:
        light = self._light(workers, self._tile)
        if light is not None:
            return light
        count, load = _counts(workers)
        tokens = np.stack([load + TOKENS_NOW * count, load + request.prompt_tokens + TOKENS_NEXT * count])
        now, then = self._levels(np.stack([count, count + 1]), tokens, self._target_ms).tolist()
        highest = len(self._freqs) - 1
        # A level stands for its clock; one more than it, so that a sign can say that the clock need not rise.
        keys = [b + 1 if b > a or b >= highest else -(a + 1) for a, b in zip(now, then)]
        order = sorted(range(len(workers)), key=lambda i: (abs(keys[i]), keys[i], *self._tiles(workers[i])))
        if abs(keys[order[-1]]) - abs(keys[order[0]]) >= 2:
            return workers[order[0]]
        return workers[min(order, key=lambda i: (keys[i], *self._tiles(workers[i])))]

    @property
    def _freqs(self) -> tuple[int, ...]:
        return self._table.freqs

    def _levels(self, count: np.ndarray, tokens: np.ndarray, limit_ms: float) -> np.ndarray:
        """Index of the lowest clock that keeps the limit, or of the highest one if none does; any shape."""
        feasible = self._table.predict(_column(self._freqs, count), count, tokens) <= limit_ms
        feasible[-1] = True
        return np.argmax(feasible, axis=0)

    def _energy_diff(self, request: RequestInfo, workers: Workers) -> Worker:
        light = self._light(workers, ENERGY_DIFF_MIN)
        if light is not None:
            return light
        count, load = _counts(workers)
        after = (count + 1, load + request.prompt_tokens)
        clocks = np.array(self._freqs)
        feasible = self._table.predict(clocks[:, None], *after) <= self._target_ms - ENERGY_DIFF_RESERVE_MS
        clock = clocks[np.argmax(feasible, axis=0)]
        before = self._energy.predict(np.array([each.freq for each in workers]), count, load)
        rise = np.where(feasible.any(axis=0), self._energy.predict(clock, *after) - before, np.nan)
        return self._fastest(workers) if np.isnan(rise).all() else workers[int(np.nanargmin(rise))]

    def _min_delta_energy(self, request: RequestInfo, workers: Workers) -> Worker:
        count, load = _counts(workers)
        counts, loads = np.stack([count, count + 1]), np.stack([load, load + request.prompt_tokens])
        clocks = _column(self._freqs, counts)
        latency = self._table.predict(clocks, counts, loads)
        joules = np.where(latency <= self._target_ms, self._energy.predict(clocks, counts, loads), np.inf)
        before, after = _or_inf(joules).min(axis=0)
        # A worker that misses its objective already runs at its highest clock.
        late = _or_inf(self._energy.predict(self._freqs[-1], count, load))
        before = np.where(np.isinf(before), late, before)
        possible = np.isfinite(after) & np.isfinite(before)
        if possible.any():
            return workers[int(np.argmin(np.where(possible, after - np.where(possible, before, 0), np.inf)))]
        last = _or_inf(latency[-1, 1])
        return min(zip(last.tolist(), workers), key=lambda each: (each[0], each[1].in_flight))[1]


_NEEDS: dict[str, tuple[str, ...]] = {
    "rr": (),
    "ln": (),
    "ll": (),
    "hfl": ("slo_ms",),
    "tile_aware": (),
    "state_space": ("table", "slo_ms"),
    "energy_diff": ("table", "energy_table", "slo_ms"),
    "min_delta_energy": ("table", "energy_table", "slo_ms"),
    "random": (),
}
POLICIES = tuple(_NEEDS)


def _counts(workers: Workers) -> tuple[np.ndarray, np.ndarray]:
    return np.array([each.in_flight for each in workers]), np.array([each.load for each in workers])


def _column(freqs: Sequence[int], like: np.ndarray) -> np.ndarray:
    """[F, 1, ...], to broadcast against an array."""
    return np.array(freqs).reshape(-1, *(1,) * like.ndim)


def _or_inf(values: np.ndarray) -> np.ndarray:
    """What has no prediction is out of reach."""
    return np.where(np.isnan(values), np.inf, values)
