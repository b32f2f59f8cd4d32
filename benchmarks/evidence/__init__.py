"""Long runs whose outcome the documentation shows: `python -m benchmarks.evidence [SYSTEM ...]`.

`benchmarks/evidence/<system>.py` has `items() -> Iterator[Item]`, and `pages()` if it writes further pages; a file of
another name says whose it is by `SYSTEM = "..."`. An outcome goes to `docs/evidence/<file>.json` as it comes, with
command, seeds, versions and date, so a killed run goes on where it stopped; an item is run again when its settings or
the versions have changed. `docs/evidence/<file>.md` is the same as tables, for the pages to include; plans appear
once more, all together, in `plans_overview.md`.
"""

import dataclasses
import datetime
import hashlib
import importlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import markdown
from jaxlab import core, doctor

HERE = Path(__file__).resolve().parent
_ROOT = HERE.parent.parent
FOLDER = _ROOT / "docs" / "evidence"
_FORMAT = "jaxlab.evidence/1"
_DECIDING = ("jax", "jaxlib", "flax", "optax", "jax-cuda13-plugin", "nvidia-cuda-nvcc")


@dataclasses.dataclass(frozen=True)
class Item:
    """One outcome to establish.

    Attributes:
      name: unique in its system.
      table: title of the table it is a row of.
      settings: JSON that decides the outcome (sizes, seeds, config); a change runs it again.
      run: gives the row, column name -> number, text, boolean or None.
      seeds: those `run` uses.
    """

    name: str
    table: str
    settings: Any
    run: Callable[[], dict[str, Any]]
    seeds: tuple[int, ...] = ()


def files(wanted: Sequence[str] = ()) -> list[str]:
    """Stems of the files with evidence to make; only those whose stem or system is wanted, if any is.

    Raises:
      ValueError: a wanted name is neither; the known ones are listed.
    """
    found = {}
    for file in sorted(HERE.glob("[!_]*.py")):
        named = [line for line in file.read_text().splitlines() if line.startswith("SYSTEM =")]
        found[file.stem] = named[0].partition("=")[2].strip().strip("\"'") if named else file.stem
    for name in wanted:
        if name not in found and name not in found.values():
            raise ValueError(f"unknown system {name!r}; known: {', '.join(sorted({*found, *found.values()}))}")
    return [stem for stem, system in found.items() if not wanted or stem in wanted or system in wanted]


def make(system: str, *, folder: Path = FOLDER, fresh: bool = False, limit: int | None = None) -> dict[str, Any]:
    """Runs what is not yet there, at most `limit` items; returns the content of the system's file.

    Raises:
      ValueError: an item whose settings name the folder of this checkout: its outcome would hold on this machine only.
    """
    path = folder / f"{system}.json"
    kept = {} if fresh or not path.exists() else json.loads(path.read_text())["items"]
    versions = {name: version for name, version in doctor.versions(_DECIDING).items() if version}
    content: dict[str, Any] = {
        "format": _FORMAT,
        "system": system,
        "command": f"python -m benchmarks.evidence {system}",
        "items": {},
    }
    items = list(_items(system))
    new = 0
    for item in items:
        if str(_ROOT) in json.dumps(item.settings):
            raise ValueError(f"settings: expected those of {item.name!r} to name no folder in {_ROOT}")
        key = _key(item, versions)
        if kept.get(item.name, {}).get("key") == key:
            content["items"][item.name] = kept[item.name]
            continue
        if limit is not None and new >= limit:
            continue
        new += 1
        started = time.perf_counter()
        row = item.run()
        content["items"][item.name] = {
            "key": key,
            "table": item.table,
            "row": row,
            "settings": item.settings,
            "seeds": list(item.seeds),
            "versions": versions,
            "machine": doctor.machine(),
            "seconds": round(time.perf_counter() - started, 1),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        print(f"{system}: {item.name} ({content['items'][item.name]['seconds']} s)", flush=True)
        later = {name: value for name, value in kept.items() if name not in content["items"]}
        _write(path, {**content, "items": {**content["items"], **later}})
    _write(path, content)
    return content


def render(content: dict[str, Any]) -> str:
    """The tables of an evidence file, as Markdown."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for item in content["items"].values():
        tables.setdefault(item["table"], []).append(item)
    lines = []
    for title, items in tables.items():
        columns = list(dict.fromkeys(column for item in items for column in item["row"]))
        rows = ([_cell(item["row"].get(column)) for column in columns] for item in items)
        lines += [f"**{title}**", "", *markdown.table(columns, rows)]
        versions = ", ".join(f"{name} {version}" for name, version in items[0]["versions"].items())
        latest = max(item["date"] for item in items)[:10]
        lines += ["", f"Made by `{content['command']}` on {latest} with {versions}.", ""]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    import argparse

    from benchmarks import plan_table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "systems", nargs="*", metavar="SYSTEM", help=f"systems, or files: {', '.join(files())}; default all"
    )
    parser.add_argument("--fresh", action="store_true", help="run again what is there")
    parser.add_argument("--limit", type=int, help="run at most so many new items of each system")
    options = parser.parse_args(args)
    try:
        chosen = files(options.systems)
    except ValueError as error:
        parser.error(str(error))
    for name in chosen:
        make(name, fresh=options.fresh, limit=options.limit)
        module = importlib.import_module(f"benchmarks.evidence.{name}")
        if hasattr(module, "pages") and options.limit is None:
            module.pages()
    plan_table.write()


def _items(system: str) -> Iterator[Item]:
    return importlib.import_module(f"benchmarks.evidence.{system}").items()


def _key(item: Item, versions: dict[str, str]) -> str:
    told = json.dumps([item.name, item.table, item.settings, list(item.seeds), versions], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _write(path: Path, content: dict[str, Any]) -> None:
    core.replace_file(path, json.dumps(content, indent=1) + "\n")
    core.replace_file(path.with_suffix(".md"), render(content))
