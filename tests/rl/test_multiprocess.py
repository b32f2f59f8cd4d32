"""In one process eight devices share the steps of a smaller policy, in test_loop.py."""

import pytest

from tests import two_processes
from tests.rl import multiprocess_cases as cases


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    cases.leave_one_devices_results(folder)
    return two_processes.run(cases.__name__, folder)


@pytest.mark.parametrize("name", two_processes.names(cases))
def test_two_processes(name, outcomes):
    outcomes.check(name)
