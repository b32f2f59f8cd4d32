"""Every multi-device case twice: on 8 devices of one process, and on 2 processes x 4 devices, one launch for all.

A module of cases has functions `case_*(folder)`, which run the same in every process and may use collectives:

    # tests/core/multiprocess_cases.py
    def case_sum(folder): ...

    # tests/core/test_multiprocess.py
    from tests import two_processes
    from tests.core import multiprocess_cases as cases

    outcomes = two_processes.outcomes(cases)
    test_one_process = two_processes.in_one(cases)
    test_two_processes = two_processes.in_two(cases)
"""

import dataclasses
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_ROOT = Path(__file__).resolve().parents[1]


def names(module: ModuleType) -> list[str]:
    """The module's cases, in the order they are written."""
    return [name for name in vars(module) if name.startswith("case_")]


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What a launch gave: process index -> case -> None if it passed, else the traceback."""

    processes: tuple[dict[str, str | None], ...]
    output: str

    def check(self, name: str) -> None:
        """Fails as the case failed in one of the processes."""
        for index, cases in enumerate(self.processes):
            if name not in cases:
                pytest.fail(f"{name} was not reached in process {index}:\n{self.output[-4000:]}")
            if cases[name] is not None:
                pytest.fail(f"{name} failed in process {index}:\n{cases[name]}")


def run(module: str, folder: Path, *, processes: int = 2, devices: int = 4, timeout_s: float = 240.0) -> Outcomes:
    """Runs all cases of a module in one launch; each gets its own folder, shared by the processes."""
    from jaxlab.core import distributed, jsonl

    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    results = distributed.run_local(
        [sys.executable, "-m", __name__, module, str(folder)],
        processes,
        devices,
        timeout_s=timeout_s,
        env={"PYTHONPATH": path},
    )
    return Outcomes(
        tuple(dict(jsonl.read(folder / f"outcomes.{index}.jsonl")) for index in range(processes)),
        "\n".join(f"[process {i}] exit {r.returncode}\n{r.stdout}\n{r.stderr}" for i, r in enumerate(results)),
    )


def outcomes(module: ModuleType, *, before: Callable[[Path], None] = lambda folder: None) -> Any:
    """The fixture `outcomes` of a file of tests: the launch that `in_two` asks; `before` sees its folder first."""

    @pytest.fixture(scope="module", name="outcomes")
    def launched(tmp_path_factory):
        folder = tmp_path_factory.mktemp("two")
        before(folder)
        return run(module.__name__, folder)

    return launched


def in_one(module: ModuleType) -> Callable[..., None]:
    """The test of every case in this process."""

    @pytest.mark.parametrize("name", names(module))
    def test_one_process(name, tmp_path):
        getattr(module, name)(tmp_path)

    return test_one_process


def in_two(module: ModuleType) -> Callable[..., None]:
    """The test of every case in the launch of the fixture `outcomes`."""

    @pytest.mark.parametrize("name", names(module))
    def test_two_processes(name, outcomes):
        outcomes.check(name)

    return test_two_processes


def _main(module: str, folder: str) -> None:
    import jaxtyping

    import tests.typechecker  # noqa: F401  the hook finds it by name

    jaxtyping.install_import_hook(["jaxlab", "pallas_kernels"], "tests.typechecker.check")  # as tests/conftest.py does
    from jaxlab.core import distributed, jsonl

    distributed.initialize()
    import jax

    cases = importlib.import_module(module)
    for name in names(cases):
        case_folder = Path(folder, name)
        case_folder.mkdir(exist_ok=True)
        try:
            getattr(cases, name)(case_folder)
            outcome = None
        except BaseException:
            outcome = traceback.format_exc()
        jsonl.append(Path(folder, f"outcomes.{jax.process_index()}.jsonl"), [name, outcome])
        if outcome is not None:
            os._exit(1)  # the other process may wait in a collective; the launcher ends it


if __name__ == "__main__":
    _main(*sys.argv[1:])
