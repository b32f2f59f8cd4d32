"""Pictures of simulated runs: energy saved and objectives kept by load, both against each other, clocks over time."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlab.core.figures import BLUE, COLOURS, GREEN, GREY, ORANGE, RED, figure
from jaxlab.voltanallm.sim.metrics import SimResult
from jaxlab.voltanallm.sim.traces import Trace

Curve = Sequence[tuple[float, float, float, float, bool]]
"""(load, mean, low, high, whether the objectives are kept), by load."""


def savings(curves: Mapping[str, Curve], missed: str, reference: str, points: Mapping[float, float]) -> Any:
    """Per cent of the energy saved by load, with intervals.

    Args:
      curves: by controller.
      missed: what it means that objectives are not kept; such points are hollow.
      reference: whose `points` are.
      points: load -> per cent saved.
    """
    drawn, axes = figure(8.8, 4.2)
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        _line(axes, name, curve, colour)
    axes.scatter([], [], s=22, facecolor="white", edgecolor="#222222", label=missed)
    axes.scatter(list(points), list(points.values()), s=110, marker="*", color="#222222", zorder=5, label=reference)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests a second")
    axes.set_ylabel("energy saved, %")
    axes.legend(frameon=False, fontsize=8.5, loc="lower left")
    return drawn


def attainments(panels: Mapping[str, Mapping[str, Curve]]) -> Any:
    """Per cent within the objective by load; one panel each."""
    drawn, first = figure(10.4, 4.2)
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
        if not place:
            axes.legend(frameon=False, fontsize=8, loc="lower left")
    return drawn


def frontier(
    curves: Mapping[str, Sequence[tuple[float, float]]], points: Mapping[str, tuple[float, float, bool]], missed: str
) -> Any:
    """Saving against tokens in time, both in per cent.

    Args:
      curves: families of settings, each (tokens in time, saved), as lines.
      points: others, (tokens in time, saved, whether the other objective is kept), as numbered dots.
      missed: what it means that it is not; such dots are hollow.
    """
    drawn, axes = figure(9.2, 5.2)
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        late, saved = zip(*((100 - kept, saved) for kept, saved in curve))
        axes.plot(late, saved, color=colour, linewidth=1.8, marker="o", markersize=4, label=name, zorder=3)
    others = sorted((place, name) for name, place in points.items() if name not in curves)
    for number, ((kept, saved, fine), name) in enumerate(reversed(others), 1):
        face, ink = (GREY, "white") if fine else ("white", "#222222")
        axes.scatter(100 - kept, saved, s=150, facecolor=face, edgecolor=GREY, linewidth=0.8, zorder=2)
        axes.annotate(str(number), (100 - kept, saved), color=ink, fontsize=7, ha="center", va="center", zorder=2)
        axes.scatter([], [], facecolor=face, edgecolor=GREY, s=24, label=f"{number}  {name}")
    axes.scatter([], [], facecolor="white", edgecolor=GREY, s=24, label=missed)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens later than the objective, %")
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
    load, mean, low, high, kept = np.array(curve).T
    axes.plot(load, mean, color=colour, linewidth=1.8, label=name)
    axes.scatter(load, mean, s=22, color=np.where(kept > 0, colour, "white"), edgecolor=colour, zorder=3)
    axes.fill_between(load, low, high, color=colour, alpha=0.18, linewidth=0)


def _legend(axes: Any, fontsize: float = 9) -> None:
    axes.legend(frameon=False, fontsize=fontsize, loc="upper left", bbox_to_anchor=(1.0, 1.0))
