"""The tour: every system's recipe at laptop scale, one after the other, told in one page.

`jaxlab tour` (= `make demo`) runs the recipes of `RECIPES` in order and writes `report.html` (one file, pictures
inside) and `report.json`. A recipe that fails does not lose the others; a section that is done is not run again until
its config or the library's code changes.
"""

import dataclasses
import datetime
import functools
import gc
import hashlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxlab import core, doctor, recipes

RECIPES: dict[str, str] = {
    "answer": "jaxlab.foundation.answer:configs/foundation/answer.yaml",
    "language_model": "jaxlab.foundation.recipe:configs/foundation/laptop.yaml",
    "grouped_matmul": "jaxlab.foundation.kernel:configs/foundation/kernel.yaml",
    "plan": "jaxlab.foundation.layouts:configs/foundation/plan_8b.yaml",
    "xmoe": "jaxlab.xmoe.recipe:configs/xmoe/laptop.yaml",
    "puzzlemoe": "jaxlab.puzzlemoe.recipe:configs/puzzlemoe/laptop.yaml",
    "superoffload": "jaxlab.superoffload.recipe:configs/superoffload/laptop.yaml",
    "megafold": "jaxlab.megafold.recipe:configs/megafold/laptop.yaml",
    "sfpo": "jaxlab.sfpo.recipe:configs/sfpo/laptop.yaml",
    "eaglet": "jaxlab.eaglet.recipe:configs/eaglet/laptop.yaml",
    "vlm_scaling": "jaxlab.vlm_scaling.recipe:configs/vlm_scaling/laptop.yaml",
    "voltanallm": "jaxlab.voltanallm.recipe:configs/voltanallm/laptop.yaml",
    "instantedit": "jaxlab.instantedit.recipe:configs/instantedit/laptop.yaml",
    "flexgaussian": "jaxlab.flexgaussian.recipe:configs/flexgaussian/laptop.yaml",
    "pipeline": "jaxlab.pipeline.recipe:configs/pipeline/laptop.yaml",
}
"""Section name -> `module:config`; the module has `run(config) -> Report`. Order is the order of the page."""

_FORMAT = "jaxlab.tour/1"


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of the tour, as it went.

    Attributes:
      name: its name in `RECIPES`.
      state: "done", "reused" (an earlier run of the same config and code) or "failed".
      seconds: how long it took when it ran.
      folder: where its report lies.
      error: what went wrong, in one line; empty if nothing did.
    """

    name: str
    state: str
    seconds: float
    folder: Path
    error: str = ""


def choose(only: Sequence[str] = ()) -> tuple[str, ...]:
    """The sections to run: those named, in the tour's order; all if none is.

    Raises:
      ValueError: an unknown name; the known ones are listed.
    """
    unknown = [name for name in only if name not in RECIPES]
    if unknown:
        raise ValueError(f"unknown section {unknown[0]!r}; known: {', '.join(RECIPES)}")
    return tuple(name for name in RECIPES if not only or name in only)


def run(folder: str | os.PathLike, sections: Sequence[str] = (), *, fresh: bool = False) -> bool:
    """Runs sections of the tour and writes `report.html` and `report.json` into `folder`.

    The page is written again after every section, so a tour that is stopped leaves what it had. Sections that were not
    asked for appear in the page if an earlier run of the same config and code left them.

    Args:
      folder: gets the page, and a folder for each section.
      sections: names in `RECIPES`; default all.
      fresh: run again what an earlier tour left.

    Returns:
      Whether every section that was asked for succeeded.
    """
    folder = Path(folder)
    wanted = choose(sections)
    finished: dict[str, Section] = {}
    for name in RECIPES:
        earlier = None if fresh and name in wanted else _earlier(folder / name, name)
        if earlier:
            finished[name] = earlier
    started = time.monotonic()
    for number, name in enumerate(wanted, 1):
        _say(f"[{number}/{len(wanted)}] {name} ...")
        if name not in finished:
            finished[name] = _run_section(name, folder / name)
        section = finished[name]
        _say(f"[{number}/{len(wanted)}] {name}: {section.error or section.state} ({section.seconds:.1f} s)")
        _write(folder, [finished[each] for each in RECIPES if each in finished])
    failed = [name for name in wanted if finished[name].state == "failed"]
    _say(f"tour: {len(wanted) - len(failed)} of {len(wanted)} sections in {time.monotonic() - started:.0f} s")
    _say(f"report: {folder / 'report.html'}")
    return not failed


def _run_section(name: str, folder: Path) -> Section:
    """Runs one recipe; whatever goes wrong in it is this section's own."""
    started = time.perf_counter()
    try:
        function, config = _load(name)
        function(config).save(folder)
    except Exception as error:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc())
        (folder / "section.json").unlink(missing_ok=True)
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Section(name, "failed", time.perf_counter() - started, folder, text)
    finally:
        gc.collect()  # a model of one section is not held through the next
    seconds = time.perf_counter() - started
    (folder / "error.txt").unlink(missing_ok=True)
    (folder / "section.json").write_text(json.dumps({"key": _key(name), "seconds": seconds}))
    return Section(name, "done", seconds, folder)


def _load(name: str) -> tuple[Callable[[Any], Any], Any]:
    module, _, config = RECIPES[name].partition(":")
    function = importlib.import_module(module).run
    return function, recipes.load(function, config)


def _earlier(folder: Path, name: str) -> Section | None:
    """What an earlier tour left of a section, if it still stands."""
    try:
        content = json.loads((folder / "section.json").read_text())
        if content["key"] != _key(name) or not (folder / "report.json").is_file():
            return None
        return Section(name, "reused", content["seconds"], folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(name: str) -> str:
    """What decides a section's outcome: its config file, the library's code, JAX's version."""
    from jaxlab.core import find_config

    module, _, config = RECIPES[name].partition(":")
    parts = [module.encode(), find_config(config).read_bytes(), _code(), _versions().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


@functools.cache
def _code() -> bytes:
    """A hash of our own source files."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for root in (package, package.parent / "pallas_kernels"):
        for file in sorted(root.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.digest()


@functools.cache
def _versions() -> str:
    return json.dumps(doctor.versions())


def _write(folder: Path, sections: Sequence[Section]) -> None:
    from jaxlab import _tour_page
    from jaxlab.core import Report

    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": doctor.machine(),
        "versions": {name: version for name, version in doctor.versions().items() if version},
    }
    told, parts = [], []
    for section in sections:
        entry: dict[str, Any] = {"name": section.name, "state": section.state, "seconds": round(section.seconds, 2)}
        report = None
        if section.state == "failed":
            entry["error"] = section.error
        else:
            report = Report.load(section.folder)
            entry["report"] = json.loads((section.folder / "report.json").read_text())
        told.append(entry)
        parts.append((section.name, section.state, section.seconds, section.error, report))
    content = {"format": _FORMAT, **facts, "sections": told}
    core.replace_file(folder / "report.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    core.replace_file(folder / "report.html", _tour_page.render(parts, facts))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
