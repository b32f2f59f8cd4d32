"""ZeRO-1: where moments lie, and what a step with a sharded optimiser sends (its numbers: multiprocess_cases)."""

import dataclasses

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab import core
from jaxlab.core import plan as planning
from jaxlab.training import plan
from jaxlab.training.sharding import moment_sharding
from tests.training import toys

P = PartitionSpec
MODEL = dataclasses.replace(toys.MODEL, num_hidden_layers=1)


def _config(shard_optimizer):
    return toys.config("python-stdlib", model=MODEL, batch_size=8, shard_optimizer=shard_optimizer)


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((6, 16), P(), P(None, ("data", "node", "expert"))),
        ((16, 16), P(), P(("data", "node", "expert"))),  # the first of two that are equally large
        ((8, 6, 16), P(("node", "expert")), P(("node", "expert"), None, "data")),  # an expert: only `data` is unused
        ((8, 16), P("tensor"), P("tensor", ("data", "node", "expert"))),
        ((16, 4), P("tensor"), P(("tensor", "data", "node", "expert"))),  # 8 rows a device stay, over 8 devices
        ((12, 3), P(), P(("data", "node"))),  # 12 rows are no multiple of 8
        ((7, 3), P(), P()),
        ((), P(), P()),
        ((0, 8), P(), P(None, ("data", "node", "expert"))),
    ],
)
def test_moments_go_to_the_largest_dimension(shape, spec, expected):
    mesh = jax.sharding.AbstractMesh((2, 2, 2, 2), ("data", "node", "expert", "tensor"))
    assert moment_sharding(shape, NamedSharding(mesh, spec)).spec == expected


@pytest.mark.latest
def test_only_moments_are_sharded():
    """A device of eight holds an eighth of the moments and all parameters; no gradient is whole on any device."""
    target = planning.target("cpu", mesh={"data": 8})
    whole, sharded = (plan(_config(shard), target) for shard in (False, True))
    assert sharded.bytes["parameters"] == whole.bytes["parameters"]
    assert sharded.bytes["optimizer"] < whole.bytes["optimizer"] / 6  # what 8 does not divide stays whole
    assert sharded.bytes["temporaries"] < whole.bytes["temporaries"]
    gathered = sum(item.bytes * item.count for item in sharded.collectives if item.op == "all-gather")
    assert gathered >= 0.9 * whole.bytes["parameters"]


def test_gradients_are_reduce_scattered_on_a_gpu():
    """XLA turns the reduction of what each device updates a part of into a reduce-scatter; on a CPU it does not."""
    try:
        target = planning.target("h100", "1x1x8", {"data": 8})
    except core.MissingExtra as missing:
        pytest.skip(str(missing))
    made = plan(_config(True), target)
    sent = {}
    for item in made.collectives:
        sent[item.op] = sent.get(item.op, 0) + item.bytes * item.count
    assert sent["reduce-scatter"] > 100 * sent["all-reduce"]
