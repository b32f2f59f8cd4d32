"""What a recipe tells: figures, tables and plots, in one folder that the tour reads."""

import dataclasses
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.core.folders import replace_file
from jaxlab.core.untrusted import inside, read_json, understood

_FORMAT = "jaxlab.report/1"


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of one run of a recipe.

    Attributes:
      system: the system's name, as in `jaxlab <system>`.
      title: one line for a reader.
      metrics: name -> number (Python's, numpy's, or a JAX scalar) or short text.
      tables: (title, column names, rows) each; cells are numbers, text, booleans or None.
      plots: (title, matplotlib figure or PNG bytes) each.
      notes: sentences for the reader: what was measured, what was not.
      synthetic: whether the input was made up because real data was absent.
    """

    system: str
    title: str
    metrics: Mapping[str, Any]
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[Any]]]] = ()
    plots: Sequence[tuple[str, Any]] = ()
    notes: Sequence[str] = ()
    synthetic: bool = False

    def __post_init__(self):
        for title, columns, rows in self.tables:
            for row in rows:
                if len(row) != len(columns):
                    raise ValueError(f"table {title!r}: expected rows of {len(columns)} cells, got {len(row)}: {row!r}")

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `report.json`, and every plot as a PNG file beside it.

        The plots come first and `report.json` last, by one rename, so a reader never meets a half-written report.

        Returns:
          The path of `report.json`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        plots = []
        for index, (title, plot) in enumerate(self.plots):
            name = f"plot_{index:02}.png"
            replace_file(folder / name, plot if isinstance(plot, bytes) else _png(plot))
            plots.append({"title": title, "file": name})
        content = {
            "format": _FORMAT,
            "system": self.system,
            "title": self.title,
            "synthetic": self.synthetic,
            "metrics": {name: _plain(value) for name, value in self.metrics.items()},
            "tables": [
                {"title": title, "columns": list(columns), "rows": [[_plain(cell) for cell in row] for row in rows]}
                for title, columns, rows in self.tables
            ],
            "plots": plots,
            "notes": list(self.notes),
        }
        path = folder / "report.json"
        replace_file(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Report":
        """Reads a saved report back; plots come as PNG bytes.

        Raises:
          FileNotFoundError: the folder holds no `report.json`, or a plot it names is gone.
          ValueError: `report.json` is no report.
        """
        folder = Path(folder)
        path = folder / "report.json"
        try:
            content = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON, got damaged text ({error})") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"{path}: expected a report of format {_FORMAT!r}")
        try:
            with understood(path):
                return cls(
                    system=content["system"],
                    title=content["title"],
                    metrics={name: _number(value) for name, value in content["metrics"].items()},
                    tables=tuple(map(_table, content["tables"])),
                    plots=tuple(
                        (plot["title"], inside(folder, plot["file"], f"{path}: plot").read_bytes())
                        for plot in content["plots"]
                    ),
                    notes=tuple(content["notes"]),
                    synthetic=content["synthetic"],
                )
        except KeyError as error:
            raise ValueError(f"{path}: expected a report with {error}") from error


def _table(table: Mapping[str, Any]) -> tuple[str, Sequence[str], Sequence[Sequence[Any]]]:
    return table["title"], tuple(table["columns"]), tuple(tuple(map(_number, row)) for row in table["rows"])


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _plain(value: Any) -> Any:
    """A JSON value; numbers that JSON lacks become the texts of `_NOT_FINITE`."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if getattr(value, "ndim", 0) or not hasattr(value, "__float__"):
        raise TypeError(f"a report holds numbers, text, booleans and None, got {value!r}")
    if np.issubdtype(getattr(value, "dtype", float), np.integer):
        return int(value)
    value = float(value)
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def _number(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _png(figure: Any) -> bytes:
    if not hasattr(figure, "savefig"):
        raise TypeError(f"a plot is a matplotlib Figure or PNG bytes, got {type(figure).__name__}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    return buffer.getvalue()
