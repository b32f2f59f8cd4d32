"""Every policy against its rules written out, over random states; stale workers; what a router is not made with."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.voltanallm import RequestInfo, Router, WorkerState
from jaxlab.voltanallm.router import POLICIES
from tests.oracles import voltanallm as oracle
from tests.voltanallm import tables
from tests.voltanallm.tables import CLOCKS

TABLE, ENERGY = tables.decode_table(), tables.energy_table()
SLO = 22.0
LIMIT = SLO * 1.1

STATE = st.tuples(
    st.one_of(st.sampled_from((0, 3, 63, 64, 127, 128, 129, 192, 255, 256, 257)), st.integers(0, 300)),
    st.sampled_from(CLOCKS),
    st.one_of(st.just(0), st.integers(0, 300_000)),
    st.sampled_from((0.0, 10.0, 19.36, 25.0, 40.0)),
)


def states(rows):
    return [WorkerState(f"w{index}", *row) for index, row in enumerate(rows)]


def router(policy, **options):
    return Router(policy, table=TABLE, energy_table=ENERGY, slo_ms=SLO, margin=0.1, **options)


@pytest.mark.latest
@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(STATE, min_size=1, max_size=6), st.sampled_from((1, 400, 5000)), st.sampled_from((64, 128)))
def test_policies_are_their_rules(rows, prompt, tile):
    workers, request = states(rows), RequestInfo("r", prompt)
    predict, energy = TABLE.predict, ENERGY.predict
    wanted = {
        "ln": min(workers, key=lambda w: w.in_flight).id,
        "ll": min(workers, key=lambda w: w.load).id,
        "hfl": oracle.hfl(workers, LIMIT),
        "tile_aware": oracle.tile_aware(workers, tile),
        "state_space": oracle.state_space(workers, prompt, predict, CLOCKS, LIMIT, tile),
        "energy_diff": oracle.energy_diff(workers, prompt, predict, energy, CLOCKS, LIMIT),
        "min_delta_energy": oracle.min_delta_energy(workers, prompt, predict, energy, CLOCKS, LIMIT),
        "rr": workers[0].id,
    }
    assert {policy: router(policy, tile=tile).route(request, workers) for policy in wanted} == wanted


def pick(policy, rows, prompt=400, **options):
    return router(policy, **options).route(RequestInfo("r", prompt), states(rows))


def test_tile_aware_by_hand():
    assert pick("tile_aware", [(100, 1410, 0), (127, 1005, 0), (90, 1005, 0)]) == "w2"
    assert pick("tile_aware", [(128, 1005, 0), (200, 1005, 0), (130, 1005, 0)]) == "w1"  # w0 would open a tile
    assert pick("tile_aware", [(128, 1005, 0), (0, 1410, 0)]) == "w1"
    assert pick("tile_aware", [(256, 1005, 0), (128, 1410, 0)]) == "w1"  # both would: the fewest tiles
    assert pick("tile_aware", [(128, 1410, 0), (128, 1005, 0)]) == "w0"  # alike: the first


def test_state_space_keeps_a_clock_from_rising():
    steep = [(64, 1005, 200_000), (70, 1005, 100)]
    assert TABLE.predict(1005, 65, 200_000 + 400 + 50 * 64) > LIMIT  # at w0 the clock would have to rise
    assert pick("state_space", steep, tile=64) == "w1"


def test_rounds_and_random_streams():
    workers = states([(0, 1005, 0)] * 3)
    rounds = Router("rr")
    assert [rounds.route(RequestInfo(i, 1), workers) for i in range(4)] == ["w0", "w1", "w2", "w0"]

    def stream(seed):
        chosen = Router("random", seed=seed)
        return [chosen.route(RequestInfo(i, 1), workers) for i in range(300)]

    assert stream(0) == stream(0) != stream(1)
    counts = [stream(0).count(worker.id) for worker in workers]
    assert min(counts) > 70
    interleaved = Router("random", seed=0)
    for _ in range(5):
        router("tile_aware").route(RequestInfo("r", 1), workers)  # another router does not move it
    assert [interleaved.route(RequestInfo(i, 1), workers) for i in range(300)] == stream(0)


def test_stale_workers_are_passed_over():
    workers = [WorkerState("old", 1, 1005, 0, timestamp=1.0), WorkerState("new", 9, 1005, 0, timestamp=9.5)]
    policy = Router("ln", stale_s=1.0)
    assert policy.route(RequestInfo("r", 1), workers, now=10.0) == "new"
    assert policy.route(RequestInfo("r", 1), [*workers, WorkerState("mute", 0, 1005, 0)], now=10.0) == "mute"
    assert policy.route(RequestInfo("r", 1), workers, now=2.0) == "old"
    with pytest.warns(RuntimeWarning, match="none of 2 workers has reported within 1.0 s"):
        assert Router("ll", stale_s=1.0).route(RequestInfo("r", 1), workers, now=99.0) == "old"
    with pytest.raises(ValueError, match="now: expected the time"):
        policy.route(RequestInfo("r", 1), workers)


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("best", {}, "policy: expected one of rr, ln"),
        ("state_space", {"slo_ms": 50.0}, "table: expected one for policy 'state_space'"),
        ("state_space", {"table": TABLE}, "slo_ms: expected one"),
        ("hfl", {}, "slo_ms: expected one"),
        ("energy_diff", {"table": TABLE, "slo_ms": 50.0}, "energy_table: expected one"),
        ("min_delta_energy", {"table": TABLE, "slo_ms": 50.0}, "energy_table: expected one"),
        ("state_space", {"table": tables.prefill_table(), "slo_ms": 50.0}, "expected a decode table"),
        ("rr", {"slo_ms": 0.0}, "slo_ms: expected a positive"),
        ("rr", {"margin": -1.0}, "margin"),
        ("rr", {"tile": 0}, "tile"),
        ("rr", {"stale_s": 0.0}, "stale_s"),
    ],
)
def test_what_a_router_is_not_made_with(policy, options, message):
    with pytest.raises(ValueError, match=message):
        Router(policy, **options)


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_to_route_to(policy):
    with pytest.raises(ValueError, match="workers: expected at least one"):
        router(policy).route(RequestInfo("r", 1), [])
