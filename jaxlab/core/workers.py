"""The worker processes behind `core.tasks`: spawned on this machine and kept warm, or actors of a Ray cluster.

Both kinds of crew speak the same few words, so that one scheduler drives either:

    start() -> worker           it will report "ready", "died", or "unloadable": the function cannot be imported there
    send(worker, payload)       it will report "done" with the pickled value, "failed" with a traceback, or "died"
    poll(timeout_s)             -> [(worker, report, payload), ...], early when `wake()` is called
    kill(worker)                no report follows
    close(idle)                 ends all workers but the idle ones, which may be kept for later
"""

import atexit
import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from multiprocessing.connection import Connection, wait
from typing import Any

from jaxlab.core.errors import require

Report = tuple[Any, str, Any]

_START_LIMIT_S = 120.0


class Executor:
    """What runs inside a worker: one function, loaded once, applied to pickled items."""

    def load(self, function: bytes, path: list[str]) -> tuple[str, Any]:
        """Unpickles the function, importing from the caller's `sys.path` too."""
        sys.path.extend(entry for entry in path if entry not in sys.path)
        try:
            self.function = pickle.loads(function)
        except BaseException:
            return "unloadable", traceback.format_exc()
        return "ready", None

    def run(self, payload: bytes) -> tuple[str, Any]:
        """Applies the function; whatever it raises, `SystemExit` too, is told as text."""
        try:
            return "done", pickle.dumps(self.function(pickle.loads(payload)), protocol=5)
        except BaseException as error:
            error.__traceback__ = (
                error.__traceback__ and error.__traceback__.tb_next
            )  # this frame tells nobody anything
            return "failed", "".join(traceback.format_exception(error))


def _serve(connection: Connection) -> None:
    """A local worker's life. It leads a process group, so that what the function starts can be ended with it."""
    with contextlib.suppress(PermissionError):
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()
    executor = Executor()
    while True:
        try:
            word, arguments = connection.recv()
        except (EOFError, OSError):
            return
        answer = getattr(executor, word)(*arguments)
        try:
            connection.send(answer)
        except OSError:
            return


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)


class LocalWorker:
    """A spawned process and the pipe to it."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), name="jaxlab-worker")
        with _lock:
            # Work given to `tasks` is not JAX: a worker must never take a share of the accelerator.
            before = os.environ.get("JAX_PLATFORMS")
            os.environ["JAX_PLATFORMS"] = "cpu"
            try:
                self.process.start()
            finally:
                if before is None:
                    del os.environ["JAX_PLATFORMS"]
                else:
                    os.environ["JAX_PLATFORMS"] = before
            _alive.add(self)
        assert self.process.pid is not None
        self._pid = self.process.pid
        theirs.close()
        self.started = time.monotonic()

    def send(self, word: str, *arguments: Any) -> None:
        """Gives an order; a worker that is gone is noticed by the next poll."""
        with contextlib.suppress(OSError):
            self.connection.send((word, arguments))

    def end(self, grace_s: float = 0.0) -> str:
        """Ends it and what it started; returns how it ended, in words."""
        self.connection.close()
        if grace_s:
            self.process.join(grace_s)
        # The group first: joining frees the process id.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            if self.process.exitcode is None:
                self.process.kill()
        self.process.join()
        with _lock:
            _alive.discard(self)
        code = self.process.exitcode or 0
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


_lock = threading.RLock()
_warm: list[LocalWorker] = []
_alive: set[LocalWorker] = set()


def _forget() -> None:
    """In a forked child the workers are still the parent's."""
    _warm.clear()
    _alive.clear()


@atexit.register
def _end_all() -> None:
    with _lock:
        workers = list(_alive)
        _forget()
    for worker in workers:
        worker.connection.close()
    deadline = time.monotonic() + 1.0
    for worker in workers:
        worker.end(max(0.01, deadline - time.monotonic()))


os.register_at_fork(after_in_child=_forget)


class LocalCrew:
    """Workers on this machine."""

    hint = "a script that calls this must do it under `if __name__ == '__main__':`, for the workers import it"

    def __init__(self, function: bytes):
        self._load = (function, list(sys.path))
        self._workers: list[LocalWorker] = []
        self._loading: set[LocalWorker] = set()
        self._waker, self._awake = multiprocessing.Pipe()

    def start(self) -> LocalWorker:
        """Takes a warm worker, or spawns one."""
        worker = None
        with _lock:
            while _warm and worker is None:
                worker = _warm.pop()
                if not worker.process.is_alive():
                    worker.end()
                    worker = None
        worker = worker or LocalWorker()
        worker.started = time.monotonic()
        worker.send("load", *self._load)
        self._workers.append(worker)
        self._loading.add(worker)
        return worker

    def send(self, worker: LocalWorker, payload: bytes) -> None:
        """Runs the function on one pickled item."""
        worker.send("run", payload)

    def poll(self, timeout_s: float) -> list[Report]:
        """The workers' reports, waiting for the first."""
        ready = wait([*(worker.connection for worker in self._workers), self._awake], min(timeout_s, 1.0))
        if self._awake in ready:
            while self._awake.poll():
                self._awake.recv_bytes()
        reports = []
        for worker in list(self._workers):
            if worker.connection in ready:
                try:
                    word, payload = worker.connection.recv()
                except (EOFError, OSError):
                    word, payload = "died", self._end(worker)
                self._loading.discard(worker)
                reports.append((worker, word, payload))
            elif not worker.process.is_alive():  # a grandchild may hold its pipe open
                reports.append((worker, "died", self._end(worker)))
            elif worker in self._loading and time.monotonic() - worker.started > _START_LIMIT_S:
                self._end(worker)
                reports.append((worker, "died", f"not ready after {_START_LIMIT_S:g} s"))
        return reports

    def wake(self) -> None:
        """Makes `poll` return, from any thread."""
        with contextlib.suppress(OSError):
            self._waker.send_bytes(b"!")

    def kill(self, worker: LocalWorker) -> None:
        """Ends a worker in the middle of its work."""
        self._end(worker)

    def close(self, idle: Iterable[LocalWorker]) -> None:
        """Keeps the idle workers warm for the next call and kills the others."""
        kept = set(idle)
        for worker in list(self._workers):
            if worker not in kept:
                self._end(worker)
        with _lock:
            _warm.extend(self._workers)
        self._workers.clear()
        self._waker.close()
        self._awake.close()

    def _end(self, worker: LocalWorker) -> str:
        self._workers.remove(worker)
        self._loading.discard(worker)
        return worker.end()


class RayCrew:
    """Actors of a Ray cluster, one CPU each. They end with the call, so that the cluster gets its CPUs back."""

    hint = "the cluster needs the Python version of this process"

    def __init__(self, function: Any, address: str):
        self._ray = require("ray", "ray")
        if not self._ray.is_initialized():
            self._ray.init(address=address, log_to_driver=False)
        # By value, so that the cluster needs this package only if the function does. Ray's pickler also takes functions
        # of the main module along, which no worker could import.
        self._ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self._load = (self._ray.cloudpickle.dumps(function), list(sys.path))
        self._actor = self._ray.remote(Executor).options(num_cpus=1, max_restarts=0)
        self._workers: list[Any] = []
        self._pending: dict[Any, Any] = {}

    def cpus(self) -> int:
        """CPUs of the cluster."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def start(self) -> Any:
        """Asks the cluster for an actor; it is ready when the cluster has room."""
        worker = self._actor.remote()
        self._workers.append(worker)
        self._pending[worker.load.remote(*self._load)] = worker
        return worker

    def send(self, worker: Any, payload: bytes) -> None:
        """Runs the function on one pickled item."""
        self._pending[worker.run.remote(payload)] = worker

    def poll(self, timeout_s: float) -> list[Report]:
        """The actors' reports; Ray's waiting cannot be woken, so it is cut short instead."""
        timeout_s = min(timeout_s, 0.1)
        if not self._pending:
            time.sleep(min(timeout_s, 0.02))
            return []
        self._ray.wait(list(self._pending), num_returns=1, timeout=timeout_s)
        ready, _ = self._ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
        reports = []
        for reference in ready:
            worker = self._pending.pop(reference)
            try:
                word, payload = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                word, payload = "died", str(error).strip()
                self._end(worker)
            reports.append((worker, word, payload))
        return reports

    def wake(self) -> None:
        """Nothing to do: `poll` is never long."""

    def kill(self, worker: Any) -> None:
        """Ends an actor in the middle of its work."""
        self._end(worker)

    def close(self, idle: Iterable[Any]) -> None:
        """Ends all actors."""
        del idle
        for worker in list(self._workers):
            self._end(worker)

    def _end(self, worker: Any) -> None:
        self._workers.remove(worker)
        self._pending = {reference: other for reference, other in self._pending.items() if other is not worker}
        self._ray.kill(worker, no_restart=True)
