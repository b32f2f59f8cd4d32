"""The look of all figures. They are objects: no global state, no display needed."""

from typing import Any

BLUE, ORANGE, GREEN, RED, GREY = "#2457c5", "#e07b24", "#1b7f4b", "#b3261e", "#8893a2"
COLOURS = (BLUE, ORANGE, GREEN, "#7a4fb5", "#c2a03a", RED, GREY)


def figure(width: float = 7.0, height: float = 3.8) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, in the house style; sizes in inches."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    axes = drawn.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.7)
    axes.set_axisbelow(True)
    return drawn, axes
