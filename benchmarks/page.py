"""`python -m benchmarks.page` writes docs/benchmarks.md from the history that was kept, as `python -m benchmarks` does.

One table a system, a picture of all ratios against their bars, and one over dates once there are two of them.
"""

import argparse
import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import NAMES, history, markdown
from benchmarks.history import BUSY, Run, ratio_text

DOCS = Path(__file__).resolve().parent.parent / "docs"
OVERVIEW, OVER_TIME = Path("evidence") / "benchmarks.png", Path("evidence") / "benchmarks_history.png"
_LEAST, _MOST = 0.25, 100.0


def write(docs: Path = DOCS) -> None:
    """The page and its pictures, from the history in a documentation's folder."""
    from benchmarks.__main__ import modules
    from jaxlab import core

    runs = history.read(docs / history.FILE)
    latest = history.current(runs)
    if _with_bars(latest):
        _save(overview(latest), docs / OVERVIEW)
    over_time = len(_lines(runs)) > 0
    if over_time:
        _save(over_dates(runs), docs / OVER_TIME)
    core.replace_file(docs / "benchmarks.md", "\n".join(lines(latest, modules(), over_time)) + "\n")


def lines(latest: Sequence[Run], known: Mapping[str, str], over_time: bool = False) -> Iterator[str]:
    """The page, line by line.

    Args:
      latest: the latest run of each file.
      known: stem -> system of all files there are.
      over_time: whether there is a picture over dates.
    """
    yield from ("# Benchmarks", "")
    yield (
        "Written by `make bench` (`SYSTEM=name`, `QUICK=1`) from `docs/evidence/benchmarks.jsonl`; nothing here is "
        "typed by hand. A ratio says how many times better ours is: faster, smaller, more a second. Ours and the peer "
        "run in one process, in turn, after warm-up; a bar that is missed stays, marked."
    )
    yield ""
    yield (
        "**What to hold against a row.** *quick*: `--quick` was on: shapes are smaller and repeats fewer, so that the "
        "row shows that the comparison works, and little more; it gives way to a full run and never replaces one. "
        f"*busy*: other processes kept {BUSY:g} cores or more of the machine busy meanwhile, as measured; ratios of "
        "times are then not to be relied on, those of bytes are. What was measured on a quiet machine before this "
        "history began is told on the systems' pages."
    )
    if _with_bars(latest):
        yield from ("", f"![Each ratio over its bar, by system]({OVERVIEW.as_posix()})")
        yield from (
            "",
            "*Each dot a case with a bar; right of the line it holds. Hollow: quick. Dots at an edge lie beyond it.*",
        )
    if over_time:
        yield from ("", f"![Ratios over bars, by date]({OVER_TIME.as_posix()})")
    yield ""
    yield from markdown.table(
        ("system", "bars that hold", "files run in full", "quick only", "not here yet", "latest", "busy"),
        (_summary(system, latest, known) for system in _systems(known)),
    )
    for system in _systems(known):
        yield from ("", f"## {NAMES.get(system, system)}", "")
        yield from _section([run for run in latest if run.system == system], _missing(system, latest, known))


def overview(latest: Sequence[Run]) -> Any:
    """A figure: ratio over bar of every case with a bar, one row a system."""
    from jaxlab.core import figures

    shown = _with_bars(latest)
    systems = [
        name for name in _systems({run.file: run.system for run in latest}) if name in {run.system for run, _ in shown}
    ]
    drawn, axes = figures.figure(8.0, 0.8 + 0.42 * len(systems))
    for row, system in enumerate(systems):
        cases = [(run, case) for run, case in shown if run.system == system]
        for place, (run, case) in enumerate(cases):
            colour = figures.GREEN if case["holds"] else figures.RED
            height = row + 0.5 * ((place + 0.5) / len(cases) - 0.5)
            axes.plot(
                _over_bar(case),
                height,
                "o",
                color=colour,
                markersize=5,
                markerfacecolor="white" if run.quick else colour,
            )
    axes.axvline(1, color=figures.GREY, linewidth=1.2)
    axes.set(xscale="log", xlim=(_LEAST * 0.9, _MOST * 1.1), xlabel="ratio / bar", ylim=(len(systems) - 0.5, -0.5))
    axes.set_xticks([0.25, 0.5, 1, 2, 5, 10, 100], ["1/4", "1/2", "1", "2", "5", "10", "100"])
    axes.set_yticks(range(len(systems)), [NAMES.get(system, system) for system in systems])
    return drawn


def over_dates(runs: Sequence[Run]) -> Any:
    """A figure: ratio over bar by date, a line for each case run in full on more than one day of one machine."""
    from jaxlab.core import figures

    drawn, axes = figures.figure(8.0, 4.2)
    systems: dict[str, str] = {}
    for system, points in _lines(runs):
        first = system not in systems
        colour = systems.setdefault(system, figures.COLOURS[len(systems) % len(figures.COLOURS)])
        days = [datetime.date.fromisoformat(day) for day, _ in points]
        label = NAMES.get(system, system) if first else None
        axes.plot(days, [value for _, value in points], "o-", color=colour, linewidth=1, markersize=3, label=label)
    axes.axhline(1, color=figures.GREY, linewidth=1.2)
    axes.set(yscale="log", ylabel="ratio / bar")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    drawn.autofmt_xdate()
    return drawn


def _section(runs: Sequence[Run], missing: Sequence[str]) -> Iterator[str]:
    if runs:
        head = ("case", "metric", "ours", "peer", "against", "ratio", "bar", "holds", "run")
        yield from markdown.table(head, (_row(run, case) for run in runs for case in run.cases))
        yield ""
        for run in runs:
            yield f"- `{run.file}`: {_told(run)}"
    if missing:
        yield from ("",) if runs else ()
        yield f"Not in this history yet: {', '.join(f'`{file}`' for file in missing)}."


def _row(run: Run, case: Mapping[str, Any]) -> tuple[str, ...]:
    ratio = "∞" if case["ratio"] is None else ratio_text(case["ratio"])
    bar = "" if case["bar"] is None else ratio_text(case["bar"])
    holds = "" if case["bar"] is None else "yes" if case["holds"] else "**missed**"
    marks = ", ".join([run.day, *(["quick"] if run.quick else []), *(["busy"] if run.busy else [])])
    sizes = (_number(case["ours"]), _number(case["peer"]), case["peer_name"])
    return (case["case"], case["metric"], *sizes, ratio, bar, holds, marks)


def _told(run: Run) -> str:
    others = "other work is not known" if run.elsewhere is None else f"{run.elsewhere:.2g} cores busy with other work"
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    kind = "quick" if run.quick else "in full"
    return f"{run.day}, {kind}, {run.seconds:,.0f} s, {run.threads} threads of {run.cpu}, {others}; {versions}."


def _summary(system: str, latest: Sequence[Run], known: Mapping[str, str]) -> tuple[str, ...]:
    runs = [run for run in latest if run.system == system]
    bars = [case["holds"] for run in runs for case in run.cases if case["bar"] is not None]
    full = sum(not run.quick for run in runs)
    busy = [run.elsewhere for run in runs if run.elsewhere is not None]
    name = NAMES.get(system, system)
    return (
        f"[{name}](#{name.lower().replace(' ', '-')})",
        f"{sum(bars)} of {len(bars)}" if bars else "",
        str(full),
        str(len(runs) - full),
        str(len(_missing(system, latest, known))),
        max((run.day for run in runs), default=""),
        f"up to {max(busy):.2g} cores" if busy and max(busy) >= BUSY else "no" if busy else "",
    )


def _missing(system: str, latest: Sequence[Run], known: Mapping[str, str]) -> list[str]:
    there = {run.file for run in latest}
    return [file for file, owner in known.items() if owner == system and file not in there]


def _systems(known: Mapping[str, str]) -> list[str]:
    order = [name for name in NAMES if name in known.values()]
    return order + sorted(set(known.values()) - set(order))


def _with_bars(latest: Sequence[Run]) -> list[tuple[Run, Mapping[str, Any]]]:
    return [(run, case) for run in latest for case in run.cases if case["bar"]]


def _lines(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, float]]]]:
    """System and (day, ratio over bar) of the cases that were run in full on more than one day of one machine."""
    points: dict[tuple, dict[str, float]] = {}
    for run in sorted(runs, key=lambda run: run.date):
        for case in run.cases:
            if case["bar"] and not run.quick:
                key = (run.system, run.file, case["case"], case["metric"], case["peer_name"], run.cpu, run.threads)
                points.setdefault(key, {})[run.day] = _over_bar(case)
    return [(key[0], sorted(days.items())) for key, days in points.items() if len(days) > 1]


def _over_bar(case: Mapping[str, Any]) -> float:
    """Ratio over bar, inside what a picture shows."""
    ratio = math.inf if case["ratio"] is None else case["ratio"]
    return min(_MOST, max(_LEAST, ratio / case["bar"]))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.4g}"


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__.partition("\n")[0])
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page and the history")
    options = parser.parse_args(args)
    write(options.docs)


if __name__ == "__main__":
    main()
