"""The pictures of reports: accuracy against what it takes, and what verdicts rest on."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlab.core.figures import COLOURS, GREY, figure
from jaxlab.vlm_scaling.report import Report, Row


def accuracy_by_tokens(report: Report, budget: float | None = None) -> Any:
    """Accuracy with its interval against tokens a question, logarithmic; the frontier is drawn through.

    Strategies that differ in their number of samples alone have a colour and a line in common; those not to
    be chosen (oracle, random) are hollow. These are the study's own numbers; what a choice among them gives is told by
    `choose`.

    Args:
      report: of a study.
      budget: tokens a question, drawn as a line.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    drawn, axes = figure(8.8, 4.4)
    frontier = report.frontier()
    axes.plot(
        [row.tokens.total for row in frontier],
        [row.accuracy.mean for row in frontier],
        color=GREY,
        alpha=0.3,
        linewidth=7.0,
        solid_capstyle="round",
        label="not dominated",
        zorder=1,
    )
    families: dict[str, list[Row]] = {}
    for row in report.table:
        families.setdefault(row.strategy.partition("@")[0], []).append(row)
    for index, (family, rows) in enumerate(families.items()):
        _family(axes, family, sorted(rows, key=lambda row: row.tokens.total), COLOURS[index % len(COLOURS)], index)
    if budget is not None:
        axes.axvline(budget, color=GREY, linewidth=1.0, linestyle="--", label="budget")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens a question")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return drawn


_MARKERS = "osD^vPX"


def _family(axes: Any, family: str, rows: list[Row], colour: str, index: int) -> None:
    places = [row.tokens.total for row in rows]
    means = [row.accuracy.mean for row in rows]
    ends = [
        [max(row.accuracy.mean - row.accuracy.low, 0.0) for row in rows],
        [max(row.accuracy.high - row.accuracy.mean, 0.0) for row in rows],
    ]
    selectable = rows[0].selectable
    axes.errorbar(
        places,
        means,
        yerr=ends,
        color=colour,
        linewidth=1.4,
        linestyle="-" if selectable else ":",
        elinewidth=0.9,
        capsize=2.5,
        marker=_MARKERS[index // len(COLOURS) % len(_MARKERS)],
        markersize=5.0,
        markerfacecolor=colour if selectable else "white",
        label=family if selectable else f"{family} (not to be chosen)",
        zorder=3,
    )
    for row in rows:
        number = row.strategy.partition("@")[2]
        axes.annotate(
            number,
            (row.tokens.total, row.accuracy.mean),
            (5, -11),
            textcoords="offset points",
            color=colour,
            fontsize=8,
        )


def verdicts(reports: Mapping[str, Report], modes: Sequence[str]) -> Any:
    """Balanced accuracy of verdicts by what the verifier is shown, for each model; 0.5 is chance."""
    drawn, axes = figure(8.0, 1.4 + 0.36 * len(modes) * len(reports))
    height = 0.8 / len(reports)
    for place, (name, report) in enumerate(reports.items()):
        values = [report.verdicts[mode].balanced_accuracy for mode in modes]
        at = np.arange(len(modes)) + (place - (len(reports) - 1) / 2) * height
        axes.barh(at, values, height * 0.92, color=COLOURS[place % len(COLOURS)], label=name)
        for y, value in zip(at, values):
            axes.text(value + 0.01, y, f"{value:.2f}", va="center", fontsize=8)
    axes.axvline(0.5, color=GREY, linewidth=1.0, linestyle="--")
    axes.set_yticks(range(len(modes)), modes)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08)
    axes.set_xlabel("balanced accuracy of verdicts")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return drawn
