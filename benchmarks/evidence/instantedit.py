"""The emoji task: edits whose true outcome was never trained on, by every method on one small network trained here.

The network is the one that comes with the package. Its teacher does not; it is trained in `out/evidence/instantedit`.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.evidence import FOLDER, Item

WORK = Path("out/evidence/instantedit")
PAIRS, SEEDS = 240, (0, 1, 2)
TEACHER_STEPS = (4, 16)
SHOWN = 10
COLUMNS = ("copy", "InstantEdit", "without ILI", "without DPG", "plain_inversion cfg 4.1", "flow_edit cfg 4.1")


def items() -> Iterator[Item]:
    """A row a method, the differences that the paper's parts make, and each stage of the training."""
    from jaxlab import core
    from jaxlab.instantedit.small_editor import PACKAGED, STAGES, SmallEditorConfig

    weights = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(PACKAGED.rglob("*.safetensors"))))
    settings = {"pairs": PAIRS, "weights": weights.hexdigest()[:12]}
    for name in _names():
        yield Item(
            name=name,
            table=f"Edits of {PAIRS} held-out emoji pairs (skin tone, gender, colour) at 32x32, by one small network "
            "trained here: distance to the true target and, where that equals the source, to the source; 95 % "
            "bootstrap intervals over pairs (measured)",
            settings=settings,
            run=functools.partial(_method, name),
            seeds=SEEDS,
        )
    for better, worse in (
        ("InstantEdit", "without ILI"),
        ("InstantEdit", "without DPG"),
        ("InstantEdit", "without mask"),
        ("InstantEdit", "without ControlNet"),
        ("InstantEdit", "copy"),
        *(("InstantEdit", f"teacher, {steps} steps") for steps in TEACHER_STEPS),
    ):
        yield Item(
            name=f"{better} - {worse}",
            table="What each part is worth: paired differences with 95 % bootstrap intervals (measured)",
            settings=settings,
            run=functools.partial(_difference, better, worse),
            seeds=SEEDS,
        )
    for stage in STAGES:
        yield Item(
            name=f"training, {stage}",
            table="Training of the small editor on one core (measured)",
            settings=core.to_dict(SmallEditorConfig()),
            run=functools.partial(_training, stage),
            seeds=(0,),
        )


def pages() -> None:
    """Draws the first pairs of each family as edited by some of the methods."""
    from jaxlab.instantedit.grid import picture_grid

    cases = [case for family in ("tone", "gender", "colour") for case in _cases() if case.kind == family]
    cases = cases[:: max(1, len(cases) // SHOWN)][:SHOWN]
    drawn = picture_grid(cases, {name: [_editors()[name](case, 0) for case in cases] for name in COLUMNS[1:]})
    drawn.savefig(FOLDER / "instantedit_emoji.png", dpi=110, bbox_inches="tight")


@functools.cache
def _cases() -> Any:
    from jaxlab.instantedit import emoji
    from jaxlab.instantedit.study import emoji_cases

    return emoji_cases(emoji.load(), PAIRS)


@functools.cache
def _trained() -> Any:
    from jaxlab.instantedit.small_editor import SmallEditor, SmallEditorConfig

    return SmallEditor(SmallEditorConfig(), WORK)


@functools.cache
def _editors() -> Any:
    """Every method as an editor; the teacher is trained when it is asked for."""
    from jaxlab.instantedit import study
    from jaxlab.instantedit.small_editor import load_editor

    pipeline = load_editor()
    made = study.editors(pipeline.network, pipeline.tokenizer, _cases())
    for steps in TEACHER_STEPS:
        made[f"teacher, {steps} steps"] = _teacher(steps)
    return made


def _teacher(steps: int) -> Any:
    """InstantEdit with the teacher and so many steps."""
    from jaxlab.instantedit import study

    @functools.cache
    def editor() -> Any:
        setting = dataclasses.replace(study.BASE, num_steps=steps)
        trained = _trained()
        return study.Batched(
            trained.teacher_network(steps), trained.tokenizer, _cases(), study.instant_edit(setting), draws=False
        )

    return lambda case, seed: editor()(case, seed)


def _names() -> tuple[str, ...]:
    from jaxlab.instantedit import study
    from jaxlab.instantedit.scheduler import PeRFlowSchedule

    return ("copy", *study.methods(PeRFlowSchedule()), *(f"teacher, {steps} steps" for steps in TEACHER_STEPS))


def _evaluated(*names: str) -> Any:
    from jaxlab.instantedit.evaluation import evaluate
    from jaxlab.instantedit.metrics import MetricSet

    chosen = {name.replace(",", ""): _editors()[name] for name in names}
    return evaluate(_cases(), chosen, metrics=MetricSet(), seeds=SEEDS, results=WORK / "edits.jsonl")


def _method(name: str) -> dict[str, Any]:
    found = _evaluated(name)
    row: dict[str, Any] = {"method": name, "network samples": _samples(name)}
    for column, metric in _MEASURES.items():
        mean = found.mean(name.replace(",", ""), metric)
        row[column] = None if mean is None else _interval(mean.interval, metric)
    return row


_MEASURES = {
    "PSNR to target": "psnr_to_target",
    "SSIM to target x1e2": "ssim_to_target",
    "LPIPS to target x1e3": "lpips_to_target",
    "PSNR to source": "psnr",
    "PSNR of background": "psnr_background",
    "LPIPS of background x1e3": "lpips_background",
}


def _difference(name: str, other: str) -> dict[str, Any]:
    a, b = name.replace(",", ""), other.replace(",", "")
    found = _evaluated(name, other)
    row: dict[str, Any] = {"difference": f"{name} - {other}"}
    for column, metric in _MEASURES.items():
        try:
            row[column] = _interval(found.difference(a, b, metric), metric)
        except ValueError:  # a copy's distance to its source is infinite
            row[column] = None
    return row


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
    if name.startswith("teacher"):
        return study.samples(dataclasses.replace(study.BASE, num_steps=int(name.split()[1])))
    return study.method_samples(PeRFlowSchedule(), name)


def _training(stage: str) -> dict[str, Any]:
    import jax
    import numpy as np

    params = _trained().stage(stage)
    history = _trained().history(stage)
    losses = [row["loss"] for row in history]
    seconds = np.diff([row["time"] for row in history])
    part = "controlnet" if stage == "controlnet" else "unet"
    return {
        "stage": stage,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params[part])),
        "steps": len(history),
        "loss, first 50": float(np.mean(losses[:50])),
        "loss, last 200": float(np.mean(losses[-200:])),
        "seconds a step, median": float(np.median(seconds)),
    }
