"""Counting XLA compilations, so that "compiles nothing new" is a test and not a hope."""

import contextlib
import threading
from collections.abc import Iterator

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"

_active: list["CompilationCount"] = []
_lock = threading.Lock()
_listening = False


class CompilationCount:
    """How many XLA programs were compiled, or fetched from the persistent cache, since counting began."""

    def __init__(self):
        self.count: int = 0

    def __repr__(self) -> str:
        return f"CompilationCount(count={self.count})"


@contextlib.contextmanager
def count_compilations() -> Iterator[CompilationCount]:
    """Counts the XLA programs made inside the block, by any thread.

    A program that comes out of the persistent compilation cache counts as well: whether code compiles must not depend
    on what an earlier run left on the disk. Blocks may be nested; the count stays readable after the block.

    Yields:
      An object whose int attribute `count` grows with each program.
    """
    global _listening
    counter = CompilationCount()
    with _lock:
        if not _listening:  # JAX offers no way to take one listener back, so one stays for good.
            jax.monitoring.register_event_duration_secs_listener(_on_duration)
            _listening = True
        _active.append(counter)
    try:
        yield counter
    finally:
        with _lock:
            _active[:] = [other for other in _active if other is not counter]


def _on_duration(event: str, duration_secs: float, **_: str | int) -> None:
    del duration_secs
    if event == _COMPILED:
        with _lock:
            for counter in _active:
                counter.count += 1
