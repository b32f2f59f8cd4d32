import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.core import make_mesh, plan
from jaxlab.megafold.modules.pair import PairUpdates
from jaxlab.megafold.config import Kernels
from jaxlab.megafold.sharding import pair_sharded, spread
from tests import two_processes
from tests.megafold import multiprocess_cases as cases
from tests.megafold.multiprocess_cases import CHANNELS, DEPTH, DEVICES, HEADS, HIDDEN, PROBLEMS, TOKENS, WIDTH


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.latest] * (name == "ending")) for name in PROBLEMS])
def test_as_on_one_device(name):
    cases.check(name)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return two_processes.run(cases.__name__, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", two_processes.names(cases))
def test_two_processes(name, outcomes):
    outcomes.check(name)
