"""Append-only results that survive a kill: one JSON value a line, a torn last line dropped on reading."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def append(path: str | os.PathLike, value: Any, *, sync: bool = False) -> None:
    """Adds one line. A torn line that a killed writer left at the end is cut off first.

    Args:
      path: the file; it and its folder are made when absent.
      value: anything `json.dumps` takes.
      sync: also wait until the line is on the disk (survives a power cut, not only a kill).
    """
    line = json.dumps(value).encode() + b"\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(handle, _whole(handle))
        os.lseek(handle, 0, os.SEEK_END)
        while line:  # a full disk or a signal may split the write
            line = line[os.write(handle, line) :]
        if sync:
            os.fsync(handle)
    finally:
        os.close(handle)


def read(path: str | os.PathLike) -> list[Any]:
    """All whole lines of a file, parsed; an absent file has none."""
    return list(iterate(path))


def iterate(path: str | os.PathLike) -> Iterator[Any]:
    """Like `read`, one line at a time.

    Raises:
      ValueError: a line that is not JSON, other than a torn last one; the message names file and line.
    """
    path = Path(path)
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: expected JSON, got {line[:80]!r}") from error
            yield value


def rewrite(path: str | os.PathLike, values: Iterable[Any]) -> None:
    """Replaces the file's lines; a reader sees the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        for value in values:
            file.write(json.dumps(value).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _whole(handle: int) -> int:
    """Length of the file up to its last line end, read backwards in blocks."""
    end = os.lseek(handle, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        block = os.pread(handle, end - start, start)
        position = block.rfind(b"\n")
        if position >= 0:
            return start + position + 1
        end = start
    return 0
