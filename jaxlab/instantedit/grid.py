"""Sources, edited images and true targets side by side."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlab.instantedit.evaluation import EditCase

_INCHES = 1.5  # of a picture, either side


def picture_grid(cases: Sequence[EditCase], edited: Mapping[str, Sequence[np.ndarray]]) -> Any:
    """A matplotlib figure: a row a case with its prompts, columns source, one an editor, and target where one has it.

    Args:
      cases: the rows.
      edited: column's name -> an image a case, uint8 or in [0, 1].

    Raises:
      ValueError: no cases, or a column with other than an image a case.
    """
    if not cases:
        raise ValueError("cases: expected at least one, got none")
    for name, images in edited.items():
        if len(images) != len(cases):
            raise ValueError(f"edited: expected {len(cases)} images of {name!r}, got {len(images)}")
    columns: dict[str, Sequence[np.ndarray | None]] = {"source": [case.source_image() for case in cases], **edited}
    targets = [case.target_image() for case in cases]
    if any(target is not None for target in targets):
        columns["target"] = targets
    return _drawn(columns, [f"{case.source_prompt} → {case.target_prompt}" for case in cases])


def _drawn(columns: Mapping[str, Sequence[np.ndarray | None]], labels: Sequence[str]) -> Any:
    from matplotlib.figure import Figure

    width = _INCHES * (len(columns) + 1.2)
    drawn = Figure(figsize=(width, _INCHES * len(labels) + 0.3), layout="constrained")
    axes = drawn.subplots(len(labels), len(columns) + 1, squeeze=False, width_ratios=[1.2] + [1.0] * len(columns))
    for row, label in enumerate(labels):
        axes[row, 0].text(0.98, 0.5, textwrap.fill(label, 24), ha="right", va="center", fontsize=8, parse_math=False)
        for column, (name, images) in enumerate(columns.items(), 1):
            if row == 0:
                axes[row, column].set_title(name, fontsize=9, parse_math=False)
            if (image := images[row]) is not None:
                axes[row, column].imshow(image, interpolation="nearest", vmin=0)
    for each in axes.flat:
        each.set_axis_off()
    return drawn
