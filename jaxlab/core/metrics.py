"""Numbers over steps: JSON lines for programs, TensorBoard for eyes."""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.core import distributed, jsonl


class MetricsLogger:
    """Writes `metrics.jsonl` and TensorBoard events into a folder; a context manager.

    Each call of `log` is one line `{"step": ..., "time": seconds since 1970, name: value, ...}`, complete on the disk
    when `log` returns. Only the main process writes.

    A run that was killed and resumed at its last checkpoint logs some steps again. The first `log` therefore takes out
    the lines that it supersedes: those of later steps, and those of the same step with a name in common.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.path = self.folder / "metrics.jsonl"
        self._main = distributed.is_main()
        self._writer: Any = None
        self._resumed = False

    def log(self, step: int | np.integer, values: Mapping[str, Any]) -> None:
        """Adds the values of one step.

        Args:
          step: the training step.
          values: name -> number: anything `float` takes, JAX scalars too (which are waited for).
        """
        for name in ("step", "time"):
            if name in values:
                raise ValueError(f"values: the name {name!r} is taken by the logger")
        if not self._main:
            return
        step, numbers = int(step), {name: float(value) for name, value in values.items()}
        if not self._resumed:
            self._supersede(step, set(numbers))
        jsonl.append(self.path, {"step": step, "time": time.time(), **numbers})
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        """Flushes the TensorBoard events; the lines are on the disk already. Nothing may be logged after it."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _supersede(self, step: int, names: set[str]) -> None:
        rows = jsonl.read(self.path)
        kept = [row for row in rows if row["step"] < step or (row["step"] == step and not names & row.keys())]
        if len(kept) < len(rows):
            jsonl.rewrite(self.path, kept)
        self._writer = _summary_writer()(str(self.folder), purge_step=step if len(kept) < len(rows) else None)
        self._resumed = True


def _summary_writer() -> Any:
    """The writer of tensorboardX. It would import torch where it can, for drawings that nobody asks for here."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # pyrefly: ignore  # makes `import torch` an ImportError
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter
