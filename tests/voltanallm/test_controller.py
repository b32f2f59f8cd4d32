"""EcoFreq against its pseudo-code over random states, its rules one by one, and what it is not made with."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.voltanallm import ControllerConfig, EcoFreq
from tests.oracles import voltanallm as oracle
from tests.voltanallm import tables
from tests.voltanallm.tables import CLOCKS, Iteration

ITERATION = st.builds(
    Iteration,
    running=st.integers(0, 300),
    total=st.integers(0, 300),
    tokens=st.sampled_from((0, 0, 40, 3000, 9000, 13_000, 200_000, 600_000)),
    waiting=st.sampled_from((0, 0, 0, 0, 2)),
    queue_wait_s=st.lists(st.floats(0, 1), max_size=3).map(tuple),
)
CALL = st.tuples(
    st.lists(ITERATION, max_size=4),
    st.lists(st.tuples(st.floats(-2, 0), st.integers(1, 500)), max_size=4),
    st.floats(0.1, 4),
)


@pytest.mark.latest
@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    phase=st.sampled_from(("decode", "prefill")),
    calls=st.lists(CALL, min_size=1, max_size=5),
    total=st.booleans(),
    tps=st.sampled_from((None, 0, 300)),
    rps=st.sampled_from((None, 2)),
    clocks=st.sampled_from((CLOCKS, (1005, 1410), (1410, 1100, 1250))),
)
def test_ecofreq_is_its_pseudo_code(phase, calls, total, tps, rps, clocks):
    table = tables.decode_table() if phase == "decode" else tables.prefill_table()
    slo = 20.0 if phase == "decode" else 600.0
    ours = EcoFreq(table, clocks, slo, use_total_batch=total, tps_threshold=tps, rps_threshold=rps, idle_s=3.0)
    wanted = oracle.EcoFreq(table.predict, clocks, slo, 0.35, phase, total=total, tps=tps, rps=rps, idle=3.0)
    now = 0.0
    for metrics, arrivals, later in calls:
        now += later
        came = [(now + time, tokens) for time, tokens in arrivals]
        assert ours.decide(metrics, came, now) == wanted.decide(metrics, came, now)


def controller(**options):
    return EcoFreq(tables.decode_table(), CLOCKS, 20.0, margin=0.0, **options)


def test_the_lowest_feasible_clock():
    decide = controller().decide
    assert decide([Iteration(running=10, tokens=1000)]) == 1005
    assert decide([Iteration(running=64, tokens=180_000)]) == 1005  # 10 + 5.4 + 4.5
    assert decide([Iteration(running=65, tokens=180_000)]) == 1410  # a step up
    assert decide([Iteration(running=10, tokens=0)]) is None
    assert decide([]) is None


def test_a_median_between_two_batches_is_rounded_up():
    """64.5 lies between two segments; the official code has no prediction for it."""
    iterations = [Iteration(running=64, tokens=100_000), Iteration(running=65, tokens=100_000)]
    roomy = EcoFreq(tables.decode_table(), CLOCKS, 40.0)
    assert math.isnan(roomy.table.predict(1005, 64.5, 100_000))
    assert roomy.decide(iterations) == 1005
    assert roomy.counters.unpredicted == 0


def test_prefill_waits_are_taken_off_the_objective():
    prefill = EcoFreq(tables.prefill_table(), CLOCKS, 800.0, margin=0.0)
    assert prefill.decide([Iteration(running=3, tokens=6000, queue_wait_s=())]) == 1005  # 513 ms
    assert prefill.decide([Iteration(running=3, tokens=6000, queue_wait_s=(0.1, 0.4))]) == 1305  # 397 of 400
    assert prefill.decide([Iteration(running=3, tokens=6000, queue_wait_s=(0.9,))]) == 1410
    assert prefill.counters.infeasible == 1
    decode = EcoFreq(tables.decode_table(), CLOCKS, 40.0)
    assert decode.decide([Iteration(queue_wait_s=(5.0,))]) == 1005


def test_idle_workers_drop_to_the_lowest_clock():
    ours = controller(idle_s=2.0)
    assert ours.decide([Iteration(waiting=1)], now=10.0) == 1410
    assert ours.decide([], now=12.0) is None  # not more than
    assert ours.decide([], now=12.1) == 1005


def test_arrivals_come_first_and_compare_strictly():
    ours = controller(tps_threshold=100, window_s=0.5)
    calm = [Iteration(running=10, tokens=1000)]
    assert ours.decide(calm, [(9.75, 50)], 10.0) == 1005  # 100 tokens a second are not above it
    assert ours.decide(calm, [(9.75, 51)], 10.0) == 1410
    assert ours.decide(calm, [(9.5, 51)], 10.0) == 1005  # as old as the window
    assert ours.decide([], [(9.75, 51)], 10.0) == 1410
    assert controller(rps_threshold=1).decide([], [(9.5, 1), (9.6, 1)], 10.0) == 1410


def test_counters():
    ours = controller()
    for running in (10, 200, 10, 300):
        ours.decide([Iteration(running=running, tokens=300_000 if running == 200 else 1000)])
    ours.decide([])
    counters = ours.counters
    assert (counters.decisions, counters.switches) == (4, 3)
    assert (counters.infeasible, counters.unpredicted) == (2, 1)  # 300 is above the last segment


def test_hysteresis_withholds_the_way_down_only():
    ours = controller()
    ours.hysteresis = 2
    low, high = [Iteration(running=10, tokens=1000)], [Iteration(running=65, tokens=180_000)]
    assert [ours.decide(each) for each in (high, low, low, low, high, low, low, high)] == [
        1410,
        1410,
        1410,
        1005,
        1410,
        1410,
        1410,
        1410,
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"freqs": (1410,)}, "at least 2 clocks"),
        ({"freqs": (1005, 1005)}, "got 1005 twice"),
        ({"freqs": (900, 1410)}, "nearest is 1005 MHz, got 900"),
        ({"freqs": (1005, 1500)}, "nearest is 1410 MHz, got 1500"),
        ({"freqs": (1005.5, 1410)}, "positive whole numbers"),
        ({"slo_ms": 0.0}, "slo_ms: expected a positive"),
        ({"margin": -1.0}, "margin: expected a value > -1"),
        ({"window_s": 0.0}, "window_s"),
        ({"idle_s": -1.0}, "idle_s"),
        ({"tps_threshold": -1.0}, "tps_threshold"),
    ],
)
def test_what_ecofreq_is_not_made_with(unchecked, change, message):
    arguments = {"table": tables.decode_table(), "freqs": CLOCKS, "slo_ms": 50.0}
    with pytest.raises(ValueError, match=message):
        EcoFreq(**{**arguments, **change})


CONFIG = {"freqs": CLOCKS, "prefill_slo_ms": 800.0, "decode_slo_ms": 50.0}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fastest", {}, "kind: expected one of static, ecofreq"),
        ("ecofreq", {"freqs": (1410,)}, "at least 2 clocks"),
        ("static", {"freqs": ()}, "at least 1 clocks"),
        ("static", {"static_freq": 1100}, "nearest are 1095 MHz and 1200 MHz, got 1100"),
        ("ecofreq", {"decode_slo_ms": -1.0}, "decode_slo_ms"),
        ("ecofreq", {"margin": -2.0}, "margin"),
        ("ecofreq", {"hysteresis": -1}, "hysteresis"),
    ],
)
def test_configs_that_are_refused(unchecked, kind, change, message):
    with pytest.raises(ValueError, match=message):
        ControllerConfig(kind, **{**CONFIG, **change})


def test_a_config_sorts_its_clocks():
    config = ControllerConfig("ecofreq", **{**CONFIG, "freqs": (1410, 1005)})
    assert config.freqs == (1005, 1410)
    assert (config.slo_ms("prefill"), config.slo_ms("decode"), config.margin) == (800.0, 50.0, 0.35)
