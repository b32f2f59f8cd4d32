"""The pictures of reports: accuracy against what it takes."""

from typing import Any

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
