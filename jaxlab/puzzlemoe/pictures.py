"""The pictures of reports, evidence and notebook: losses by method, exponents, layers, thresholds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxlab.core.figures import BLUE, COLOURS, GREY, ORANGE, RED, figure
from jaxlab.puzzlemoe.bit_packing import HIGHEST, LOWEST
from jaxlab.puzzlemoe.compression import MATRICES
from jaxlab.puzzlemoe.gaussian import BEST_TAU, merge_error
from jaxlab.puzzlemoe.study import LABELS

_MARKERS = "oDsv^Xp*h"
_OF_METHODS = (BLUE, BLUE, *COLOURS[1:], "#222222")


def losses(rows: Sequence[tuple[str, float, float | None, float | None]], full: float) -> Any:
    """Loss against the share of experts that go, a line a method; the rows of `study.by_method`.

    The axis is logarithmic in what is added: a method that adds nothing, or less, is not drawn there.
    """
    drawn, axes = figure(7.4, 4.0)
    for index, (method, colour) in enumerate(zip(LABELS, _OF_METHODS)):
        mine = [(ratio, loss - full, std) for name, ratio, loss, std in rows if name == method and loss is not None]
        mine = [(100 * ratio, added, std) for ratio, added, std in sorted(mine) if added > 0]
        if not mine:
            continue
        ratios, added, std = zip(*mine)
        axes.errorbar(
            ratios,
            added,
            yerr=std if any(std) else None,
            color=colour,
            marker=_MARKERS[index],
            markersize=6,
            linewidth=2.2 if method == "puzzle" else 1.2,
            linestyle=":" if method == "puzzle_unpacked" else "-",
            capsize=3,
            label=LABELS[method],
        )
    axes.set_yscale("log")
    axes.set_xticks(sorted({100 * ratio for _, ratio, *_ in rows}))
    axes.set_xlabel("experts that go, %")
    axes.set_ylabel("added loss, nats a token")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn


def exponents(histograms: Mapping[str, Any]) -> Any:
    """Shares of the biased exponents of bfloat16 weights, and the range that a packed word holds."""
    drawn, axes = figure(7.0, 3.4)
    axes.axvspan(LOWEST - 0.5, HIGHEST + 0.5, color=GREY, alpha=0.15, linewidth=0, label="what a word can hold")
    low, high = LOWEST - 6, 132
    for (name, counts), colour in zip(histograms.items(), COLOURS):
        counts = np.asarray(counts, np.float64)
        shares = 100 * counts / counts.sum()
        axes.step(range(low, high), shares[low:high], where="mid", color=colour, linewidth=1.5, label=name)
    axes.set_yscale("log")
    axes.set_xlim(low, high - 1)
    axes.set_ylim(1e-4, 100)
    axes.set_xlabel("biased exponent of bfloat16")
    axes.set_ylabel("share of the weights, %")
    axes.legend(frameon=False, fontsize=9)
    return drawn


def by_layer(values: Float[np.ndarray, "l 3"], label: str) -> Any:
    """A figure of each sparse layer's gate, up and down, as bars from zero."""
    drawn, axes = figure(6.4, 2.8)
    layers = np.arange(len(values))
    for index, (name, colour) in enumerate(zip(MATRICES, COLOURS)):
        axes.bar(layers + 0.27 * (index - 1), values[:, index], 0.25, color=colour, label=name)
    axes.set_xticks(layers)
    axes.set_xlabel("sparse layer")
    axes.set_ylabel(label)
    axes.grid(visible=False, axis="x")
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.16))
    return drawn


def thresholds(curve: Sequence[tuple[float, float, float, float]], full: float) -> Any:
    """Loss and error of the weights against tau; rows of (tau, loss, share that is similar, relative error)."""
    drawn, axes = figure(7.0, 3.6)
    taus, measured, _, errors = zip(*curve)
    fine = np.linspace(0, 1, 201)
    right = axes.twinx()
    right.spines[["top"]].set_visible(False)
    right.plot(fine, merge_error(fine), color=GREY, linewidth=1.2, label="weights, theory for Gaussians")
    right.plot(taus, errors, "s", color=ORANGE, markersize=5, label="weights, this model")
    axes.plot(taus, [loss - full for loss in measured], "o-", color=BLUE, label="added loss")
    axes.axvline(BEST_TAU, color=RED, linestyle="--", linewidth=1.0, label="best for the weights: √2 − 1")
    axes.set_xlabel("tau")
    axes.set_ylabel("added loss, nats a token")
    right.set_ylabel("relative squared error of the weights")
    axes.set_ylim(bottom=0)
    right.set_ylim(bottom=0)
    lines = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axes.legend(
        lines,
        [line.get_label() for line in lines],
        frameon=False,
        fontsize=9,
        ncols=2,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
    )
    return drawn
