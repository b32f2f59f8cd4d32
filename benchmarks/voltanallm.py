"""VoltanaLLM: decisions, routing and lookups against their time limits, on the host's hot path.

The limits are those of the specification's section 7; a ratio of 1 meets them. Decisions and routes are timed one by
one, and the 99th percentile counts; in CPU time, as the machine may be busy.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from benchmarks.harness import Case, interleaved
from jaxlab.voltanallm import (
    EcoFreq,
    LatencyTable,
    LeastEnergy,
    ModelPredictive,
    PowerModel,
    RequestInfo,
    Router,
    WorkerState,
)
from jaxlab.voltanallm.config import A100_CLOCKS
from jaxlab.voltanallm.fitting import BOUNDARIES
from jaxlab.voltanallm.predictor import Plane
from jaxlab.voltanallm.router import POLICIES

SYSTEM = "voltanallm"
# Bars of the specification, section 7.
DECIDE_MS, ROUTE_MS, LOOKUP_BAR = 0.2, 0.5, 50.0
ROWS, WORKERS = 100_000, 16


def cases(quick: bool) -> Iterator[Case]:
    """Control without a GPU; nothing here runs on JAX."""
    yield from control_cases(quick)


def control_cases(quick: bool) -> Iterator[Case]:
    """A table of all official segments at five clocks; states at random."""
    table, calls = _table(), 500 if quick else 5000
    power = PowerModel()
    energy = power.energy_table(table)
    rng = np.random.default_rng(0)
    states = [
        (_Iteration(0.02 * index, running, running, 300 * running),)
        for index, running in enumerate(rng.integers(1, 1024, calls).tolist())
    ]
    for controller, bar in (
        (EcoFreq(table, A100_CLOCKS, 50.0), 1.0),
        (LeastEnergy(table, A100_CLOCKS, 50.0, energy=energy), None),
        (ModelPredictive(table, A100_CLOCKS, 50.0, energy=energy, idle_w=power.idle_w), None),
    ):
        taken = percentile_ms(lambda state, decide=controller.decide: decide(state), states)
        what = f"decide of {type(controller).__name__}, p99 of {calls}"
        yield Case(SYSTEM, what, "CPU ms", taken, DECIDE_MS, f"limit of {DECIDE_MS:g} ms", bar)
    clusters = [
        [
            WorkerState(worker, n, int(rng.choice(A100_CLOCKS)), 300 * n, float(rng.uniform(10, 60)))
            for worker, n in enumerate(rng.integers(100, 300, WORKERS).tolist())
        ]
        for _ in range(50)
    ]
    request = RequestInfo("r", 400)
    for policy in POLICIES:
        router = Router(policy, table=table, energy_table=energy, slo_ms=50.0)
        taken = percentile_ms(
            lambda index, route=router.route: route(request, clusters[index % len(clusters)]), range(calls)
        )
        what = f"route of {policy} among {WORKERS} workers, p99 of {calls}"
        yield Case(SYSTEM, what, "CPU ms", taken, ROUTE_MS, f"limit of {ROUTE_MS:g} ms", 1.0)
    freq, batch = rng.choice(A100_CLOCKS, ROWS), rng.integers(1, 1024, ROWS)
    rows = (freq, batch, 300 * batch)
    listed = [column.tolist() for column in rows]
    ours, peer = interleaved(
        lambda: table.predict(*rows), lambda: [table.predict(*row) for row in zip(*listed)], repeats=3 if quick else 7
    )
    yield Case(
        SYSTEM, f"LatencyTable.predict of {ROWS} rows", "ms", 1000 * ours, 1000 * peer, "scalar lookups", LOOKUP_BAR
    )


def percentile_ms(function: Callable[..., object], arguments: Iterable[Any]) -> float:
    """The 99th percentile of the CPU time of single calls, after a tenth as many that do not count."""
    arguments = list(arguments)
    for argument in arguments[: len(arguments) // 10]:
        function(argument)
    times = []
    for argument in arguments:
        start = time.thread_time()
        function(argument)
        times.append(time.thread_time() - start)
    return 1000 * float(np.percentile(times, 99))


@dataclasses.dataclass(frozen=True)
class _Iteration:
    timestamp: float
    running: int
    total: int
    tokens: int
    waiting: int = 0
    queue_wait_s: tuple[float, ...] = ()


def _table() -> LatencyTable:
    """About what an A100 does with an 8B model: made up, for its shape."""
    starts = (1, *(end + 1 for end in BOUNDARIES[:-1]))
    return LatencyTable(
        "decode",
        [
            Plane(freq, 5e-5, 8 + 0.1 * start**0.5 * 1410 / freq, 0.03 * 1410 / freq, start, end)
            for freq in A100_CLOCKS
            for start, end in zip(starts, BOUNDARIES)
        ],
    )
