from tests import two_processes
from tests.models import decoder_mesh_cases as cases

outcomes = two_processes.outcomes(cases)
test_one_process = two_processes.in_one(cases)
test_two_processes = two_processes.in_two(cases)
