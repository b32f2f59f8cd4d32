"""The pictures of reports and evidence: accuracy by what it took, entropy, and how many times less is needed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlab.core.figures import BLUE, GREEN, GREY, ORANGE, RED, figure
from jaxlab.sfpo.comparison import Curve, Outcome, smoothed
from jaxlab.sfpo.methods import METHODS

Curves = Mapping[str, Sequence[Curve]]

_COLOURS = dict(zip(METHODS, (BLUE, ORANGE, GREEN, "#7a4fb5", "#c2a03a", RED, "#1a9aa0", "#222222", GREY), strict=True))
_AXES = {"rollouts": "completions drawn", "seconds": "seconds of rollouts and updates"}


def accuracies(curves: Curves, axis: str, width: int, target: float | None = None) -> Any:
    """Smoothed accuracy against "rollouts" or "seconds": means over seeds, bands from the least to the greatest."""
    from matplotlib.ticker import MaxNLocator

    drawn, axes = figure(8.8, 4.0)
    for method, runs in curves.items():
        # Runs measure at the same steps, but at other times, and with dynamic sampling after other numbers of rollouts.
        places = np.mean([getattr(curve, axis) for curve in runs], axis=0)
        values = np.array([smoothed(curve.sampled, width) for curve in runs])
        _band(axes, method, places, values)
    if target is not None:
        axes.axhline(target, color=GREY, linewidth=1.0, linestyle="--")
    axes.set_xlabel(_AXES[axis])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_ylabel("accuracy on held-out problems")
    _legend(axes)
    return drawn


def entropies(curves: Curves, width: int) -> Any:
    """Smoothed entropy of the policy against steps, means over seeds."""
    drawn, axes = figure(8.8, 3.6)
    for method, runs in curves.items():
        values = np.array([smoothed(curve.entropy, width) for curve in runs])
        _band(axes, method, np.arange(1, values.shape[1] + 1), values)
    axes.set_xlabel("step")
    axes.set_ylabel("entropy, nats a token")
    _legend(axes)
    return drawn


def ratios(outcomes: Sequence[Outcome]) -> Any:
    """How many times fewer completions and seconds each method needs than the first one; one share of the gain."""
    drawn, axes = figure(7.4, 1.8 + 0.45 * len(outcomes))
    for offset, axis, colour in ((-0.2, "rollouts", BLUE), (0.2, "seconds", ORANGE)):
        for index, outcome in enumerate(outcomes):
            ratio = outcome.ratios[axis]
            hatch = "//" if ratio.bound else None
            axes.barh(index + offset, ratio.mean, 0.38, color=colour, alpha=0.55 if hatch else 1.0, hatch=hatch)
            if ratio.low is not None and ratio.high is not None:
                error = [[ratio.mean - ratio.low], [ratio.high - ratio.mean]]
                axes.errorbar(ratio.mean, index + offset, xerr=error, color="#222222", capsize=3, linewidth=1.0)
        axes.barh(0, 0, color=colour, label=_AXES[axis])
    axes.barh(0, 0, color="white", edgecolor=GREY, hatch="//", label="a bound: some runs never got there")
    axes.axvline(1.0, color=GREY, linewidth=1.0)
    axes.set_yticks(range(len(outcomes)), [METHODS[outcome.method].label for outcome in outcomes])
    axes.invert_yaxis()
    axes.set_xlabel(f"times fewer than {METHODS[outcomes[0].method].label}")
    axes.grid(visible=False, axis="y")
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    return drawn


def _band(axes: Any, method: str, places: np.ndarray, values: np.ndarray) -> None:
    colour = _COLOURS[method]
    axes.plot(places, values.mean(axis=0), color=colour, linewidth=1.6, label=METHODS[method].label)
    if len(values) > 1:
        axes.fill_between(places, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
