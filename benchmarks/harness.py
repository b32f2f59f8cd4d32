"""The one language of the benchmarks: cases, interleaved timing, the table and its history.

A system's file `benchmarks/<system>.py` has `cases(quick: bool) -> Iterator[Case]`; `python -m benchmarks [SYSTEM ...]`
prints the table, appends every case to `benchmarks/results.jsonl` and keeps the run (`benchmarks.history`).
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax


@dataclasses.dataclass(frozen=True)
class Case:
    """One figure beside its peer. `ratio` is always "how many times better ours is", so it holds when ratio >= bar."""

    system: str
    case: str
    metric: str  # what is counted, with its unit: "ms", "tokens/s", "temporary MiB"
    ours: float
    peer: float
    peer_name: str
    bar: float | None = None  # None: shown for information, never counted as missed
    higher_is_better: bool = False

    @property
    def ratio(self) -> float:
        """Ours against the peer, oriented so that larger is better."""
        better, worse = (self.ours, self.peer) if self.higher_is_better else (self.peer, self.ours)
        return float("inf") if worse == 0 else better / worse

    @property
    def holds(self) -> bool:
        """Whether the bar is met."""
        return self.bar is None or self.ratio >= self.bar


def interleaved(
    ours: Callable[[], object], peer: Callable[[], object], *, repeats: int = 5, warmup: int = 1
) -> tuple[float, float]:
    """Median seconds of two functions called in turn (ours, peer, ours, peer, ...), JAX results waited for."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(warmup + repeats):
        for index, function in enumerate((ours, peer)):
            start = time.perf_counter()
            jax.block_until_ready(function())
            if turn >= warmup:
                times[index].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])
