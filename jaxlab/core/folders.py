"""Where a run keeps what it makes."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def kept_or_temporary(folder: str | os.PathLike | None) -> Iterator[Path]:
    """The folder given; for None a new one, which is gone afterwards."""
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)
