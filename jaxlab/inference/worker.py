"""A worker in a process of its own: `WorkerProcess` is the caller's end, `python -m jaxlab.inference.worker` the other.

The two talk over a pipe that only they hold, so its messages are pickled. The worker reads orders on a thread, tells
that it lives on another, and computes on its main thread. When the pipe ends, or its parent is no longer its parent, it
ends too, in the middle of whatever it does.
"""

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jaxlab.inference.serving import EngineConfig

_BEAT_S = 0.25


@dataclasses.dataclass(frozen=True)
class WorkerSettings:
    """What a worker process needs to know.

    Attributes:
        source: of the model, as `load_pretrained` takes it.
        config: of its engine.
        dtype: of the weights.
        transfer: a backend of `open_transfer`.
        token: the secret of this run's transfers.
        host: where its transfers listen.
        transfer_timeout_s: limit of one transfer.
        warmup: whether it compiles everything before it is ready.
    """

    source: str
    config: EngineConfig
    dtype: str
    transfer: str
    token: bytes = dataclasses.field(repr=False)
    host: str
    transfer_timeout_s: float
    warmup: bool


class WorkerProcess:
    """The caller's end of a worker process.

    Args:
        mode: "prefill" or "decode".
        settings: of the worker.
        deliver: called as `deliver(self, event, *arguments)` by a thread of its own with all that the worker tells: the
            events of its role, "ready" with the model's config, "failed" with why it cannot be, "answer" with an
            order's number and result, and at last "died" with how, in words.
        env: more environment variables.
    """

    def __init__(
        self,
        mode: str,
        settings: WorkerSettings,
        deliver: Callable[..., None],
        env: Mapping[str, str] | None = None,
    ):
        self._deliver = deliver
        self._orders: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._connection, theirs = multiprocessing.Pipe()
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the caller's to handle
                env={**os.environ, "PYTHONPATH": path, **(env or {})},
            )
        self.pid: int = self._process.pid
        self.heard_at = time.monotonic()
        self._orders.put((mode, settings, os.getpid()))
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._listen, self._speak)]
        for thread in self._threads:
            thread.start()

    def order(self, word: str, *arguments: Any) -> None:
        """Tells the worker to call `word`; never waits."""
        self._orders.put((word, *arguments))

    def ask(self, number: int, method: str, *arguments: Any) -> None:
        """Has a method of its engine called; the "answer" comes with the number."""
        self.order("ask", number, method, *arguments)

    def kill(self) -> None:
        """Ends it in the middle of its work; "died" will be told."""
        if self._process.returncode is None:  # afterwards the number may be another's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def close(self, grace_s: float = 5.0) -> None:
        """Ends it, by force when it has not ended by itself in time."""
        self.order("close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        self.kill()
        self._process.wait()
        self._orders.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(5.0)
        self._connection.close()

    def _listen(self) -> None:
        while True:
            try:
                event = self._connection.recv()
            except (EOFError, OSError):
                break
            self.heard_at = time.monotonic()
            if event[0] != "beat":
                self._deliver(self, *event)
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._deliver(self, "died", how)

    def _speak(self) -> None:
        while (order := self._orders.get()) is not None:
            with contextlib.suppress(OSError):  # that it is gone is for `_listen` to notice
                self._connection.send(order)


def main(handle: int) -> None:
    """The life of a worker process.

    Args:
        handle: file descriptor of its end of the pipe.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(handle)
    lock = threading.Lock()

    def emit(*event: Any) -> None:
        try:
            with lock:
                connection.send(event)
        except OSError:
            os._exit(1)

    mode, settings, parent = connection.recv()
    threading.Thread(target=_beat, args=(emit, parent), daemon=True).start()
    orders: collections.deque[tuple[Any, ...]] = collections.deque()
    awake = threading.Event()
    threading.Thread(target=_read, args=(connection, orders, awake), daemon=True).start()
    try:
        worker = _make(mode, settings, emit, awake.set)
    except Exception as error:
        emit("failed", _portable(error))
        os._exit(1)
    worker.tell_stats()
    emit("ready", worker.engine.model.config)
    try:
        _live(worker, orders, awake)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # JAX and the fetching threads would take their time


def _live(worker: Any, orders: collections.deque, awake: threading.Event) -> None:
    while True:
        idle_s = worker.idle_s
        if idle_s > 0:
            awake.wait(None if idle_s == float("inf") else idle_s)
        awake.clear()
        while orders:
            word, *arguments = orders.popleft()
            if word == "close":
                return
            if word == "ask":
                worker.emit("answer", arguments[0], _answer(worker.engine, *arguments[1:]))
                worker.tell_stats()
            else:
                getattr(worker, word)(*arguments)
        worker.step()


def _beat(emit: Callable[..., None], parent: int) -> None:
    while os.getppid() == parent:
        emit("beat")
        time.sleep(_BEAT_S)
    os._exit(1)


def _read(connection: Connection, orders: collections.deque, awake: threading.Event) -> None:
    while True:
        try:
            orders.append(connection.recv())
        except (EOFError, OSError):
            os._exit(1)
        awake.set()


def _make(mode: str, settings: WorkerSettings, emit: Callable[..., None], wake: Callable[[], None]) -> Any:
    from jaxlab.inference.engine import Engine
    from jaxlab.inference.roles import DecodeWorker, PrefillWorker
    from jaxlab.inference.transfer import open_transfer

    limit = settings.transfer_timeout_s
    transfer = open_transfer(settings.transfer, token=settings.token, host=settings.host, timeout_s=limit)
    engine = Engine.from_pretrained(settings.source, settings.config, dtype=settings.dtype)
    if settings.warmup:
        engine.warmup()
    if mode == "prefill":
        return PrefillWorker(engine, transfer, emit)
    return DecodeWorker(engine, transfer, emit, wake=wake, timeout_s=limit)


def _answer(engine: Any, method: str, *arguments: Any) -> Any:
    try:
        return getattr(engine, method)(*arguments)
    except Exception as error:
        return _portable(error)


def _portable(error: Exception) -> Exception:
    """The error as it is if the other process can read it, else its traceback."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


if __name__ == "__main__":
    main(int(sys.argv[1]))
