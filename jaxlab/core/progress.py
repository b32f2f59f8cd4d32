"""One progress bar for everything that takes longer than two seconds."""

import functools
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")

_PATIENCE_S = 2.0


def progress(iterable: Iterable[T], label: str, total: float | None = None) -> Iterator[T]:
    """Passes `iterable` on, showing count, rate and remaining time on the error stream.

    The bar appears when two seconds have passed, only on a terminal, and only in the main process.

    Args:
      iterable: what to pass on, unchanged.
      label: what is being done, a few words.
      total: how many items there will be; default `len(iterable)` where it has one, else unknown.
    """
    if not sys.stderr.isatty():
        yield from iterable
        return
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    from jaxlab.core import distributed

    bar = task = None
    started = time.monotonic()
    try:
        for done, item in enumerate(iterable):
            if bar is None and time.monotonic() - started > _PATIENCE_S and distributed.is_main():
                bar = _bar()
                task = bar.add_task(label, total=total, rate="", left="")
                bar.start()
            if bar is not None:
                seconds = time.monotonic() - started
                left = _clock((total - done) * seconds / done) if total and done else "--:--"
                bar.update(task, completed=done, rate=f"{done / seconds:.3g}/s", left=left)
            yield item
        if bar is not None:
            bar.update(task, completed=done + 1, left=_clock(0))
    finally:
        if bar is not None:
            bar.stop()


@functools.cache
def _console() -> Any:
    """One console for all bars: a bar inside another's loop is then drawn below it."""
    from rich.console import Console

    return Console(stderr=True)


def _bar() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left {task.fields[left]}"),
        console=_console(),
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
