"""Bounds on CPU time that hold inside a process that has run a thousand other tests."""

import contextlib
import gc
import time
from collections.abc import Iterator


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails where the block takes more CPU seconds of its own thread.

    Other tests' threads are not counted, and the garbage collector waits: collecting all that a long suite keeps
    takes seconds.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        started = time.thread_time()
        yield
        took = time.thread_time() - started
    finally:
        if collects:
            gc.enable()
    assert took < seconds, f"took {took:.2f} s of CPU time, {seconds} s were granted"
