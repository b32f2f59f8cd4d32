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
        end = _end_of_whole_lines(handle)
        if end != os.lseek(handle, 0, os.SEEK_END):
            os.ftruncate(handle, end)
            os.lseek(handle, end, os.SEEK_SET)
        while line:  # a signal may split the write
            line = line[os.write(handle, line) :]
        if sync:
            os.fsync(handle)
    finally:
        os.close(handle)


def read(path: str | os.PathLike) -> list[Any]:
    """All whole lines of a file, parsed; an absent file has none.

    Raises:
      ValueError: a line that is not JSON, other than a torn last one; the message names file and line.
    """
    return [value for _, value in locate(path)]


def locate(path: str | os.PathLike) -> Iterator[tuple[int, Any]]:
    """Like `read`, one at a time and each with its place in the file, for `read_at`."""
    path = Path(path)
    if not path.exists():
        return
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: expected JSON, got {line[:80]!r}") from error
            yield offset, value
            offset += len(line)


def read_at(path: str | os.PathLike, offset: int) -> Any:
    """The value whose line begins at `offset`."""
    with open(path, "rb") as file:
        file.seek(offset)
        return json.loads(file.readline())


def rewrite(path: str | os.PathLike, values: Iterable[Any]) -> None:
    """Replaces all lines, by one rename: a reader sees the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        for value in values:
            file.write(json.dumps(value).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _end_of_whole_lines(handle: int) -> int:
    """Length of the file up to its last line end, looked for backwards."""
    end = os.lseek(handle, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(handle, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
