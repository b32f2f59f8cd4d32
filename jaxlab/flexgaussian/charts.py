"""The charts of reports, evidence and notebook: quality by size, importance by rank."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxlab.core.figures import BLUE, COLOURS, GREY, ORANGE, figure


def rate_distortion(curves: Mapping[str, Sequence[Any]], target: float | None = None) -> Any:
    """PSNR by size of the file, with a dashed line at the target.

    Args:
      curves: name -> anything that has `bytes` and `psnr`.
      target: in dB.
    """
    drawn, axes = figure(7.0, 4.0)
    for color, (name, points) in zip(COLOURS, curves.items()):
        ordered = sorted(points, key=lambda point: point.bytes)
        sizes = [point.bytes / 1024 for point in ordered]
        axes.plot(sizes, [point.psnr for point in ordered], "o-", color=color, label=name, markersize=4)
    if target is not None:
        axes.axhline(target, color=GREY, linestyle="--", linewidth=1)
        axes.annotate("target", (1, target), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=GREY)
    axes.set_xlabel("file, KiB")
    axes.set_ylabel("PSNR, dB")
    axes.legend(frameon=False)
    return drawn


def importance(scores: Float[np.ndarray, " n"], kept: int, with_harmonics: int) -> Any:
    """Scores from the highest to the lowest, and what the chosen candidate keeps of them."""
    drawn, axes = figure(7.0, 3.4)
    ranked = np.sort(scores)[::-1]
    rank = np.arange(len(ranked)) / len(ranked)
    some = np.unique(np.linspace(0, len(ranked) - 1, 400).astype(int))
    axes.plot(rank[some], np.maximum(ranked[some], 1e-3), color=BLUE)
    edges = (0, with_harmonics / len(ranked), kept / len(ranked), 1)
    labels = ("all", "without harmonics", "pruned")
    for start, end, color, label in zip(edges, edges[1:], (BLUE, ORANGE, GREY), labels):
        axes.axvspan(start, end, color=color, alpha=0.12, linewidth=0)
        if end - start > 0.08:
            axes.text((start + end) / 2, 0.94, label, transform=axes.get_xaxis_transform(), ha="center", fontsize=9)
    axes.set_yscale("log")
    axes.set_xlabel("Gaussians by rank")
    axes.set_ylabel("importance")
    axes.set_xlim(0, 1)
    return drawn
