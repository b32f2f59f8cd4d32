import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jaxlab.core import make_mesh
from jaxlab.xmoe import MoEConfig, Routing, Topology, build_pft, rbd_combine, rbd_dispatch, rbd_plan
from tests.oracles import expert_parallel as oracle
from tests.xmoe.multiprocess_cases import QUICK_TO_COMPILE

DEVICES, TOKENS, K, EXPERTS = 8, 6, 3, 16
CONFIG = MoEConfig(num_experts=EXPERTS, top_k=K, hidden_size=2, ffn_size=2, dispatch="rbd")
NODES = Topology(DEVICES, 4)
FEW = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def routing(ids, keep, capacity=None):
    zero = jnp.float32(0)
    weights = jnp.where(keep, 1.0 + ids % 5, 0.0).astype(jnp.float32)
    return Routing(jnp.asarray(ids, jnp.int32), weights, jnp.asarray(keep), zero, zero, capacity)


@st.composite
def choices(draw, devices=1):
    """[W,S,k] distinct experts a token, and what is kept of them; evenly spread, or all tokens the same few."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts = draw(st.sampled_from([EXPERTS, 4, K]))
    ids = np.stack([rng.permutation(experts)[:K] for _ in range(devices * TOKENS)]).reshape(devices, TOKENS, K)
    ids = (ids + draw(st.sampled_from([0, 3, EXPERTS - experts]))) % EXPERTS
    return ids.astype(np.int32), rng.random(ids.shape) < draw(st.sampled_from([1.0, 0.6, 0.0]))


@functools.partial(jax.jit, static_argnums=0)
def planned(config, ids, keep, key, device):
    return rbd_plan(build_pft(routing(ids, keep), config), config, NODES, key, device=device)


@pytest.mark.parametrize("pilot", ["random", "first", "rail"])
def test_plan(pilot):
    config = dataclasses.replace(CONFIG, pilot=pilot)

    @FEW
    @given(choices(), st.integers(0, 1000), st.integers(0, DEVICES - 1))
    def check(chosen, seed, device):
        ids, keep = chosen[0][0], chosen[1][0]
        plan = jax.tree.map(np.asarray, planned(config, ids, keep, jax.random.key(seed), device))
        groups = oracle.groups(ids, keep, EXPERTS // NODES.num_nodes)
        sizes, lists = np.zeros(DEVICES, int), np.zeros((DEVICES, EXPERTS // 2), int)
        heard, pilots = np.full(TOKENS * K, TOKENS * K), np.zeros(TOKENS * K, bool)
        lands = {}
        for (_, node), slots in groups.items():
            (pilot_slot,) = [slot for slot in slots if plan.is_pilot.reshape(-1)[slot]]
            assert pilot_slot == slots[0] or pilot == "random"
            heard[slots], pilots[pilot_slot] = pilot_slot, True
            landing = node * 4 + device % 4 if pilot == "rail" else ids.reshape(-1)[pilot_slot] // 2
            sizes[landing] += 1
            for slot in slots:
                lands[slot] = landing
                lists[landing, ids.reshape(-1)[slot] % (EXPERTS // 2)] += 1
        np.testing.assert_array_equal(plan.pilot_slot.reshape(-1), heard)
        np.testing.assert_array_equal(plan.is_pilot.reshape(-1), pilots)
        np.testing.assert_array_equal(plan.pilot_sizes, sizes)
        np.testing.assert_array_equal(plan.list_sizes, lists)
        # What is sent lies by landing device, what is handed on by landing device, expert, and slot.
        sent = plan.slots[: len(groups)]
        assert sorted(sent) == np.flatnonzero(pilots).tolist()
        assert np.all(plan.slots[len(groups) :] == TOKENS * K)
        assert np.all(np.diff([lands[slot] for slot in sent]) >= 0)
        assert [plan.pilot_row.reshape(-1)[slot] for slot in sent] == list(range(len(groups)))
        order = sorted(lands, key=lambda slot: (lands[slot], ids.reshape(-1)[slot], slot))
        assert [plan.place.reshape(-1)[slot] for slot in order] == list(range(len(order)))
        assert np.all(plan.place[~keep] == TOKENS * K)

    check()


@functools.cache
def delivered(pilot, axes, factor=None):
    """Tokens marked by their global index, through rbd_dispatch: what reaches the experts, and comes home unchanged."""
    config = dataclasses.replace(CONFIG, pilot=pilot, expert_axes=axes, node_size=4, recv_buffer_factor=factor)
    mesh = make_mesh({"expert": 8} if len(axes) == 1 else {"node": 2, "expert": 4})
    spec = PartitionSpec(axes)

    @functools.partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec)
    def run(ids, keep, key):
        x = (jax.lax.axis_index(axes) * TOKENS + jnp.arange(TOKENS, dtype=jnp.float32))[:, None] * jnp.ones((1, 2))
        chosen = routing(ids[0], keep[0])
        plan = rbd_plan(build_pft(chosen, config), config, NODES, key)
        sent = rbd_dispatch(x, chosen.weights, plan, config)
        y = rbd_combine(sent.rows, sent, plan, config)
        found = (sent.rows[:, 0], sent.group_sizes, sent.dropped_recv, sent.inter_node_rows, y[:, 0])
        return jax.tree.map(lambda leaf: leaf[None], found)

    return run


@pytest.mark.parametrize(
    ("pilot", "axes"),
    [("random", ("node", "expert")), ("first", ("expert",)), ("rail", ("node", "expert")), ("rail", ("expert",))],
)
def test_every_kept_slot_arrives_once(pilot, axes):
    @FEW
    @given(choices(DEVICES), st.integers(0, 1000))
    def check(chosen, seed):
        ids, keep = chosen
        rows, sizes, lost, abroad, home = map(np.asarray, delivered(pilot, axes)(ids, keep, jax.random.key(seed)))
        assert not np.any(lost)
        assert abroad.sum() == oracle.rows_abroad(ids, keep, EXPERTS, 2, distinct=True)
        want = oracle.arrivals(ids, keep, EXPERTS)
        for device in range(DEVICES):
            parts = np.split(rows[device], np.cumsum(sizes[device]))
            assert [sorted(part) for part in parts[:2]] == want[2 * device : 2 * device + 2]
        index = np.arange(DEVICES * TOKENS).reshape(DEVICES, TOKENS)
        np.testing.assert_allclose(home, index * np.where(keep, 1 + ids % 5, 0).sum(-1), rtol=1e-6)

    check()


@pytest.mark.parametrize(("pilot", "factor"), [("random", 0.5), ("rail", 0.5)])
def test_lost_slots_are_counted_exactly(pilot, factor):
    """What arrives and what is lost is all there was, whichever of the three buffers was too small."""

    @FEW
    @given(choices(DEVICES), st.integers(0, 1000))
    def check(chosen, seed):
        ids, keep = chosen
        run = delivered(pilot, ("node", "expert"), factor)
        rows, sizes, lost, _, home = map(np.asarray, run(ids, keep, jax.random.key(seed)))
        assert sizes.sum() + lost.sum() == keep.sum()
        want = oracle.arrivals(ids, keep, EXPERTS)
        weights = np.zeros(DEVICES * TOKENS)
        for device, at in np.ndindex(DEVICES, 2):
            part = np.split(rows[device], np.cumsum(sizes[device]))[at].astype(int)
            expert = 2 * device + at
            assert len(set(part)) == len(part)
            assert set(part) <= set(want[expert])
            weights[part] += 1 + expert % 5
        # Slots that found no room add nothing; the others all come home.
        np.testing.assert_allclose(home.reshape(-1), np.arange(DEVICES * TOKENS) * weights, rtol=1e-6)

    check()


def test_random_pilots():
    """The same key gives the same plan, another one another; each slot of a group is as likely."""
    ids = np.tile(np.array([[0, 5, 3]], np.int32), (TOKENS, 1))  # one node, three devices
    plans = [planned(CONFIG, ids, np.ones_like(ids, bool), jax.random.key(seed), 0) for seed in (7, 7, 8)]
    np.testing.assert_array_equal(plans[0].is_pilot, plans[1].is_pilot)
    assert np.any(np.asarray(plans[0].is_pilot) != np.asarray(plans[2].is_pilot))
    many = np.tile(ids, (1000, 1))
    counts = np.asarray(planned(CONFIG, many, np.ones_like(many, bool), jax.random.key(0), 0).is_pilot).sum(0)
    assert counts.sum() == 6000
    assert np.all(np.abs(counts - 2000) < 5 * np.sqrt(6000 * 2 / 9))


@pytest.mark.latest
@pytest.mark.parametrize(("nodes", "rate"), [(4, 54.8), (8, 33.8)])
def test_redundancy_of_uniform_routing(nodes, rate):
    """The paper's setting, E=256 and k=8: rows between nodes that RBD saves, counted from the plan."""
    tokens, config = 4096, MoEConfig(num_experts=256, top_k=8, hidden_size=1, ffn_size=1)
    ids = jax.lax.top_k(jax.random.uniform(jax.random.key(0), (tokens, 256)), 8)[1]

    @jax.jit
    def pilots(ids):
        buffer = build_pft(routing(ids, jnp.ones(ids.shape, bool)), config)
        return rbd_plan(buffer, config, Topology(nodes * 8, 8), jax.random.key(1)).pilot_sizes

    sizes = np.asarray(pilots(ids))
    distinct = np.unique(np.arange(tokens)[:, None] * nodes + np.asarray(ids) // (256 // nodes)).size
    assert sizes.sum() == distinct
    assert abs(100 * (1 - distinct / ids.size) - rate) < 1
    assert sizes.max() < 1.25 * sizes.mean()  # random pilots land evenly


def test_bad_inputs(unchecked):
    ids, keep = np.tile(np.arange(K, dtype=np.int32), (TOKENS, 1)), np.ones((TOKENS, K), bool)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="pilot='random' needs a key, got None"):
        planned(CONFIG, ids, keep, None, 0)
    with pytest.raises(ValueError, match="num_experts must be a multiple of num_devices=8, got 12"):
        planned(dataclasses.replace(CONFIG, num_experts=12), ids, keep, key, 0)
    plan = planned(CONFIG, ids, keep, key, 0)
    x, weights = np.ones((TOKENS, 2), np.float32), np.ones((TOKENS, K), np.float32)
    with pytest.raises(ValueError, match=r"axis \('expert',\) is not bound"):
        rbd_dispatch(x, weights, plan, dataclasses.replace(CONFIG, expert_axes=("expert",)))
    with pytest.raises(ValueError, match="expert_axes must name"):
        rbd_dispatch(x, weights, plan, CONFIG)
