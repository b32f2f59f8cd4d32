"""`python -m benchmarks [SYSTEM ...] [--quick]`: every ratio beside its bar.

Prints a table and appends one JSON object a case to `benchmarks/results.jsonl`. A bar that is missed stays in the
table, marked; `--strict` also makes it the exit code. A file that fails does not lose the others. What came to its end
enters the history that is committed (`benchmarks.history`), and `docs/benchmarks.md` is written from that.
"""

import argparse
import datetime
import importlib
import math
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import history, page
from jaxlab import _platform, doctor, recipes

HERE = Path(__file__).resolve().parent
PEERS = ("torch", "transformers", "llama-cpp-python")


def modules(wanted: Sequence[str] = ()) -> dict[str, str]:
    """File stem -> system of every file with `cases`; only those whose stem or system is wanted, if any is.

    A file belongs to the system its constant `SYSTEM` names, else to the one it is named after, else to the foundation.

    Raises:
      ValueError: a wanted name is neither; the known ones are listed.
    """
    found = {}
    for file in sorted(HERE.glob("*.py")):
        lines = file.read_text().splitlines()
        if not file.stem.startswith("_") and any(line.startswith("def cases(") for line in lines):
            named = [line.partition("=")[2].strip().strip("\"'") for line in lines if line.startswith("SYSTEM =")]
            found[file.stem] = named[0] if named else file.stem if file.stem in recipes.SYSTEMS else "foundation"
    for name in wanted:
        if name not in found and name not in found.values():
            raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(sorted({*found, *found.values()}))}")
    return {stem: system for stem, system in found.items() if not wanted or stem in wanted or system in wanted}


def record(case: Any, quick: bool, versions: dict[str, str], date: str) -> dict[str, Any]:
    """A case as it is kept; a ratio without bound (nothing against something) is null."""
    return {
        "system": case.system,
        "case": case.case,
        "metric": case.metric,
        "ours": case.ours,
        "peer": case.peer,
        "peer_name": case.peer_name,
        "ratio": case.ratio if math.isfinite(case.ratio) else None,
        "bar": case.bar,
        "holds": case.holds,
        "quick": quick,
        "versions": versions,
        "threads": doctor.threads(),
        "date": date,
    }


def run(wanted: Sequence[str], quick: bool, results: Path, kept: Path) -> tuple[list[Any], list[str]]:
    """Every case of the wanted files, recorded as it comes; and the files that failed. Those that did not are kept."""
    from jaxlab.core import jsonl

    versions = {name: version for name, version in doctor.versions((*doctor.PACKAGES, *PEERS)).items() if version}
    cases, failed = [], []
    for stem, system in modules(wanted).items():
        started, neighbours, rows = time.perf_counter(), history.Neighbours(), []
        try:
            for case in _cases(stem, quick):
                cases.append(case)
                rows.append(record(case, quick, versions, _now()))
                jsonl.append(results, rows[-1])
                print(
                    f"{stem}: {case.case}, {case.metric}: {history.ratio_text(case.ratio)}", file=sys.stderr, flush=True
                )
        except Exception:
            traceback.print_exc()
            failed.append(stem)
        else:
            elsewhere = neighbours.cores()
            ended = history.Run(
                file=stem,
                system=system,
                date=_now(),
                quick=quick,
                seconds=round(time.perf_counter() - started, 1),
                threads=doctor.threads(),
                cpu=str(doctor.machine()["cpu"]),
                elsewhere=None if elsewhere is None else round(elsewhere, 2),
                versions=history.versions(versions),
                cases=[history.case(row) for row in rows],
            )
            history.keep(kept, ended)
        print(f"{stem}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return cases, failed


def table(cases: Sequence[Any]) -> Any:
    """The cases for a terminal."""
    from rich.table import Table

    made = Table(title="Ratio: how many times better ours is", title_justify="left")
    for name in ("system", "case", "metric"):
        made.add_column(name)
    for name in ("ours", "peer", "ratio", "bar"):
        made.add_column(name, justify="right")
    for name in ("against", "holds"):
        made.add_column(name)
    for case in cases:
        holds = "" if case.bar is None else "[green]holds[/]" if case.holds else "[bold red]MISSED[/]"
        bar = "" if case.bar is None else history.ratio_text(case.bar)
        figures = (f"{case.ours:,.4g}", f"{case.peer:,.4g}", history.ratio_text(case.ratio), bar)
        made.add_row(case.system, case.case, case.metric, *figures, case.peer_name, holds)
    return made


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help="systems or files; default all")
    parser.add_argument("--quick", action="store_true", help="each system within a minute")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="file to append to")
    parser.add_argument("--docs", type=Path, default=page.DOCS, help="folder of the page and the history")
    options = parser.parse_args(args)
    _platform.prefer_cpu_without_gpu()
    _platform.quiet_compiler()
    try:
        modules(options.systems)
    except ValueError as error:
        parser.error(str(error))
    from rich.console import Console

    cases, failed = run(options.systems, options.quick, options.results, options.docs / history.FILE)
    page.write(options.docs)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table(cases))
    missed = [case for case in cases if not case.holds]
    with_bar = sum(case.bar is not None for case in cases)
    kept = f"kept in {options.results.name} and {history.FILE.as_posix()}"
    console.print(f"{with_bar - len(missed)} of {with_bar} bars hold; {kept}")
    if failed:
        console.print(f"[red]failed: {', '.join(failed)}[/]")
    return 1 if failed or (options.strict and missed) else 0


def _cases(stem: str, quick: bool) -> Iterator[Any]:
    return importlib.import_module(f"benchmarks.{stem}").cases(quick)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main())
