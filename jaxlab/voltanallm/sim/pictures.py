"""Pictures of simulated runs: energy saved and objectives kept by load, both against each other, clocks over time."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlab.core.figures import BLUE, COLOURS, GREEN, GREY, ORANGE, RED, figure
from jaxlab.voltanallm.sim.metrics import SimResult
from jaxlab.voltanallm.sim.traces import Trace

Curve = Sequence[tuple[float, float, float, float]]
"""(load, mean, low, high), by load."""


def savings(curves: Mapping[str, Curve], reference: str, points: Mapping[float, float]) -> Any:
    """Per cent of the energy saved by load, with intervals; `points` are somebody else's, load -> per cent."""
    drawn, axes = figure(8.8, 4.2)
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        _line(axes, name, curve, colour)
    axes.scatter(
        list(points), list(points.values()), s=90, facecolor="none", edgecolor="#222222", linewidth=1.4, zorder=5,
        label=reference,
    )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests a second")
    axes.set_ylabel("energy saved, %")
    _legend(axes)
    return drawn


def attainments(panels: Mapping[str, Mapping[str, Curve]]) -> Any:
    """Per cent within the objective by load; one panel each."""
    drawn, first = figure(10.4, 3.8)
    first.remove()
    grid = drawn.add_gridspec(1, len(panels))
    for place, (title, curves) in enumerate(panels.items()):
        axes = drawn.add_subplot(grid[place])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.7)
        for (name, curve), colour in zip(curves.items(), ("#222222", *COLOURS), strict=False):
            _line(axes, name, curve, colour)
        axes.set_ylim(0, 103)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("requests a second")
        axes.set_ylabel("within the objective, %")
    _legend(axes)
    return drawn


def frontier(curves: Mapping[str, Sequence[tuple[float, float]]], points: Mapping[str, tuple[float, float]]) -> Any:
    """Saving against attainment, both in per cent: families of settings as lines, others as numbered dots."""
    drawn, axes = figure(9.2, 5.0)
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot(*zip(*curve), color=colour, linewidth=1.8, marker="o", markersize=4, label=name, zorder=3)
    others = sorted((place, name) for name, place in points.items() if name not in curves)
    for number, ((kept, saved), name) in enumerate(reversed(others), 1):
        axes.scatter(kept, saved, s=150, color=GREY, edgecolor="white", linewidth=0.8, zorder=2)
        axes.annotate(str(number), (kept, saved), color="white", fontsize=7, ha="center", va="center", zorder=2)
        axes.scatter([], [], color=GREY, s=24, label=f"{number}  {name}")
    axes.set_xlabel("tokens within the objective, %")
    axes.set_ylabel("energy saved, %")
    _legend(axes, fontsize=7.5)
    return drawn


def clocks(trace: Trace, result: SimResult, *, start: float, stop: float, tile: int) -> Any:
    """Arrivals, batches and clocks of a recorded run between two times; `tile` draws the steps of the staircase."""
    drawn, first = figure(9.6, 6.2)
    first.remove()
    grid = drawn.add_gridspec(3, 1, height_ratios=(1, 2.2, 1.6))
    rows: list[Any] = []
    for place in range(3):
        axes = drawn.add_subplot(grid[place], sharex=rows[0] if rows else None)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelbottom=place == 2)
        rows.append(axes)
    width = 0.5
    edges = np.arange(start, stop + width, width)
    counts, _ = np.histogram(trace.arrival_s, edges)
    rows[0].fill_between(edges[:-1], counts / width, step="post", color=GREY, alpha=0.45, linewidth=0)
    rows[0].set_ylabel("arrivals/s")
    decodes = sorted({moment.worker for moment in result.moments if moment.worker.startswith("decode")})
    for worker, colour in zip(decodes, (BLUE, ORANGE, GREEN, RED), strict=False):
        seen = [moment for moment in result.moments if moment.worker == worker and start <= moment.time_s <= stop]
        times = [moment.time_s for moment in seen]
        rows[1].plot(times, [moment.batch for moment in seen], drawstyle="steps-post", color=colour, label=worker)
        rows[2].plot(times, [moment.clock_mhz for moment in seen], drawstyle="steps-post", color=colour, linewidth=1.2)
    top = rows[1].get_ylim()[1]
    for edge in range(tile, int(top) + tile, tile):
        rows[1].axhline(edge, color=GREY, linewidth=0.9, linestyle="--", zorder=0)
    rows[1].set_ylim(0, top)
    rows[1].set_ylabel("requests in the batch")
    rows[1].legend(frameon=False, fontsize=9, loc="lower right", ncols=4)
    rows[2].set_ylabel("clock, MHz")
    rows[2].set_yticks(sorted({moment.clock_mhz for moment in result.moments}))
    rows[2].set_xlabel("seconds")
    rows[2].set_xlim(start, stop)
    return drawn


def _line(axes: Any, name: str, curve: Curve, colour: str) -> None:
    load, mean, low, high = np.array(curve).T
    axes.plot(load, mean, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=name)
    axes.fill_between(load, low, high, color=colour, alpha=0.18, linewidth=0)


def _legend(axes: Any, fontsize: float = 9) -> None:
    axes.legend(frameon=False, fontsize=fontsize, loc="upper left", bbox_to_anchor=(1.0, 1.0))
