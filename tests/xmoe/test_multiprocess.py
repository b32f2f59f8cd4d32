"""In one process the same modes, and all others, run in test_expert_parallel.py."""

from tests import two_processes
from tests.xmoe import multiprocess_cases as cases

outcomes = two_processes.outcomes(cases)
test_two_processes = two_processes.in_two(cases)
