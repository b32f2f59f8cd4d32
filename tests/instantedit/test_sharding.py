"""Images and branches over eight devices of one process, and of two."""

import jax
import numpy as np

from jaxlab.core import make_mesh
from jaxlab.instantedit.edit import edit_program
from jaxlab.instantedit.sharding import edit_sharded
from tests import two_processes
from tests.instantedit import multiprocess_cases as cases

outcomes = two_processes.outcomes(cases)
test_one_process = two_processes.in_one(cases)
test_two_processes = two_processes.in_two(cases)


def test_a_device_holds_its_branches_only():
    """At most 0.4 of one device's temporaries, over (2, 4): at latents of 64 x 64, where they are activations."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(5, 2, 64, 64, 4)).astype(np.float32)
    features = rng.normal(size=(2, 64, 64, 4)).astype(np.float32)
    prompts = jax.tree.map(lambda leaf: leaf[:2], cases.given()[2])
    given = (cases.NETWORK, z, features, prompts, cases.KNOBS)
    one = edit_program.lower(*given).compile().memory_analysis().temp_size_in_bytes
    mesh = make_mesh({"data": 2, "view": 4})
    each = edit_sharded.lower(*given, mesh=mesh).compile().memory_analysis().temp_size_in_bytes
    assert each <= 0.4 * one
