"""The pictures of reports, evidence and notebook: losses, rollbacks, loss scale, ablation, memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxlab.core.figures import BLUE, COLOURS, GREEN, GREY, ORANGE, RED, figure

Rows = Sequence[Mapping[str, float]]


def losses(rows: Rows) -> Any:
    """The loss of each step; steps that were not finite are gaps, marked below."""
    drawn, axes = figure(7.0, 3.4)
    finite = [row for row in rows if not row["skipped"]]
    axes.plot([row["step"] for row in finite], [row["loss"] for row in finite], color=BLUE, linewidth=1.2)
    odd = [row["step"] for row in rows if row["skipped"]]
    if odd:
        floor = min(row["loss"] for row in finite)
        axes.plot(odd, [floor] * len(odd), "x", color=RED, markersize=6, label="skipped: gradients not finite")
        axes.legend(frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    return drawn


def rollbacks(rows: Rows, width: int = 10) -> Any:
    """How many of so many steps each were rolled back, by reason, and the loss scale where there is one."""
    drawn, axes = figure(7.0, 3.4)
    starts = range(0, len(rows), width)
    clipped = [sum(row["clipped"] for row in rows[i : i + width]) for i in starts]
    skipped = [sum(row["skipped"] for row in rows[i : i + width]) for i in starts]
    places = [i + (width + 1) / 2 for i in starts]
    axes.bar(places, clipped, 0.85 * width, color=BLUE, label="clipped: rolled back, replayed")
    axes.bar(places, skipped, 0.85 * width, bottom=clipped, color=RED, label="not finite: rolled back, skipped")
    axes.set_ylim(0, 1.05 * width)
    axes.set_xlabel("step")
    axes.set_ylabel(f"of {width} steps")
    lines, labels = axes.get_legend_handles_labels()
    if rows[0]["loss_scale"] != 1:
        right = axes.twinx()
        right.spines[["top"]].set_visible(False)
        right.set_yscale("log", base=2)
        right.step(
            [row["step"] for row in rows],
            [row["loss_scale"] for row in rows],
            where="mid",
            color=ORANGE,
            label="loss scale",
        )
        right.set_ylabel("loss scale")
        lines, labels = lines + right.get_legend_handles_labels()[0], [*labels, "loss scale"]
    axes.legend(lines, labels, frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    return drawn


def ablation(rows: Sequence[tuple[str, float, float | None]]) -> Any:
    """TFLOP/s technique by technique: rows of (what is added, modelled, the paper's)."""
    drawn, axes = figure(7.0, 3.2)
    places = range(len(rows))
    axes.bar([i - 0.2 for i in places], [row[1] for row in rows], 0.38, color=BLUE, label="modelled")
    told = [(i, row[2]) for i, row in enumerate(rows) if row[2] is not None]
    axes.bar([i + 0.2 for i, _ in told], [value for _, value in told], 0.38, color=GREY, label="paper")
    axes.set_xticks(list(places), [row[0] for row in rows], fontsize=8)
    axes.set_ylabel("TFLOP/s")
    axes.grid(visible=False, axis="x")
    axes.legend(frameon=False)
    return drawn


def overlap(rows: Sequence[tuple[str, Mapping[str, float]]]) -> Any:
    """Milliseconds of a step in several ways; rows of (way, measure -> milliseconds)."""
    drawn, axes = figure(7.0, 3.4)
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    wide = 0.8 / len(names)
    for index, (name, colour) in enumerate(zip(names, (BLUE, ORANGE, GREY, GREEN, *COLOURS))):
        places = [i + wide * (index - (len(names) - 1) / 2) for i in range(len(rows))]
        axes.bar(places, [values.get(name, 0.0) for _, values in rows], 0.92 * wide, color=colour, label=name)
    axes.set_xticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylabel("ms a step")
    axes.grid(visible=False, axis="x")
    axes.legend(frameon=False, fontsize=9)
    return drawn
