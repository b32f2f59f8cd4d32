import pytest

from tests import two_processes
from tests.rl import multiprocess_cases as cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("rl")
    cases.leave_one_devices_results(made)
    return made


@pytest.fixture(scope="module")
def outcomes(folder):
    return two_processes.run(cases.__name__, folder)


@pytest.mark.parametrize("name", two_processes.names(cases))
def test_one_process(name, folder):
    own = folder / f"one_{name}"
    own.mkdir()
    getattr(cases, name)(own)


@pytest.mark.parametrize("name", two_processes.names(cases))
def test_two_processes(name, outcomes):
    outcomes.check(name)
