"""Small pictures edited by the editor that comes with the package, and held to the true outcomes it never saw."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab import core
from jaxlab.core.plan import Plan, Target
from jaxlab.instantedit.compiled import PlanConfig

__all__ = ["PlanConfig", "StudyConfig", "plan", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What is edited, and by what.

    Attributes:
      editor: a folder that `jaxlab instantedit train` made; None: the editor that comes with the package.
      pairs: of the held-out ones that come with the package, the first so many.
      methods: of `study.methods`, by name.
      examples: how many pairs are drawn.
      further: edits of one picture towards several prompts: its caption, and the prompts.
    """

    editor: Path | None = None
    pairs: int = 32
    methods: tuple[str, ...] = ("InstantEdit", "without ILI", "sdedit cfg 4.1")
    examples: int = 6
    further: int = 3

    def __post_init__(self):
        if min(self.pairs, self.examples, self.further) < 1:
            sizes = (self.pairs, self.examples, self.further)
            raise ValueError(f"pairs, examples, further: expected at least 1, got {sizes}")


def plan(config: PlanConfig, target: Target) -> Plan:
    """Compiles a phase of a 512 x 512 edit for a target, which need not be there; see `jaxlab.instantedit.compiled`."""
    from jaxlab.instantedit.compiled import compile_phase

    return compile_phase(config, target)


def run(config: StudyConfig) -> core.Report:
    """Edits the held-out pairs in several ways, and one picture towards several prompts; needs nothing but a CPU."""
    from jaxlab.instantedit import emoji, study
    from jaxlab.instantedit.evaluation import evaluate
    from jaxlab.instantedit.grid import picture_grid
    from jaxlab.instantedit.metrics import MetricSet
    from jaxlab.instantedit.small_editor import PACKAGED, load_editor

    pipeline = load_editor(config.editor or PACKAGED)
    pairs, sources, targets = emoji.packaged_pairs()
    pictures = dict(zip(pairs, zip(sources, targets)))
    cases = study.cases_of(pairs[: config.pairs], pictures.__getitem__)
    known = study.methods(pipeline.network.schedule)
    chosen = {name: known[_known(name, known)] for name in config.methods}
    editors = study.editors(pipeline.network, pipeline.tokenizer, cases, chosen=chosen)
    metrics = MetricSet()
    found = evaluate(cases, editors, metrics=metrics)
    shown = cases[: config.examples]
    images = {name: [editors[name](case, 0) for case in shown] for name in config.methods}
    first = cases[min(1, len(cases) - 1)]  # one person alone
    inversion, timings, results = _further(pipeline, first, [pair.target for pair in pairs], config.further)
    best: dict[str, Any] = {name: found.mean(name, "psnr_to_target") for name in editors}
    main = config.methods[0]
    return core.Report(
        system="instantedit",
        title=f"{len(cases)} pictures of {first.source_image().shape[0]} pixels edited in {inversion.num_steps} steps",
        metrics={
            "pairs": len(cases),
            "psnr_to_target": best[main].mean,
            "psnr_to_target, source left as it is": best["copy"].mean,
            "network_samples": study.method_samples(pipeline.network.schedule, main),
            **{f"seconds, {stage}": seconds for stage, seconds in timings.items()},
        },
        tables=(
            (
                "Held-out pairs: the edit against the true outcome, and against the source where that is not to change",
                ("method", "samples", "PSNR to target, dB", "low", "high", "SSIM to target", "PSNR of background, dB"),
                [_row(found, name, pipeline.network.schedule) for name in editors],
            ),
        ),
        plots=(
            ("Edits", picture_grid(shown, images)),
            ("One picture, several prompts", _strip(first, results)),
        ),
        notes=(
            "A UNet, a ControlNet and a text encoder of Stable Diffusion's classes at a small width, trained on Noto "
            "Color Emoji; neither the true outcomes nor anything like them were trained on.",
            "A background that is left as it is to the bit counts as infinitely good and is left out of its mean.",
            *(f"{name} is not measured: {why}" for name, why in metrics.unavailable.items() if name == "lpips"),
        ),
    )


def _known(name: str, known: Any) -> str:
    """The name, if there is a method of it.

    Raises:
      ValueError: there is none; the message lists them.
    """
    if name not in known:
        raise ValueError(f"methods: expected names of {', '.join(known)}, got {name!r}")
    return name


def _row(found: Any, name: str, schedule: Any) -> tuple[Any, ...]:
    from jaxlab.instantedit import study

    target, similar = found.mean(name, "psnr_to_target"), found.mean(name, "ssim_to_target")
    kept = found.mean(name, "psnr_background")
    samples = 0 if name == "copy" else study.method_samples(schedule, name)
    span = (None, None) if target.interval is None else (target.interval.low, target.interval.high)
    return (name, samples, target.mean, *span, similar.mean, None if kept is None or np.isinf(kept.mean) else kept.mean)


def _further(pipeline: Any, case: Any, prompts: list[str], count: int) -> tuple[Any, dict[str, float], dict[str, Any]]:
    """One inversion, then edits towards several prompts; seconds of a second run, after compiling."""
    wanted = [case.target_prompt, *dict.fromkeys(p for p in prompts if p != case.target_prompt)][:count]
    for _ in range(2):
        started = time.perf_counter()
        inversion = pipeline.invert(case.source_image())
        inverted = time.perf_counter() - started
        results = {prompt: pipeline.edit(inversion, case.source_prompt, prompt) for prompt in wanted}
    first, *rest = (sum(result.timings.values()) for result in results.values())
    timings = {"inversion": inverted, "first edit": first, **({"further edit": float(np.mean(rest))} if rest else {})}
    return inversion, timings, results


def _strip(case: Any, results: dict[str, Any]) -> Any:
    """The source and what became of it, by prompt."""
    import textwrap

    from matplotlib.figure import Figure

    drawn = Figure(figsize=(2.1 * (len(results) + 1), 2.6), layout="constrained")
    panels = [(case.source_prompt, case.source_image()), *((prompt, r.image) for prompt, r in results.items())]
    for axes, (prompt, image) in zip(drawn.subplots(1, len(panels)), panels):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(textwrap.fill(prompt, 22), fontsize=8, parse_math=False)
        axes.set_axis_off()
    return drawn
