"""VoltanaLLM's rules written out slowly: lookups, EcoFreq, routing, energy of a clock that changes.

`predict(f, b, K)` is any function of three numbers; a table is {clock: [(start, end, alpha, beta, gamma), ...]}.
"""

import itertools
import math
from fractions import Fraction

NAN = float("nan")


def lookup(table, f, b, tokens, extrapolate=False):
    """One decode prediction."""
    clocks = sorted(table)

    def at(clock):
        for start, end, alpha, beta, gamma in table[clock]:
            if start <= b <= end:
                return alpha * b + beta * tokens + gamma
        return NAN

    if f in clocks:
        value = at(f)
    else:
        if not clocks[0] < f < clocks[-1] and not extrapolate:
            raise ValueError(f)
        if len(clocks) == 1:
            value = at(clocks[0])
        else:
            pairs = list(itertools.pairwise(clocks))
            low, high = next(((x, y) for x, y in pairs if f < y), pairs[-1])
            value = at(low) + (at(high) - at(low)) * (f - low) / (high - low)
    if b <= 0 or tokens <= 0:
        return 0.0
    return 20.0 if value <= 0 else value


def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else Fraction(ordered[middle - 1] + ordered[middle], 2)


class EcoFreq:
    """The pseudo-code of the paper's controller, with the batch rounded up."""

    def __init__(self, predict, freqs, slo, margin, phase, *, total=False, tps=None, rps=None, window=1.0, idle=5.0):
        self.predict, self.F, self.S, self.phase = predict, sorted(freqs), slo * (1 + margin), phase
        self.total, self.tps, self.rps, self.window, self.idle = total, tps, rps, window, idle
        self.busy_at = None

    def decide(self, metrics, arrivals, now):
        idle_for = 0 if self.busy_at is None else now - self.busy_at
        if metrics or self.busy_at is None:
            self.busy_at = now
        tokens_in = requests_in = 0
        for time, tokens in arrivals:
            if now - time < self.window:
                tokens_in += tokens
                requests_in += 1
        if self.tps is not None and tokens_in / self.window > self.tps:
            return self.F[-1]
        if self.rps is not None and requests_in / self.window > self.rps:
            return self.F[-1]
        if not metrics:
            return self.F[0] if idle_for > self.idle else None
        if metrics[-1].waiting > 0:
            return self.F[-1]
        nonzero = [m.tokens for m in metrics if m.tokens != 0]
        if not nonzero:
            return None
        tokens = float(median(nonzero))
        wait = 0.0
        if self.phase == "decode":
            b = math.ceil(median([m.total if self.total else m.running for m in metrics]))
        else:
            b = 1
            wait = 1000 * max(list(metrics[-1].queue_wait_s) or [0])
        for f in self.F[:-1]:
            if self.predict(f, b, tokens) <= self.S - wait:
                return f
        return self.F[-1]


def _first_smallest(workers, key):
    best = None
    for worker in workers:
        if best is None or key(worker) < key(best):
            best = worker
    return best


def _light(workers, limit):
    if max(w.in_flight for w in workers) < limit:
        return _first_smallest(workers, lambda w: (w.freq, w.in_flight))
    return None


def tile_aware(workers, tile):
    light = _light(workers, tile)
    if light is not None:
        return light.id
    ordered = sorted(workers, key=lambda w: (math.ceil(w.in_flight / tile), -w.in_flight))
    for w in ordered:
        if w.in_flight == 0 or w.in_flight % tile != 0:
            return w.id
    return ordered[0].id


def state_space(workers, prompt, predict, clocks, limit, tile):
    light = _light(workers, tile)
    if light is not None:
        return light.id
    clocks = sorted(clocks)

    def lowest(b, tokens):
        for f in clocks:
            if predict(f, b, tokens) <= limit:
                return f
        return clocks[-1]

    keyed = []
    for w in workers:
        n, load = w.in_flight, w.load
        current = lowest(n, load + 2 * n)
        following = lowest(n + 1, load + prompt + 50 * n)
        keyed.append((following if following > current or following == clocks[-1] else -current, w))
    keyed.sort(key=lambda kw: (abs(kw[0]), kw[0], math.ceil(kw[1].in_flight / tile), -kw[1].in_flight))
    if clocks.index(abs(keyed[-1][0])) - clocks.index(abs(keyed[0][0])) >= 2:
        return keyed[0][1].id
    order = {id(w): place for place, w in enumerate(workers)}
    return min(keyed, key=lambda kw: (kw[0], math.ceil(kw[1].in_flight / tile), -kw[1].in_flight, order[id(kw[1])]))[
        1
    ].id


def hfl(workers, limit):
    quick = [w for w in workers if w.last_itl_ms <= 0.8 * limit]
    if quick:
        return _first_smallest(quick, lambda w: (-w.freq, -w.in_flight)).id
    return _first_smallest(workers, lambda w: w.last_itl_ms).id


def energy_diff(workers, prompt, predict, energy, clocks, limit):
    light = _light(workers, 64)
    if light is not None:
        return light.id
    best = None
    for w in workers:
        after = (w.in_flight + 1, w.load + prompt)
        for f in sorted(clocks):
            if predict(f, *after) <= limit - 3:
                rise = energy(f, *after) - energy(w.freq, w.in_flight, w.load)
                if rise == rise and (best is None or rise < best[0]):
                    best = (rise, w)
                break
    return (best[1] if best else _first_smallest(workers, lambda w: w.last_itl_ms)).id


def min_delta_energy(workers, prompt, predict, energy, clocks, limit):
    best = None
    for w in workers:

        def cheapest(b, tokens):
            found = [energy(f, b, tokens) for f in clocks if predict(f, b, tokens) <= limit]
            return min((value for value in found if value == value), default=None)

        after = cheapest(w.in_flight + 1, w.load + prompt)
        before = cheapest(w.in_flight, w.load)
        if before is None:
            before = energy(max(clocks), w.in_flight, w.load)
        if after is not None and before == before and (best is None or after - before < best[0]):
            best = (after - before, w)
    if best:
        return best[1].id

    def late(w):
        value = predict(max(clocks), w.in_flight + 1, w.load + prompt)
        return (value if value == value else math.inf, w.in_flight)

    return _first_smallest(workers, late).id


def energy_j(events, power_w, until, step=1e-3):
    """Power summed over small steps; events are (time, clock) from which a clock is in force, the first at 0."""
    total, time = 0.0, 0.0
    for index in range(round(until / step)):
        time = (index + 0.5) * step
        clock = [c for t, c in events if t <= time][-1]
        total += power_w(clock) * step
    return total
