"""Pictures of the pipeline's report."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlab.core.figures import BLUE, GREEN, GREY, ORANGE, figure

CLOCKS = {"static": "highest clock", "ecofreq": "EcoFreq"}
"""Controllers, as a reader knows them."""


def learning(trained: Mapping[str, Sequence[float]], improved: Mapping[str, Sequence[float]]) -> Any:
    """How often commands are right: by step of the supervised stage, then by update of the reinforcement."""
    drawn, axes = figure(8.0, 3.4)
    steps, rounds = trained["step"], improved["step"]
    # One axis for both: an update of the reinforcement is drawn as wide as makes the stages equal.
    wide = steps[-1] / rounds[-1]
    axes.plot(
        steps, _smooth(trained["accuracy"]), color=GREY, linewidth=1.6, label="words of the teacher that are likeliest"
    )
    axes.plot(
        [steps[-1] + wide * each for each in rounds],
        _smooth(improved["reward"]),
        color=BLUE,
        linewidth=1.6,
        label="drawn commands that are right (reward)",
    )
    axes.axvline(steps[-1], color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xticks(
        [0, steps[-1] / 2, steps[-1], steps[-1] * 1.5, 2 * steps[-1]],
        ["0", f"{steps[-1] // 2}", f"{steps[-1]} | 0", f"{rounds[-1] // 2}", f"{rounds[-1]}"],
    )
    axes.set_xlabel("supervised steps | slow-fast updates")
    axes.set_ylim(0, 1)
    axes.set_ylabel("share")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return drawn


def _smooth(values: Sequence[float], width: int = 5) -> np.ndarray:
    """Means of the last few."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def accuracies(rows: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> Any:
    """What a stage makes of the share of right commands: (stage, with the plan, without), each mean and interval."""
    drawn, axes = figure(8.0, 3.4)
    for offset, column, colour, label in ((-0.2, 1, BLUE, "next step of a plan shown"), (0.2, 2, GREY, "no plan")):
        found = np.array([row[column] for row in rows], np.float64)
        places = np.arange(len(rows)) + offset
        errors = np.abs(found[:, 1:].T - found[:, 0])
        bars = axes.bar(places, found[:, 0], 0.36, color=colour, label=label)
        axes.errorbar(places, found[:, 0], yerr=errors, fmt="none", ecolor="#222222", elinewidth=1.0)
        axes.bar_label(bars, [f"{value:.0%}" for value in found[:, 0]], label_type="center", fontsize=9, color="white")
    axes.set_xticks(range(len(rows)), [name for name, *_ in rows], fontsize=9)
    axes.set_ylabel("right commands")
    axes.set_ylim(0, 1.05)
    axes.grid(visible=False, axis="x")
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return drawn


def loads(stages: Mapping[str, Sequence[Sequence[float]]]) -> Any:
    """How many tokens each expert gets over the mean, layer by layer, for the model after each stage."""
    lines = [(f"{name}, layer {k}", line) for name, layers in stages.items() for k, line in enumerate(layers)]
    drawn, axes = figure(7.6, 1.2 + 0.34 * len(lines))
    image = axes.imshow(
        [line for _, line in lines], aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest"
    )
    axes.set_yticks(range(len(lines)), [name for name, _ in lines], fontsize=9)
    axes.set_xlabel("expert")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    bar = drawn.colorbar(image, ax=axes, extend="max", pad=0.02)
    bar.set_label("tokens / mean")
    return drawn


def work(runs: Sequence[Mapping[str, Any]]) -> Any:
    """Success, and simulated energy of an episode, for each run of the agent."""
    drawn, left = figure(8.4, 3.2)
    left.remove()
    names = [label(run) for run in runs]
    colours = [GREEN if run["planned"] else GREY for run in runs]
    axes = drawn.subplots(1, 2)
    success = np.array([run["success"] for run in runs], np.float64)
    errors = np.nan_to_num(np.abs(success[:, 1:].T - success[:, 0]))
    energy = [run["joules"] / run["episodes"] for run in runs]
    for each, values, text, title in (
        (axes[0], success[:, 0], [f"{value:.0%}" for value in success[:, 0]], "tasks solved"),
        (axes[1], energy, [f"{value:.0f}" for value in energy], "J an episode (simulated)"),
    ):
        each.spines[["top", "right"]].set_visible(False)
        each.barh(range(len(runs)), values, 0.62, color=colours)
        ends = values + errors[1] if each is axes[0] else values  # behind the interval
        for place, (end, told) in enumerate(zip(ends, text)):
            each.annotate(told, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
        each.set_yticks(range(len(runs)), names if each is axes[0] else [""] * len(runs), fontsize=9)
        each.invert_yaxis()
        each.margins(x=0.14)
        each.set_xlabel(title)
    axes[0].errorbar(success[:, 0], range(len(runs)), xerr=errors, fmt="none", ecolor="#222222", elinewidth=1.0)
    axes[0].set_xlim(0, 1.15)
    return drawn


def power(runs: Sequence[Mapping[str, Any]]) -> Any:
    """What each worker's simulated GPU draws while the agent works with plans, under each controller."""
    workers = [name for name in runs[0]["trace"] if name != "seconds"]
    drawn, first = figure(8.4, 1.2 + 1.3 * len(workers))
    first.remove()
    axes = np.atleast_1d(drawn.subplots(len(workers), 1, sharex=True))
    for each, worker in zip(axes, workers):
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25, linewidth=0.7)
        for run, colour in zip(runs, (ORANGE, BLUE)):
            trace = run["trace"]
            name = CLOCKS[run["controller"]]
            each.step(trace["seconds"], trace[worker], color=colour, linewidth=1.2, label=name, where="pre")
        each.set_ylim(0, 420)
        each.set_ylabel(f"{worker}\nW (simulated)", fontsize=9)
    axes[-1].set_xlabel("seconds")
    axes[0].legend(frameon=False, fontsize=9, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    return drawn


def label(run: Mapping[str, Any]) -> str:
    """A run of the agent, as a reader knows it."""
    return f"{CLOCKS[run['controller']]}, {'with plans' if run['planned'] else 'no plans'}"
