"""Scores over eight devices of one process, and of two."""

import pytest

from tests import two_processes
from tests.flexgaussian import multiprocess_cases as cases


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return two_processes.run(cases.__name__, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", two_processes.names(cases))
def test_one_process(name, tmp_path):
    getattr(cases, name)(tmp_path)


@pytest.mark.parametrize("name", two_processes.names(cases))
def test_two_processes(name, outcomes):
    outcomes.check(name)
