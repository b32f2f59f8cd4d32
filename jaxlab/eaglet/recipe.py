"""Executors with and without a planner: plans from solutions, the filter, the cold start, reinforcement by gain."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxlab import core
from jaxlab.core.plan import Plan, Target
from jaxlab.core.statistics import Interval
from jaxlab.eaglet.evaluation import EvalReport, compare
from jaxlab.eaglet.study import METHODS, Study, StudyConfig
from jaxlab.rl.compiled import PlanConfig

__all__ = ["PlanConfig", "StudyConfig", "plan", "run"]


def plan(config: PlanConfig, target: Target) -> Plan:
    """Compiles a step of the planner's reinforcement for a target, which need not be there; see `jaxlab.rl.compiled`.

    The executors are not in it: they run elsewhere, or before.
    """
    from jaxlab.rl.compiled import compile_phase

    return compile_phase(config, target)


def run(config: StudyConfig) -> core.Report:
    """Goes through all stages and compares the methods on tasks held out.

    Needs nothing but a CPU. With a folder, a run goes on where it was killed.
    """
    with core.kept_or_temporary(config.folder) as folder:
        return _run(config, folder)


def _run(config: StudyConfig, folder: Path) -> core.Report:
    import jax

    study = Study(config, folder)
    report, faulty = study.filtered(), faults(study)
    rows: dict[str, list[tuple[Any, ...]]] = {}
    gains: dict[tuple[str, str, str], Interval] = {}
    for split in study.held_out:
        baseline = study.evaluate("none", split)
        rows[split] = []
        for method in core.progress(config.methods, f"methods, {split}"):
            reports = study.evaluate(method, split)
            rows[split].append(summary(study, method, split, reports, baseline))
            for name, found in reports.items():
                gains[method, split, name] = compare(found, baseline[name]).success
    parameters = sum(leaf.size for leaf in jax.tree.leaves(study.start().params))
    last = config.methods[-2] if config.methods[-1] == "gold" and len(config.methods) > 1 else config.methods[-1]
    told = {name: gains[last, "seen", name].mean for name in study.executors}
    return core.Report(
        system="eaglet",
        title=f"A planner of {parameters / 1e6:.2f} M parameters for executors that stay as they are",
        metrics={
            "parameters": parameters,
            "plans_kept": len(report.kept),
            "plans_given": len(report.kept) + len(report.dropped),
            **precision_recall(report, faulty),
            **{f"success gained, {name}": value for name, value in told.items()},
        },
        tables=[
            (
                f"Tasks held out, {split}: {len(study.held_out[split])} x {len(config.eval_seeds)} (measured)",
                COLUMNS,
                made,
            )
            for split, made in rows.items()
        ],
        plots=(
            ("Success gained over no plan, seen tasks", _bars(config, gains, list(study.executors))),
            *_curve(folder),
        ),
        notes=(
            f"{len(study.train)} tasks to train on. Plans come from solutions, each with a fault by a chance of "
            f"{config.corruption:.0%}, which the filter sees only through what executors do with them. Gains are "
            "against the same episodes without a plan, 95 % intervals over tasks; R_final is the gain of expert and "
            "novice, plus 1 for the format. The executor called other was never used in training."
            + _PACKAGED.format(steps=config.grpo.steps)
            * ("packaged" in config.methods),
        ),
    )


_PACKAGED = (
    " The reinforcement here makes {steps} updates; the package's planner comes from the 100 of "
    "configs/eaglet/study.yaml."
)
COLUMNS = (
    *("plans", "R_final", "expert: success", "gain", "95 %", "novice: success", "gain", "95 %"),
    *("other: success", "gain", "95 %", "steps, all three"),
)


def summary(
    study: Study, method: str, split: str, reports: dict[str, EvalReport], baseline: dict[str, EvalReport]
) -> tuple[Any, ...]:
    """A row of a table with `COLUMNS`."""
    row: list[Any] = [METHODS[method], None if method == "none" else float(study.rewards(method, split).final.mean())]
    for name, report in reports.items():
        gained = compare(report, baseline[name]).success
        row += [report.success.mean, gained.mean, f"{gained.low:+.2f} to {gained.high:+.2f}"]
    return *row, float(np.mean([report.steps.mean for report in reports.values()]))


def faults(study: Study) -> dict[str, bool]:
    """Which training plans have a fault, by task."""
    return {task.id: study.gold.fault(task) is not None for task in study.train}


def precision_recall(report: Any, faulty: dict[str, bool]) -> dict[str, float]:
    """Of the filter: how many dropped plans had a fault, and how many with a fault were dropped."""
    dropped = [faulty[task.id] for task, _ in report.dropped]
    return {
        "filter_precision": float(np.mean(dropped)) if dropped else float("nan"),
        "filter_recall": sum(dropped) / max(sum(faulty.values()), 1),
    }


def _bars(config: StudyConfig, gains: dict[tuple[str, str, str], Interval], executors: list[str]) -> Any:
    from jaxlab.core.figures import COLOURS, GREY, figure

    drawn, axes = figure(8.0, 3.8)
    methods = [method for method in config.methods if method != "none"]
    for offset, (name, colour) in enumerate(zip(executors, COLOURS)):
        found = [gains[method, "seen", name] for method in methods]
        means = np.array([interval.mean for interval in found])
        errors = np.array([[x.mean - x.low, x.high - x.mean] for x in found]).T.clip(0)
        places = np.arange(len(methods)) + 0.26 * (offset - 1)
        axes.bar(places, means, 0.24, color=colour, label=name)
        axes.errorbar(places, means, yerr=errors, fmt="none", ecolor="#222222", elinewidth=1.0)
    axes.axhline(0, color=GREY, linewidth=1.0)
    names = [METHODS[method].replace(" of ", "\nof ").replace(" on ", "\non ") for method in methods]
    axes.set_xticks(range(len(methods)), names, fontsize=8)
    axes.set_ylabel("success gained")
    axes.legend(frameon=False, fontsize=9)
    return drawn


def _curve(folder: Path) -> tuple[tuple[str, Any], ...]:
    """Reward and episode length by update, where there was reinforcement."""
    from matplotlib.ticker import MaxNLocator

    from jaxlab.core.figures import BLUE, figure

    rows = core.jsonl.read(folder / "runs" / "grpo" / "metrics.jsonl")
    rewards = [row["reward"] for row in rows if "reward" in row]
    if not rewards:
        return ()
    drawn, axes = figure(7.0, 3.2)
    axes.plot(range(1, len(rewards) + 1), rewards, color=BLUE, linewidth=1.4)
    axes.set_xlabel("update")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("mean R_final of plans drawn")
    return (("Reinforcement", drawn),)
