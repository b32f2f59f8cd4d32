"""The history of the benchmarks that is kept: `docs/evidence/benchmarks.jsonl`, one line a run of a benchmark file.

`results.jsonl` has every case as it came and stays on its machine. Kept are runs that came to their end: of a file, a
machine and the versions the latest of a day, of a busy and of a quiet machine apart. A quick run (`--quick`: smaller
shapes, fewer repeats) is kept only until its file has been run in full, and never replaces a full one.
"""

import dataclasses
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxlab.core import jsonl

FILE = Path("evidence") / "benchmarks.jsonl"
"""Where it lies in the documentation's folder."""
BUSY = 0.25
"""Cores that others kept busy, from which on a run counts as one of a busy machine."""
_DECIDING = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "llama-cpp-python")
_DIGITS = 5


@dataclasses.dataclass(frozen=True)
class Run:
    """One benchmark file, run to its end.

    Attributes:
      file: its stem.
      system: whose cases it has.
      date: when it ended, UTC, ISO 8601.
      quick: whether with `--quick`.
      seconds: how long it took.
      threads: CPU cores this process may use.
      cpu: the processor's name.
      elsewhere: cores that other processes kept busy meanwhile, on average; None where that cannot be read.
      versions: of the packages that decide a time.
      cases: name -> value of each case: `case`, `metric`, `ours`, `peer`, `peer_name`, `ratio` (None: without bound),
        `bar`, `holds`.
    """

    file: str
    system: str
    date: str
    quick: bool
    seconds: float
    threads: int
    cpu: str
    elsewhere: float | None
    versions: dict[str, str]
    cases: list[dict[str, Any]]

    @property
    def day(self) -> str:
        """The date without its time."""
        return self.date[:10]

    @property
    def busy(self) -> bool:
        """Whether others are known to have worked on the machine."""
        return self.elsewhere is not None and self.elsewhere >= BUSY


class Neighbours:
    """What other processes take of this machine, from its creation on (Linux; elsewhere nothing is known)."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float | None:
        """Cores that they kept busy, on average; None where the system does not tell."""
        now = self._now()
        if now is None or self._start is None:
            return None
        all_of_it, own, passed = (a - b for a, b in zip(now, self._start, strict=True))
        return max(0.0, all_of_it - own) / passed if passed > 0 else 0.0

    def _now(self) -> tuple[float, float, float] | None:
        """Seconds of CPU of all processes, of this one with its children, and of the clock."""
        try:
            first = Path("/proc/stat").read_text().splitlines()[0].split()
        except OSError:
            return None
        # user, nice, system; idle and waiting for a disk are not work; interrupts, and what the hypervisor took.
        ticks = [int(field) for field in first[1:9]]
        busy = sum(ticks[:3] + ticks[5:]) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return busy, own.user + own.system + own.children_user + own.children_system, time.monotonic()


def case(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a record of `results.jsonl`."""
    names = ("case", "metric", "ours", "peer", "peer_name", "ratio", "bar", "holds")
    return {name: _rounded(row[name]) for name in names}


def versions(found: dict[str, str]) -> dict[str, str]:
    """What is kept of the versions."""
    return {name: found[name] for name in _DECIDING if name in found}


def read(path: Path) -> list[Run]:
    """All runs that were kept, by file and date; none where there is no history."""
    return [Run(**row) for row in jsonl.read(path)]


def keep(path: Path, run: Run) -> None:
    """Adds a run, and lets go of what it makes superfluous."""
    path.parent.mkdir(parents=True, exist_ok=True)
    jsonl.rewrite(path, (dataclasses.asdict(each) for each in thin([*read(path), run])))


def thin(runs: Iterable[Run]) -> list[Run]:
    """The latest run of a day, file, machine, its state and versions; quick ones only of files without a full one."""
    latest: dict[tuple, Run] = {}
    for run in sorted(runs, key=lambda run: run.date):
        # Of quick runs only the last is of interest: they are no history.
        where = (run.cpu, run.threads, run.busy, *sorted(run.versions.items()))
        key = (run.file, "quick") if run.quick else (run.file, run.day, *where)
        latest[key] = run
    full = {run.file for run in latest.values() if not run.quick}
    kept = [run for run in latest.values() if not run.quick or run.file not in full]
    return sorted(kept, key=lambda run: (run.file, run.date))


def current(runs: Sequence[Run]) -> list[Run]:
    """The latest run of each file."""
    return list({run.file: run for run in sorted(runs, key=lambda run: (run.file, run.date))}.values())


def ratio_text(value: float) -> str:
    """A ratio for a table: three digits, whole numbers from a hundred on."""
    return "∞" if math.isinf(value) else f"{value:,.0f}x" if value >= 100 else f"{value:.3g}x"


def _rounded(value: Any) -> Any:
    if not isinstance(value, float) or value == 0 or not math.isfinite(value):
        return value
    return float(f"{value:.{_DIGITS}g}")
