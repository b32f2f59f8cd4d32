from tests import two_processes
from tests.models import multiprocess_cases as cases


def test_one_process(tmp_path):
    cases.case_load_and_save_over_a_mesh(tmp_path)


def test_two_processes(tmp_path):
    two_processes.run(cases.__name__, tmp_path).check("case_load_and_save_over_a_mesh")
