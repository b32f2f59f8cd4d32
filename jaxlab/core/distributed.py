"""Several processes: joining a cluster, and a cluster of local processes for tests and terminals."""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import IO, Any

import jax

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def initialize() -> None:
    """Joins the cluster this process was started in; alone, or called again, it does nothing.

    A cluster is what JAX detects (SLURM, Open MPI, Kubernetes, TPU pods), or the environment variables
    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`, which `run_local` and `launch` set. Call it
    before anything asks JAX for devices.
    """
    if jax.distributed.is_initialized():
        return
    if all(name in os.environ for name in (_ADDRESS, _COUNT, _INDEX)):
        jax.distributed.initialize(
            os.environ[_ADDRESS], num_processes=int(os.environ[_COUNT]), process_id=int(os.environ[_INDEX])
        )
        return
    from jax._src import clusters  # the only place that tells "alone" from "misconfigured"

    if any(
        cluster.is_env_present() for cluster in clusters.ClusterEnv._cluster_types if not cluster.opt_in_only_method
    ):
        jax.distributed.initialize()


def is_main() -> bool:
    """Whether this process writes the logs, reports and bars: process zero, or the only one.

    It starts no backend: before `initialize` a process of `run_local` or `launch` knows its index from the environment.
    """
    from jax._src import distributed as state

    if jax.distributed.is_initialized():
        return state.global_state.process_id == 0
    return int(os.environ.get(_INDEX, 0)) == 0


def run_local(
    argv: Sequence[str | os.PathLike],
    processes: int = 2,
    devices: int = 4,
    *,
    timeout_s: float = 300.0,
    env: Mapping[str, str] | None = None,
) -> list[CompletedProcess]:
    """Runs a program as `processes` local processes with `devices` CPU devices each, which `initialize` joins.

    When one process fails the others, which would wait for it for ever, are killed.

    Args:
      argv: the command; one that begins with a Python file or an option is given to this interpreter.
      processes: how many processes.
      devices: CPU devices a process.
      timeout_s: after this time all are killed.
      env: more environment variables.

    Returns:
      One result a process, by process index, with `returncode`, and `stdout` and `stderr` as text. A killed one has
      the negative signal number as return code.

    Raises:
      subprocess.TimeoutExpired: the time is over; what the processes wrote is in its `output` and `stderr`.
      ValueError: no command, or fewer than one process or device.
      OSError: there is no such command.
    """
    command, shared = _prepared(argv, processes, devices, env)
    with tempfile.TemporaryDirectory(prefix="jaxlab-run-") as folder:
        running = []
        try:
            for index in range(processes):
                # Files, not pipes: nobody reads while all run, and a full pipe would stop a process.
                with open(Path(folder, f"{index}.out"), "wb") as out, open(Path(folder, f"{index}.err"), "wb") as err:
                    running.append(
                        subprocess.Popen(
                            command,
                            stdin=subprocess.DEVNULL,
                            stdout=out,
                            stderr=err,
                            env={**shared, _INDEX: str(index)},
                            start_new_session=True,  # so that what a process started dies with it
                        )
                    )
            in_time, _ = _wait(running, timeout_s)
        finally:
            for process in running:
                _kill(process)
        texts = [
            [Path(folder, f"{index}.{kind}").read_text(errors="replace") for kind in ("out", "err")]
            for index in range(processes)
        ]
    if not in_time:
        joined = ["\n".join(f"[process {index}]\n{text[kind]}" for index, text in enumerate(texts)) for kind in (0, 1)]
        raise subprocess.TimeoutExpired(command, timeout_s, output=joined[0], stderr=joined[1])
    return [CompletedProcess(command, process.returncode, *text) for process, text in zip(running, texts)]


def launch(
    argv: Sequence[str | os.PathLike],
    processes: int = 2,
    devices: int = 4,
    *,
    env: Mapping[str, str] | None = None,
) -> int:
    """`run_local` for a terminal: process 0 has it, what others write comes behind their index.

    When one process fails, the others get two seconds for an end of their own and are killed then. An interrupt goes
    to all of them.

    Args:
      argv: the command; one that begins with a Python file or an option is given to this interpreter.
      processes: how many processes.
      devices: CPU devices a process.
      env: more environment variables.

    Returns:
      0, or the return code of the process that failed first.

    Raises:
      ValueError: no command, or fewer than one process or device.
      OSError: there is no such command.
    """
    command, shared = _prepared(argv, processes, devices, env)
    others = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    running: list[subprocess.Popen] = []
    readers = []
    try:
        for index in range(processes):
            streams: dict[str, Any] = others if index else {}
            process = subprocess.Popen(command, env={**shared, _INDEX: str(index)}, start_new_session=True, **streams)
            running.append(process)
            if index:
                readers.append(threading.Thread(target=_echo, args=(process.stdout, index), daemon=True))
                readers[-1].start()
        try:
            _, first = _wait(running, math.inf)
        except KeyboardInterrupt:
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGINT)
            _wait(running, 30.0)
            raise
    finally:
        for process in running:
            _kill(process)
        for reader in readers:
            reader.join(timeout=5.0)
    if first is None:
        return 0
    code = running[first].returncode
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    print(f"process {first} of {processes} {ended}; the others were ended", file=sys.stderr, flush=True)
    return code


def _echo(lines: IO[bytes], index: int) -> None:
    with lines:
        for line in lines:
            sys.stderr.write(f"[{index}] {line.decode(errors='replace')}")
            sys.stderr.flush()


def _prepared(
    argv: Sequence[str | os.PathLike], processes: int, devices: int, env: Mapping[str, str] | None
) -> tuple[list[str], dict[str, str]]:
    """The command, and the environment that all processes share."""
    for name, value in (("processes", processes), ("devices", devices)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    command = [os.fspath(part) for part in argv]
    if not command:
        raise ValueError("argv: expected a command, got nothing")
    if command[0].startswith("-") or command[0].endswith(".py"):
        command.insert(0, sys.executable)
    flags = [
        flag
        for flag in os.environ.get("XLA_FLAGS", "").split()
        if not flag.startswith("--xla_force_host_platform_device_count")
    ]
    return command, {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"]),
        _ADDRESS: f"localhost:{_free_port()}",
        _COUNT: str(processes),
        **(env or {}),
    }


def _wait(running: Sequence[subprocess.Popen], timeout_s: float) -> tuple[bool, int | None]:
    """Waits for all, or for the first failure and then a little for the others' own.

    Returns whether that came in time, and which failed first.
    """
    deadline = time.monotonic() + timeout_s
    first = None
    while True:
        codes = [process.poll() for process in running]
        ended = None not in codes
        if first is None:
            first = next((index for index, code in enumerate(codes) if code), None)
            deadline = deadline if first is None else min(deadline, time.monotonic() + 2.0)
        if ended or time.monotonic() > deadline:
            return ended or first is not None, first
        time.sleep(0.02)


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
