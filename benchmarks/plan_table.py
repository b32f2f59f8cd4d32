"""`python -m benchmarks.plan_table [FILE]` writes docs/evidence/plans_overview.md: every paper-scale plan in one place.

What was compiled, whether it fits, and where its bytes go; read from the evidence (`docs/evidence/*_plans.json`, and
`foundation.json` and `xmoe.json`). `python -m benchmarks.evidence` writes it, too.
"""

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import NAMES, markdown

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "evidence"
FILE = FOLDER / "plans_overview.md"
GIB = 2**30 / 1e9
_WORTH_TELLING = 0.05  # of the total


@dataclasses.dataclass(frozen=True)
class Planned:
    """One compiled configuration.

    Attributes:
      what: model, method, sizes.
      gpu: for which it was compiled; several where one program was held against several memories.
      devices: how many of them.
      total: GB on one device.
      fits: whether that fits, for each of `gpu`.
      where: name -> GB, of what is known to make up the total.
      beside: what else is worth a word.
    """

    what: str
    gpu: tuple[str, ...]
    devices: int
    total: float
    fits: tuple[bool, ...]
    where: Mapping[str, float] = dataclasses.field(default_factory=dict)
    beside: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a system's plans are.

    Attributes:
      system: whose.
      model: what its plans are of.
      command: compiles one configuration anew.
      read: a row of the evidence -> what was planned; None where the row is about something else.
      file: stem in the evidence; None where no table was kept.
    """

    system: str
    model: str
    command: str
    read: Callable[[Mapping[str, Any]], Iterator[Planned]] = lambda row: iter(())
    file: str | None = None


def _foundation(row: Mapping[str, Any]) -> Iterator[Planned]:
    topology, gpu = row["machine"].split()
    changes = f", {row['changes']}" if row["changes"] else ""
    yield _of_gib(row, f"8 B parameters, AdamW, {row['layout']}{changes}", gpu, _product(topology))


def _xmoe(row: Mapping[str, Any]) -> Iterator[Planned]:
    memories = ("64 GB", "80 GB")
    if "recomputed" in row:
        what = f"Super, 545 B; {row['system']}; recomputed: {row['recomputed']}; TP {row['TP']}, EP {row['EP']}"
        fits = tuple(row[f"fits {memory}"] for memory in memories)
        yield dataclasses.replace(_of_gib(row, what, "", 1024), gpu=memories, fits=fits)
    elif row.get("size", "super") != "super" and "total" in row:  # Super's are those above
        what = f"{row['size'].capitalize()}; {row['system']}; TP {row['TP']}, EP {row['EP']}"
        yield Planned(what, memories[:1], row["GPUs"], GIB * row["total"], (row["fits 64 GB"],))


def _puzzlemoe(row: Mapping[str, Any]) -> Iterator[Planned]:
    parts = {"experts": row["of them experts"], "other weights": row["parameters"] - row["of them experts"]}
    where = {name: GIB * size for name, size in {**parts, **_parts(row, "cache", "temporaries")}.items()}
    what = f"{row['model']}, {row['experts']}, {row['phase']}"
    yield Planned(what, (row["GPU"].partition(",")[0],), 1, GIB * row["total"], (row["fits one"],), where)


def _superoffload(row: Mapping[str, Any]) -> Iterator[Planned]:
    if "fits" not in row:
        return
    many = "tokens, K" in row
    what = f"13B, {row['tokens, K']:,}K tokens, {row['method']}" if many else f"{row['model']}, {row['method']}"
    beside = f"beside {row['host']:,.4g} GB on each host" if row["host"] else "nothing on the host"
    yield Planned(what, ("gh200",), 8 if many else 1, row["device"], (row["fits"],), beside=beside)


def _megafold(row: Mapping[str, Any]) -> Iterator[Planned]:
    if "longest crop" in row:
        devices, gpu = row["GPUs"].split()
        what = f"crop {row['longest crop']:,}, the longest that fits, fused: {row['fused']}"
        yield Planned(what, (gpu,), int(devices), GIB * row["total"], (row["total"] <= row["room"],))
        return
    rest = {"temporaries": row["temporaries"], "weights, their average, moments": row["total"] - row["temporaries"]}
    gpus = ("h100", "h200")
    fits = tuple(row[f"fits {gpu}"] for gpu in gpus)
    where = {name: GIB * size for name, size in rest.items()}
    yield Planned(f"crop {row['crop']}, fused: {row['fused']}", gpus, 1, GIB * row["total"], fits, where)


def _sfpo(row: Mapping[str, Any]) -> Iterator[Planned]:
    state = _parts(row, "policy", "reference", "optimiser")
    parts = {"rollout": _parts(row, "policy", "cache"), "update": state}
    for phase, where in parts.items():
        rest = {**where, "all else": row[phase] - sum(where.values())}
        yield Planned(f"{row['model']}, {phase}", ("h100",), row["devices"], row[phase], (row[f"{phase} fits"],), rest)


def _vlm_scaling(row: Mapping[str, Any]) -> Iterator[Planned]:
    if "total" not in row:
        return
    what = f"samples of a question: {row['keys and values of the prompt']}"
    if "phase" in row:
        what = f"16 {what}" if row["phase"] == "decode" else "an image and its question read"
        yield Planned(
            what, ("h100",), 1, row["total"], (row["fits"],), _parts(row, "parameters", "cache", "temporaries")
        )
    else:
        what = f"{row['questions']} x {row['samples of each']:,} {what}, the most that fit"
        yield Planned(what, ("h100",), 1, row["total"], (row["total"] <= row["room"],))


def _voltanallm(row: Mapping[str, Any]) -> Iterator[Planned]:
    if "fits" in row:
        parts = _parts(row, "parameters", "cache", "temporaries")
        what = f"{row['phase']}, 128 requests"
        yield Planned(what, (row["GPU"],), row["devices"], row["total"], (row["fits"],), parts)
    else:
        what = f"{row['phase']}, {row['requests']} requests, the most that fit"
        pages = {"pages": row["pages, GB"], "weights and temporaries": row["total, GB"] - row["pages, GB"]}
        fits = (row["total, GB"] <= row["room, GB"],)
        yield Planned(what, (row["GPU"],), row["devices"], row["total, GB"], fits, pages)


def _instantedit(row: Mapping[str, Any]) -> Iterator[Planned]:
    if "fits" not in row:
        return
    shape = row.get("data x view", "1")
    what = f"{row['phase']}, one image" if "phase" in row else f"edit, data x view {shape}"
    parts = _parts(row, "parameters", "temporaries")
    yield Planned(what, (row["GPU"],), _product(shape), row["total"], (row["fits"],), parts)


def _flexgaussian(row: Mapping[str, Any]) -> Iterator[Planned]:
    parts = {"scene": row["parameters"], **_parts(row, "outputs", "temporaries")}
    yield Planned(row["program"], (row["GPU"],), row["devices"], row["total"], (row["fits"],), parts)


_PLAN = "jaxlab plan configs/"
SOURCES = (
    Source(
        "foundation",
        "Training steps of Llama 3.1 8B's shape",
        f"{_PLAN}foundation/plan_8b.yaml --gpu h100 --topology 1x8x8",
        _foundation,
        "foundation",
    ),
    Source(
        "xmoe",
        "Training steps of the paper's models, compiled for H100s, held against 64 GB (the paper's MI250X) and 80",
        f"{_PLAN}xmoe/super.yaml --gpu mi250x --topology 1x128x8",
        _xmoe,
        "xmoe",
    ),
    Source(
        "puzzlemoe",
        "Prefill and decode steps of whole models, one row of 1536 positions",
        f"{_PLAN}puzzlemoe/paper.yaml --gpu h100",
        _puzzlemoe,
        "puzzlemoe_plans",
    ),
    Source(
        "superoffload",
        "Training steps of the paper's models on GH200s; the optimiser's state on the host is counted, not compiled",
        f"{_PLAN}superoffload/paper.yaml --gpu gh200",
        _superoffload,
        "superoffload_plans",
    ),
    Source(
        "megafold",
        "Training steps of AlphaFold3, one structure",
        f"{_PLAN}megafold/paper.yaml --gpu h200",
        _megafold,
        "megafold_plans",
    ),
    Source(
        "sfpo",
        "Rollouts and updates of Qwen2.5-Math",
        f"{_PLAN}sfpo/paper.yaml --gpu h100 --topology 1x1x8",
        _sfpo,
        "sfpo_plans",
    ),
    Source("eaglet", "Updates of an 8 B planner", f"{_PLAN}eaglet/paper.yaml --gpu h100 --topology 1x1x8"),
    Source(
        "vlm-scaling",
        "Qwen2.5-VL-7B: samples of a question with an image",
        f"{_PLAN}vlm_scaling/paper.yaml --gpu h100",
        _vlm_scaling,
        "vlm_scaling_plans",
    ),
    Source(
        "voltanallm",
        "Steps of the engine for Llama 3.1 8B, requests of 2048 tokens",
        f"{_PLAN}voltanallm/paper.yaml --gpu h100",
        _voltanallm,
        "voltanallm_plans",
    ),
    Source(
        "instantedit",
        "Stable Diffusion 1.5 with a ControlNet, 512 x 512",
        f"{_PLAN}instantedit/paper.yaml --gpu h100",
        _instantedit,
        "instantedit_plans",
    ),
    Source(
        "flexgaussian",
        "Images of 6.1 million Gaussians, 1920 x 1080, and their scores",
        f"{_PLAN}flexgaussian/paper.yaml --gpu h100",
        _flexgaussian,
        "flexgaussian_plans",
    ),
)
"""Every system, in the pages' order."""


def planned(source: Source, folder: Path = FOLDER) -> list[Planned]:
    """What a system planned; nothing where no table was kept, or none was made yet."""
    path = folder / f"{source.file}.json"
    if source.file is None or not path.exists():
        return []
    items = json.loads(path.read_text())["items"].values()
    return [each for item in items for each in source.read(item["row"])]


def lines(folder: Path = FOLDER) -> Iterator[str]:
    """The page, line by line: a table of systems, then one a system."""
    found = {source: planned(source, folder) for source in SOURCES}
    head = ("system", "what", "configurations", "of them fit", "one of them again")
    yield from markdown.table(head, (_summary(source, rows) for source, rows in found.items()))
    for source, rows in found.items():
        if rows:
            yield from ("", f"### {NAMES[source.system]}: what fits", "")
            yield f"{source.model} (`python -m benchmarks.evidence {source.file}`)."
            yield ""
            head = ("configuration", "GPU", "devices", "GB a device", "fits", "where the bytes go")
            yield from markdown.table(head, map(_cells, rows))


def write(file: Path = FILE) -> None:
    """Writes the page."""
    from jaxlab import core

    core.replace_file(file, "\n".join(lines()) + "\n")


def _summary(source: Source, rows: Sequence[Planned]) -> tuple[str, ...]:
    count = str(len(rows)) if rows else "no table kept" if source.file is None else "not made yet"
    # At least one of the memories that a configuration was held against.
    fitting = str(sum(any(row.fits) for row in rows)) if rows else ""
    return (NAMES[source.system], source.model, count, fitting, f"`{source.command}`")


def _cells(row: Planned) -> tuple[str, ...]:
    gpu = ", ".join(name if " " in name else name.upper().replace("_40", " 40 GB") for name in row.gpu)
    fits = ", ".join("yes" if fit else "**no**" for fit in row.fits)
    return (row.what, gpu, f"{row.devices:,}", f"{row.total:,.3g}", fits, _phrase(row))


def _phrase(row: Planned) -> str:
    shares = sorted(((size / row.total, name) for name, size in row.where.items()), reverse=True)
    told = [f"{name} {share:.0%}" for share, name in shares if share >= _WORTH_TELLING]
    return ", ".join([*told, *([row.beside] if row.beside else [])])


def _of_gib(row: Mapping[str, Any], what: str, gpu: str, devices: int) -> Planned:
    where = {name: GIB * size for name, size in _parts(row, "parameters", "optimizer", "temporaries").items()}
    return Planned(what, (gpu,), devices, GIB * row["total"], (row.get("fits", False),), where)


def _parts(row: Mapping[str, Any], *names: str) -> dict[str, float]:
    return {name: row[name] for name in names}


def _product(shape: str) -> int:
    return math.prod(int(size) for size in re.findall(r"\d+", shape))


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_table", description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=FILE)
    options = parser.parse_args(args)
    write(options.file)
    print(f"{options.file.name}: {sum(len(planned(source)) for source in SOURCES)} configurations")


if __name__ == "__main__":
    main()
