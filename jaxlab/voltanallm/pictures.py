"""Pictures of measured engines and of simulated clusters."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlab.core.figures import COLOURS, GREY, figure

if TYPE_CHECKING:
    from jaxlab.voltanallm.load import LoadResult
    from jaxlab.voltanallm.predictor import LatencyTable
    from jaxlab.voltanallm.profiling import Samples
    from jaxlab.voltanallm.study import Outcome


def staircase(samples: "Samples", table: "LatencyTable") -> Any:
    """Decode iterations by batch size at each clock, as measured and as the table predicts them."""
    drawn, axes = figure()
    for clock, colour in zip(table.freqs, COLOURS):
        ours = samples.freq == clock
        sizes = np.unique(samples.batch[ours])
        axes.plot(samples.batch[ours], samples.ms[ours], ".", color=colour, alpha=0.15, markeredgewidth=0)
        dense = np.arange(1, sizes[-1] + 1)
        tokens = [
            np.median(samples.tokens[ours & (samples.batch == nearest(sizes, size))] / nearest(sizes, size))
            for size in dense
        ]
        axes.plot(
            dense,
            table.predict(clock, dense, dense * np.array(tokens)),
            color=colour,
            marker="o",
            markersize=3,
            label=f"{clock} MHz",
        )
    axes.set_xlabel("requests decoded together")
    axes.set_ylabel("ms an iteration")
    axes.set_ylim(0, 1.3 * float(np.percentile(samples.ms, 90)))
    axes.legend(frameon=False, title="predicted; dots are measured")
    return drawn


def nearest(sizes: np.ndarray, size: float) -> int:
    """The measured batch size at or above another."""
    return int(sizes[np.searchsorted(sizes, size)])


def savings(outcomes: Sequence["Outcome"]) -> Any:
    """Energy saved against the first way, by load."""
    drawn, axes = figure()
    for name, colour, curve in _curves(outcomes):
        base = {each.rate: each for each in reversed(outcomes)}
        axes.plot(
            [each.rate for each in curve],
            [100 * each.saving(base[each.rate]) for each in curve],
            "o-",
            color=colour,
            label=name,
        )
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel("requests a second")
    axes.set_ylabel("energy saved, %")
    axes.legend(frameon=False, fontsize=8)
    return drawn


def attainment(outcomes: Sequence["Outcome"]) -> Any:
    """Shares of first tokens, and of tokens, that kept their objective, by load."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9.0, 3.6), layout="constrained")
    panels = drawn.subplots(1, 2, sharey=True)
    for axes, name, title in zip(panels, ("ttft_attainment", "itl_token_attainment"), ("first tokens", "tokens")):
        for label, colour, curve in _curves(outcomes):
            axes.plot(
                [each.rate for each in curve],
                [100 * each.mean(name) for each in curve],
                "o-",
                color=colour,
                label=label,
            )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.set_title(f"{title} in time, %", fontsize=10)
        axes.set_xlabel("requests a second")
        axes.set_ylim(-3, 103)
    panels[0].legend(frameon=False, fontsize=8)
    return drawn


def _curves(outcomes: Sequence["Outcome"]) -> Any:
    ways = list(dict.fromkeys(each.way for each in outcomes))
    for way, colour in zip(ways, COLOURS * (1 + len(ways) // len(COLOURS))):
        yield str(way), colour, [each for each in outcomes if each.way == way]


def latencies(result: "LoadResult", ttft_slo_ms: float, itl_slo_ms: float) -> Any:
    """Of a load test: shares of first pieces, and of later ones, that came within a time; objectives as lines."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9.0, 3.6), layout="constrained")
    ttft = result.ttft_ms()
    panels = (
        ("time to the first piece, ms", ttft[np.isfinite(ttft)], len(ttft), ttft_slo_ms),
        ("time between pieces, ms", result.gaps_ms(), len(result.gaps_ms()), itl_slo_ms),
    )
    for axes, (label, values, count, objective) in zip(drawn.subplots(1, 2, sharey=True), panels):
        axes.step(np.sort(values), 100 * np.arange(1, len(values) + 1) / max(count, 1), where="post", color=COLOURS[0])
        axes.axvline(objective, color=COLOURS[1], linestyle="--", label="objective")
        axes.set_xscale("log")
        axes.set_ylim(0, 103)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.set_xlabel(label)
        axes.legend(frameon=False)
    drawn.axes[0].set_ylabel("%")
    return drawn
