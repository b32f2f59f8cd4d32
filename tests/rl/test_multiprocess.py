"""In one process eight devices share the steps of a smaller policy, in test_loop.py."""

from tests import two_processes
from tests.rl import multiprocess_cases as cases

outcomes = two_processes.outcomes(cases, before=cases.leave_one_devices_results)
test_two_processes = two_processes.in_two(cases)
