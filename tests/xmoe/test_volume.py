import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.xmoe.config import MoEConfig, Topology
from jaxlab.xmoe.volume import dispatch_volume, redundancy_rate, uniform_redundancy_rate
from tests.oracles import dispatch_volume as oracle

EIGHT = Topology(8, 4)


def layer(experts=16, k=4, **fields):
    return MoEConfig(num_experts=experts, top_k=k, hidden_size=32, ffn_size=16, **fields)


def uniform(rng, devices, tokens, experts, k):
    """k distinct experts a token."""
    return np.argsort(rng.random((devices, tokens, experts)), axis=-1)[..., :k].astype(np.int32)


def rows(volume):
    return volume.inter_rows, volume.intra_rows


@pytest.fixture(scope="module")
def choices():
    rng = np.random.default_rng(0)
    return uniform(rng, 8, 25, 16, 4), rng.random((8, 25, 4)) < 0.8


@pytest.mark.latest
@pytest.mark.parametrize("masked", [False, True])
def test_rows_are_those_counted_one_by_one(choices, masked):
    experts, keep = choices
    mask = keep if masked else np.ones_like(keep)
    given = jnp.asarray(keep) if masked else None
    moved = dispatch_volume(jnp.asarray(experts), layer(pilot="first"), EIGHT, keep=given)
    assert rows(moved["pft"]) == oracle.pft(experts, mask, 16, 4)
    first = oracle.rbd(experts, mask, 16, 4, lambda source, node, targets: targets[0])
    assert rows(moved["rbd"]) == first
    rail = dispatch_volume(experts, layer(pilot="rail"), EIGHT, keep=given)["rbd"]
    assert rows(rail) == oracle.rbd(experts, mask, 16, 4, lambda source, node, targets: node * 4 + source % 4)
    assert rail.inter_rows == first[0]
    assert rail.intra_rows > first[1]


def test_random_pilots_are_counted_in_expectation(choices):
    experts, keep = choices
    rng = np.random.default_rng(1)
    draws = [
        oracle.rbd(experts, keep, 16, 4, lambda source, node, targets: targets[rng.integers(len(targets))])
        for _ in range(60)
    ]
    moved = dispatch_volume(experts, layer(), EIGHT, keep=keep)["rbd"]
    assert {inter for inter, _ in draws} == {moved.inter_rows}
    intra = np.array([each for _, each in draws])
    assert abs(moved.intra_rows - intra.mean()) < 4 * intra.std() / 60**0.5


def test_padded_moves_every_slot_of_every_expert(choices):
    experts, _ = choices
    capacity = 8  # ceil(25 / 16 * 1.25 * 4)
    moved = dispatch_volume(experts, layer(drop_policy="probs"), EIGHT, itemsize=4)["padded"]
    assert rows(moved) == (8 * 4 * 2 * capacity, 8 * 3 * 2 * capacity)
    assert moved.inter_bytes == moved.inter_rows * 32 * 4
    assert moved.intra_bytes == moved.intra_rows * 32 * 4
    dropless = dispatch_volume(experts, layer(), EIGHT)["padded"]
    assert rows(dropless) == (8 * 4 * 2 * 25, 8 * 3 * 2 * 25)


def test_one_node_and_one_device_cross_nothing(choices):
    experts, _ = choices
    moved = dispatch_volume(experts, layer(pilot="first"), Topology(8, 8))
    assert moved["rbd"].inter_rows == moved["pft"].inter_rows == moved["padded"].inter_rows == 0
    alone = dispatch_volume(experts[:1], layer(), Topology(1, 1))
    assert all(volume == (0, 0, 0, 0) for volume in alone.values())
    lone_devices = dispatch_volume(experts, layer(pilot="first"), Topology(8, 1))
    assert lone_devices["rbd"].intra_rows == 0
    empty = dispatch_volume(np.zeros((8, 0, 4), np.int32), layer(), EIGHT)
    assert rows(empty["rbd"]) == (0, 0)


def test_redundancy_counts_tokens_that_go_to_a_node_again(choices):
    experts, keep = choices
    for nodes in (1, 2, 4, 16):
        expected = 1 - oracle.distinct(experts, keep, 16, nodes) / keep.sum()
        assert redundancy_rate(experts, num_experts=16, num_nodes=nodes, keep=keep) == pytest.approx(
            expected, abs=1e-12
        )
    assert redundancy_rate(experts, num_experts=16, num_nodes=4, keep=np.zeros_like(keep)) == 0.0
    assert redundancy_rate(experts[0], num_experts=16, num_nodes=1) == 0.75


@pytest.mark.parametrize(
    ("experts", "k", "percent"),
    [(256, 8, (75.1, 54.8, 33.8, 18.5)), (128, 6, (67.1, 44.7, 25.5, 12.9)), (64, 6, (67.1, 44.3, 24.4, 11.4))],
)
def test_closed_form_gives_the_papers_table(experts, k, percent):
    rates = [100 * uniform_redundancy_rate(experts, k, nodes) for nodes in (2, 4, 8, 16)]
    np.testing.assert_allclose(rates, percent, atol=0.06)  # 44.245 stands there as 44.3
    assert uniform_redundancy_rate(experts, k, 1) == pytest.approx(1 - 1 / k)


def test_uniform_routing_has_the_closed_forms_redundancy():
    experts = uniform(np.random.default_rng(2), 32, 128, 256, 8)
    rate = redundancy_rate(experts, num_experts=256, num_nodes=4)
    assert 100 * rate == pytest.approx(54.8, abs=1)
    moved = dispatch_volume(experts, layer(256, 8), Topology(32, 8))
    assert 1 - moved["rbd"].inter_rows / moved["pft"].inter_rows == pytest.approx(rate, abs=0.01)


def test_bad_inputs_are_named(choices, unchecked):
    experts, keep = choices
    with pytest.raises(ValueError, match=r"expert_ids must be \[W=4, S, k\], got shape \(8, 25, 4\)"):
        dispatch_volume(experts, layer(), Topology(4, 4))
    with pytest.raises(ValueError, match="18 experts on 8 devices"):
        dispatch_volume(experts, layer(18), EIGHT)
    with pytest.raises(ValueError, match="keep must have the shape"):
        dispatch_volume(experts, layer(), EIGHT, keep=keep[0])
    with pytest.raises(ValueError, match=r"in 0\.\.7"):
        redundancy_rate(experts, num_experts=8, num_nodes=2)
    with pytest.raises(TypeError, match="integers"):
        redundancy_rate(experts * 1.0, num_experts=16, num_nodes=2)
    with pytest.raises(ValueError, match="16 experts, 3 nodes"):
        uniform_redundancy_rate(16, 4, 3)
    with pytest.raises(ValueError, match=r"1\.\.num_experts=16, got 17"):
        uniform_redundancy_rate(16, 17, 2)
