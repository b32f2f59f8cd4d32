"""A small decoder that is right now and then, made better by rewards alone: GRPO, SFPO and others, seed by seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab import core
from jaxlab.core.plan import Plan, Target
from jaxlab.rl.compiled import PlanConfig
from jaxlab.sfpo.comparison import Curve, Outcome, Ratio, collapsed, compare, smoothed
from jaxlab.sfpo.families import FAMILIES
from jaxlab.sfpo.methods import METHODS
from jaxlab.sfpo.study import Study, StudyConfig

__all__ = ["PlanConfig", "StudyConfig", "plan", "run", "summary"]


def plan(config: PlanConfig, target: Target) -> Plan:
    """Compiles a step's rollouts or its update for a target, which need not be there; see `jaxlab.rl.compiled`."""
    from jaxlab.rl.compiled import compile_phase

    return compile_phase(config, target)


def run(config: StudyConfig) -> core.Report:
    """Makes the warm start, trains by every method and seed, and compares what they needed.

    Needs nothing but a CPU. A run with a folder goes on where it was killed.
    """
    with core.kept_or_temporary(config.folder) as folder:
        return _run(config, folder)


def _run(config: StudyConfig, folder: Path) -> core.Report:
    import jax

    from jaxlab.sfpo import pictures

    study = Study(config, folder)
    curves = study.runs()
    outcomes = compare(curves, shares=config.shares, width=config.smooth)
    last = [outcome for outcome in outcomes if outcome.share == config.shares[-1]]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(study.start.params))
    first = METHODS[config.methods[0]].label
    sequences = config.rl.batch_size
    return core.Report(
        system="sfpo",
        title=f"{FAMILIES[config.family].label.capitalize()}: learnt from rewards, {parameters / 1e6:.2f} M parameters",
        metrics={
            "parameters": parameters,
            "warm_start_steps": study.start.steps,
            "accuracy_before": study.before.sampled,
            **{f"accuracy, {method}": _final(runs, config.smooth) for method, runs in curves.items()},
            **{f"rollouts_ratio, {x.method}": x.ratios["rollouts"].mean for x in last[1:]},
            **{f"seconds_ratio, {x.method}": x.ratios["seconds"].mean for x in last[1:]},
        },
        tables=(
            (
                f"{len(config.seeds)} run{'s' * (len(config.seeds) > 1)} of {config.rl.steps} steps each (measured)",
                SUMMARY,
                [summary(METHODS[method].label, runs, config.smooth) for method, runs in curves.items()],
            ),
            (
                f"What it takes to get as far as {first}: completions, and seconds without compilation (measured)",
                TARGETS,
                [targets(METHODS[outcome.method].label, outcome) for outcome in outcomes],
            ),
        ),
        plots=(
            *(
                (f"Accuracy by {axis}", pictures.accuracies(curves, axis, config.smooth, last[0].target))
                for axis in ("rollouts", "seconds")
            ),
            ("Entropy", pictures.entropies(curves, config.smooth)),
            *((("Times fewer", pictures.ratios(last)),) if len(curves) > 1 else ()),
        ),
        notes=(
            f"{config.problems} problems to train on, {config.held_out} others to measure on; a step draws {sequences} "
            "completions or, with dynamic sampling, more. Accuracy is the probability of the right answer at "
            f"temperature 1, smoothed over {config.smooth} measurements. The target is {first}'s start plus a share of "
            "its gain, means over seeds; a run that never reaches it counts with all it had, and the ratio is a bound.",
            "Here drawing is cheap and updating is not; with a large model it is the other way round: read the ratio "
            "of seconds together with the two times of a step.",
        ),
    )


SUMMARY = (
    *("method", "accuracy at the end", "best", "greedy at the end", "entropy at the end", "collapsed"),
    *("rollout, s a step", "update, s a step", "slow-fast steps"),
)


def summary(label: str, runs: Sequence[Curve], width: int) -> tuple[Any, ...]:
    """A row of the table `SUMMARY`: means over seeds."""
    return (
        label,
        _final(runs, width),
        float(np.mean([smoothed(curve.sampled, width).max() for curve in runs])),
        float(np.mean([curve.greedy[-1] for curve in runs])),
        float(np.mean([smoothed(curve.entropy, width)[-1] for curve in runs])),
        sum(collapsed(curve, width) for curve in runs),
        float(np.mean([curve.rollout_seconds for curve in runs])),
        float(np.mean([curve.update_seconds for curve in runs])),
        float(np.mean([curve.fast_steps for curve in runs])),
    )


TARGETS = (
    *("method", "share of the gain", "accuracy", "reached by", "completions", "times fewer", "95 %"),
    *("seconds", "times fewer seconds", "95 % of these"),
)


def targets(label: str, outcome: Outcome) -> tuple[Any, ...]:
    """A row of the table `TARGETS`."""
    told: Mapping[str, Ratio] = outcome.ratios
    return (
        label,
        outcome.share,
        outcome.target,
        f"{outcome.reached} of {outcome.runs}",
        round(outcome.needed["rollouts"]),
        _bounded(told["rollouts"]),
        _interval(told["rollouts"]),
        outcome.needed["seconds"],
        _bounded(told["seconds"]),
        _interval(told["seconds"]),
    )


def _final(runs: Sequence[Curve], width: int) -> float:
    return float(np.mean([smoothed(curve.sampled, width)[-1] for curve in runs]))


def _bounded(ratio: Ratio) -> str:
    return f"{ratio.bound} {ratio.mean:.2f}".strip()


def _interval(ratio: Ratio) -> str:
    return "" if ratio.low is None else f"{ratio.low:.2f} to {ratio.high:.2f}"
