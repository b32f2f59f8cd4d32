"""The emoji task: edits whose true outcome was never trained on, by every method on one small network trained here.

The network is the one that comes with the package; `instantedit_teacher.py` has the one it was distilled from.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence import FOLDER, Item

WORK = Path("out/evidence/instantedit")
PAIRS, SEEDS = 240, (0, 1, 2)
SHOWN = 10
TITLE = (
    f"Edits of {PAIRS} held-out emoji pairs (skin tone, gender, colour) at 32x32, by one small network trained here: "
    "distance to the true target and, where that equals the source, to the source; 95 % bootstrap intervals over "
    f"pairs; methods that draw noise with {len(SEEDS)} seeds (measured)"
)
WORTH = "What each part is worth: paired differences with 95 % bootstrap intervals (measured)"
COLUMNS = (
    "InstantEdit",
    "w_dpg 1",
    "without ILI",
    "without mask",
    "virtual_inversion cfg 1.1",
    "flow_edit cfg 1.1",
    "flow_edit cfg 4.1",
    "plain_inversion cfg 4.1",
)


def items() -> Iterator[Item]:
    """A row a method, the differences that the paper's parts make, and each stage of the training."""
    from jaxlab.instantedit.small_editor import PACKAGED, STAGES

    weights = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(PACKAGED.rglob("*.safetensors"))))
    settings = {"pairs": PAIRS, "weights": weights.hexdigest()[:12]}
    for name in _names():
        yield Item(
            name=name,
            table=TITLE,
            settings=settings,
            run=lambda name=name: row(name, _samples(name), editors()[name]),
            seeds=SEEDS,
        )
    for better, worse in (
        ("InstantEdit", "without ILI"),
        ("InstantEdit", "without DPG"),
        ("InstantEdit", "without mask"),
        ("InstantEdit", "without ControlNet"),
        ("InstantEdit", "copy"),
    ):
        yield Item(
            name=f"{better} - {worse}",
            table=WORTH,
            settings=settings,
            run=lambda a=better, b=worse: difference(a, editors()[a], b, editors()[b]),
            seeds=SEEDS,
        )
    log = json.loads((PACKAGED / "training.json").read_text())
    for stage in STAGES:
        yield Item(
            name=f"training, {stage}",
            table="Training of the small editor that comes with the package, by its log: mean losses (measured)",
            settings=log["config"],
            run=functools.partial(_training, stage, log[stage]),
            seeds=(0,),
        )


def pages() -> None:
    """Draws all methods by what they change and what they should not, and the first pairs as some of them edit them."""
    from jaxlab.instantedit import study
    from jaxlab.instantedit.grid import picture_grid

    rows = [item["row"] for item in json.loads((FOLDER / "instantedit.json").read_text())["items"].values()]
    _scatter([row for row in rows if "method" in row]).savefig(
        FOLDER / "instantedit_methods.png", dpi=110, bbox_inches="tight"
    )
    chosen = [case for family in ("tone", "gender", "colour") for case in cases() if case.kind == family]
    chosen = chosen[:: max(1, len(chosen) // SHOWN)][:SHOWN]
    network, tokenizer = _pipeline().network, _pipeline().tokenizer
    made = study.editors(
        network, tokenizer, chosen, chosen={name: study.methods(network.schedule)[name] for name in COLUMNS}
    )
    drawn = picture_grid(chosen, {name: [made[name](case, 0) for case in chosen] for name in COLUMNS})
    drawn.savefig(FOLDER / "instantedit_emoji.png", dpi=110, bbox_inches="tight")


_OFFSETS = {
    "w_dpg 1": (-30, -9),
    "w_dpg 2": (4, -12),
    "direct_inversion cfg 1.1": (-6, 6),
    "rf_solver cfg 1.1": (-40, -9),
    "InstantEdit": (-14, 7),
    "without ILI": (-14, 7),
    "without ControlNet": (6, 2),
    "plain_inversion cfg 4.1": (4, 8),
    "fire_flow cfg 4.1": (6, 0),
    "sdedit cfg 4.1": (5, -6),
    "renoise cfg 4.1": (-34, 5),
    "direct_inversion cfg 4.1": (-72, -8),
    "ddim_inversion cfg 4.1": (-66, 4),
    "virtual_inversion cfg 4.1": (-40, 6),
}
"""Of labels, in points, where points lie close to each other."""


def _scatter(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Distance to the true target by that of what should stay; ordinary guidance of 1.1 and 4.1 apart."""
    from jaxlab.core.figures import BLUE, GREY, ORANGE, RED, figure

    drawn, axes = figure(9.0, 5.0)
    for row in rows:
        name = row["method"]
        weak, strong = name.endswith("cfg 1.1"), name.endswith("cfg 4.1")
        colour = BLUE if weak else ORANGE if strong else GREY if name == "copy" else RED
        place = [float(row[column].split()[0]) for column in ("LPIPS of background x1e3", "LPIPS to target x1e3")]
        axes.plot(*place, "o", color=colour, markersize=5)
        label = name.replace(" cfg 1.1", "").replace(" cfg 4.1", "").replace("_", " ")
        offset = _OFFSETS.get(name, (4, 3))
        axes.annotate(label, place, offset, textcoords="offset points", fontsize=7, color=colour)
    for colour, label in ((RED, "InstantEdit"), (BLUE, "others, guidance 1.1"), (ORANGE, "others, guidance 4.1")):
        axes.plot([], [], "o", color=colour, label=label)
    axes.set_xlabel("LPIPS x 1000 to the source, where nothing is to change (left is better)")
    axes.set_ylabel("LPIPS x 1000 to the true target (low is better)")
    axes.legend(frameon=False, fontsize=9)
    return drawn


@functools.cache
def cases() -> Any:
    from jaxlab.instantedit import emoji
    from jaxlab.instantedit.study import emoji_cases

    return emoji_cases(emoji.load(), PAIRS)


@functools.cache
def _pipeline() -> Any:
    from jaxlab.instantedit.small_editor import load_editor

    return load_editor()


@functools.cache
def editors() -> Any:
    """Every method as an editor."""
    from jaxlab.instantedit import study

    return study.editors(_pipeline().network, _pipeline().tokenizer, cases())


def _names() -> tuple[str, ...]:
    from jaxlab.instantedit import study
    from jaxlab.instantedit.scheduler import PeRFlowSchedule

    return ("copy", *study.methods(PeRFlowSchedule()))


def evaluated(editors: Mapping[str, Any]) -> Any:
    """The evaluation of some editors, with a seed alone where none of them draws."""
    from jaxlab.instantedit.evaluation import evaluate
    from jaxlab.instantedit.metrics import MetricSet
    from jaxlab.instantedit.study import DRAWING

    seeds = SEEDS if any(name.startswith(DRAWING) for name in editors) else SEEDS[:1]
    return evaluate(cases(), dict(editors), metrics=MetricSet(), seeds=seeds, results=WORK / "edits.jsonl")


def row(name: str, samples: int, editor: Any) -> dict[str, Any]:
    """A method's distances to target and source."""
    found = evaluated({name: editor})
    told: dict[str, Any] = {"method": name, "network samples": samples}
    for column, metric in _MEASURES.items():
        mean = found.mean(name, metric)
        told[column] = None if mean is None or mean.interval is None else _interval(mean.interval, metric)
    return told


def difference(name: str, editor: Any, other: str, others: Any) -> dict[str, Any]:
    """Paired differences of two methods' distances."""
    found = evaluated({name: editor, other: others})
    told: dict[str, Any] = {"difference": f"{name} - {other}"}
    for column, metric in _MEASURES.items():
        try:
            told[column] = _interval(found.difference(name, other, metric), metric)
        except ValueError:  # a copy's distance to its source is infinite
            told[column] = None
    return told


_MEASURES = {
    "PSNR to target": "psnr_to_target",
    "SSIM to target x1e2": "ssim_to_target",
    "LPIPS to target x1e3": "lpips_to_target",
    "PSNR to source": "psnr",
    "LPIPS to source x1e3": "lpips",
    "PSNR of background": "psnr_background",
    "LPIPS of background x1e3": "lpips_background",
}


def _interval(interval: Any, metric: str) -> str:
    from jaxlab.instantedit.metrics import kind_of

    scale = kind_of(metric).scale
    mean, low, high = (scale * value for value in (interval.mean, interval.low, interval.high))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _samples(name: str) -> int:
    from jaxlab.instantedit import study
    from jaxlab.instantedit.scheduler import PeRFlowSchedule

    if name == "copy":
        return 0
    return study.method_samples(PeRFlowSchedule(), name)


def _training(stage: str, log: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """A stage's steps and losses; every entry of its log is the mean of 50 steps."""
    import jax

    params = _pipeline().network.params["controlnet" if stage == "controlnet" else "unet"]
    return {
        "stage": stage,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "steps": log[-1]["step"],
        "loss, first 50": log[0]["loss"],
        "loss, last 200": sum(entry["loss"] for entry in log[-4:]) / 4,
    }
