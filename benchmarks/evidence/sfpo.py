"""Does slow-fast policy optimisation need fewer rollouts? Methods on three families, five seeds each, and ablations."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence import FOLDER, Item

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "out" / "evidence" / "sfpo"
"""Warm starts, metrics and checkpoints of the runs; a killed one goes on from here."""

SEEDS = (0, 1, 2, 3, 4)
ABLATION_SEEDS = SEEDS[:3]
SHARED = (
    "rl.prompts_per_step=64",
    "rl.num_generations=8",
    "rl.mini_batch_size=128",
    "rl.learning_rate=1e-4",
    "rl.steps=150",
    "rl.checkpoint_every=25",
    "rl.nonfinite=skip",
    "eval_every=3",
    "smooth=5",
)
FAMILIES = {
    "spell_backward": ("rl.max_completion_length=7",),
    "number_sorting": ("rl.max_completion_length=9",),
    "gcd": ("rl.max_completion_length=3",),
}
ABLATED = "spell_backward"
_SECONDS = re.compile("second|, s a step|of these")
ABLATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    **{f"K = {k}": ("sfpo", (f"sfpo.inner_steps={k}",)) for k in (1, 2, 5)},
    **{f"alpha = {alpha}": ("sfpo", (f"sfpo.alpha={alpha}",)) for alpha in (0.2, 0.5, 1.0)},
    "never stopped": ("sfpo", ("sfpo.threshold=1e9",)),
    "window 10": ("sfpo", ("sfpo.window=10",)),
    "threshold 2": ("sfpo", ("sfpo.threshold=2",)),
    "stopped by a fall, too": ("sfpo", ("sfpo.two_sided=true",)),
    "moments reset": ("sfpo", ("sfpo.state_policy=reset_fast",)),
    **{f"rate x {times}": ("sfpo", (f"rl.learning_rate={times}e-4",)) for times in (0.3, 3)},
    **{f"GRPO, rate x {times}": ("grpo", (f"rl.learning_rate={times}e-4",)) for times in (2, 5, 8)},
}
"""Label -> method, and what is different from the shared settings."""
FEW = ("rl.prompts_per_step=16", "rl.mini_batch_size=32")
"""A quarter of the prompts in as many updates: where reuse was seen not to pay."""


def items() -> Iterator[Item]:
    """One row a family and method, one for GRPO and SFPO with few prompts, and one an ablation."""
    from jaxlab import core
    from jaxlab.sfpo.families import FAMILIES as TOLD
    from jaxlab.sfpo.methods import METHODS

    for family in FAMILIES:
        config = _config(family)
        title = (
            f"{TOLD[family].label.capitalize()}: {len(SEEDS)} runs of {config.rl.steps} steps of "
            f"{config.rl.prompts_per_step} x {config.rl.num_generations} completions, {_target(family == ABLATED)}"
        )
        for method in METHODS:
            yield Item(
                name=f"{family}, {method}",
                table=title,
                settings={"method": method, **core.to_dict(config)},
                run=lambda family=family, method=method: _row(
                    METHODS[method].label, family, method, timed=family == ABLATED
                ),
                seeds=SEEDS,
            )
    few = _config(ABLATED, FEW)
    for method in ("grpo", "sfpo"):
        yield Item(
            name=f"few prompts, {method}",
            table=(
                f"{TOLD[ABLATED].label.capitalize()}, few prompts: {len(ABLATION_SEEDS)} runs of {few.rl.steps} steps "
                f"of {few.rl.prompts_per_step} x {few.rl.num_generations} completions, {_target(True)}"
            ),
            settings={"method": method, **core.to_dict(few)},
            run=lambda method=method: _row(METHODS[method].label, ABLATED, method, (), ABLATION_SEEDS, FEW, timed=True),
            seeds=ABLATION_SEEDS,
        )
    for label, (method, changes) in ABLATIONS.items():
        yield Item(
            name=f"ablation {label}",
            table=f"Ablations on {TOLD[ABLATED].label}, {len(ABLATION_SEEDS)} runs, against GRPO: {_target(False)}",
            settings={"method": method, **core.to_dict(_config(ABLATED, changes))},
            run=lambda label=label, method=method, changes=changes: _row(
                label, ABLATED, method, changes, ABLATION_SEEDS
            ),
            seeds=ABLATION_SEEDS,
        )


def _target(timed: bool) -> str:
    """What the columns are; seconds only of runs that had the machine for themselves."""
    clock = " (or seconds, every step at the median of its kind)" if timed else ""
    return (
        f"means over seeds. Times fewer: geometric means over seeds of GRPO's completions{clock} until 90 % and "
        "100 % of its gain, over the method's, with 95 % bootstrap intervals; a run that never gets there counts with "
        "all it had, which makes them bounds (measured)"
    )


def pages() -> None:
    """Draws the pictures of the system's page, from runs made on this machine."""
    from jaxlab.sfpo import pictures
    from jaxlab.sfpo.comparison import compare
    from jaxlab.sfpo.methods import METHODS

    for family in FAMILIES:
        config = _config(family)
        curves = {method: _finished(family, method) for method in METHODS}
        curves = {method: runs for method, runs in curves.items() if runs}
        if "grpo" not in curves:
            continue
        drawn = {"rollouts": pictures.accuracies(curves, "rollouts", config.smooth)}
        if family == ABLATED:  # whose seconds are told
            drawn |= {
                "seconds": pictures.accuracies(curves, "seconds", config.smooth),
                "entropy": pictures.entropies(curves, config.smooth),
                "ratios": pictures.ratios(compare(curves, shares=(0.9,), width=config.smooth)),
            }
        for name, figure in drawn.items():
            figure.savefig(FOLDER / f"sfpo_{family}_{name}.png", dpi=110, bbox_inches="tight")


def _config(family: str, changes: Sequence[str] = ()) -> Any:
    from jaxlab import core
    from jaxlab.sfpo.study import StudyConfig

    path = core.find_config("configs/sfpo/laptop.yaml")
    return core.load_config(StudyConfig, path, (*SHARED, f"family={family}", *FAMILIES[family], *changes))


def _finished(family: str, method: str) -> list[Any]:
    """The curves of all seeds, if they are there."""
    from jaxlab.sfpo.study import Study

    if not any((WORK / "runs").glob(f"{family}-{method}-*")):
        return []
    study = Study(_config(family), WORK)
    return study.curves(method, SEEDS) if all(study.done(method, seed) for seed in SEEDS) else []


def _row(
    label: str,
    family: str,
    method: str,
    changes: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    shared: Sequence[str] = (),
    *,
    timed: bool = False,
) -> dict[str, Any]:
    """A method's summary, and what it needed against GRPO with the settings that both share."""
    from jaxlab import core
    from jaxlab.sfpo import recipe
    from jaxlab.sfpo.comparison import compare
    from jaxlab.sfpo.study import Study

    base = _config(family, shared)
    study = Study(base, WORK)
    grpo = study.curves("grpo", seeds)
    mine = Study(_config(family, (*shared, *changes)), WORK)
    for seed in core.progress(seeds, f"{family}, {label}"):
        mine.run(method, seed)
    runs = mine.curves(method, seeds)
    if method == "grpo" and not changes:
        runs = grpo
    row = dict(zip(recipe.SUMMARY, recipe.summary(label, runs, base.smooth)))
    for outcome in compare({"grpo": grpo, "mine": runs}, shares=base.shares, width=base.smooth)[1::2]:
        told = dict(zip(recipe.TARGETS, recipe.targets(label, outcome)))
        row |= {
            f"{100 * outcome.share:.0f} %: {name}": told[name]
            for name in ("reached by", "completions", "times fewer", "95 %", "times fewer seconds", "95 % of these")
        }
    return {name: value for name, value in row.items() if timed or not _SECONDS.search(name)}
