"""Where a run keeps what it makes, and how a file of it is written."""

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


def replace_file(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file by one rename: a reader sees the old one or the new one. Its folder is made if it is not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)
