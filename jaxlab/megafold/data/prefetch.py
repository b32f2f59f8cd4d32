"""The next batches, made on a background thread while the present one is trained on."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterates over `source` a few items ahead; a context manager that ends its thread.

    Example:
        source = (make_batch([crop(cache.get(path), key, max_tokens=64)], config, key) for path, key in work)
        with Prefetch(source) as batches:
            for batch in batches:
                state, metrics = train_step(state, batch, key)

    What the source raises, and its end, come to the consumer in the source's order.

    Args:
      source: is iterated over on the thread alone.
      depth: how many items are kept ready.

    Raises:
      ValueError: a depth below 1.
    """

    def __init__(self, source: Iterable[T], depth: int = 2):
        if depth < 1:
            raise ValueError(f"depth: expected at least 1, got {depth}")
        self._ready: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._work, args=(source,), daemon=True, name="prefetch")
        self._thread.start()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        kind, value = self._ready.get()
        if kind == "item":
            return value  # pyrefly: ignore[bad-return]  # an item is a T
        self._ended = True
        self._thread.join()
        if isinstance(value, BaseException):
            raise value
        raise StopIteration

    def close(self) -> None:
        """Ends the thread once the item it is making is made; nothing more comes. May be called again."""
        self._closed.set()
        self._ended = True
        while self._thread.is_alive():
            try:  # make room for the thread that waits for it
                self._ready.get(timeout=0.01)
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def _work(self, source: Iterable[T]) -> None:
        try:
            for item in source:
                self._ready.put(("item", item))
                if self._closed.is_set():
                    return
            self._ready.put(("end", None))
        except BaseException as error:  # raised again where the item was expected
            self._ready.put(("error", error))
