"""The simulated cluster: timelines by hand and against workers followed one by one, books that balance, bad inputs."""

import dataclasses
import functools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.voltanallm import ControllerConfig, LatencyTable, PowerModel, Router
from jaxlab.voltanallm.predictor import Plane
from jaxlab.voltanallm.sim import ClusterConfig, Profile, ProfiledLatency, SimModels, Simulator, Trace
from jaxlab.voltanallm.sim.workers import Clock
from tests.oracles import voltanallm_cluster as oracle

LOW, HIGH = 1005, 1410
PREFILL = {LOW: (0.125, 16.0), HIGH: (0.0625, 8.0)}  # ms a token and a batch; exact in binary
DECODE = {LOW: (0.5, 0.00390625, 8.0), HIGH: (0.25, 0.00390625, 6.0)}
POWER = PowerModel()
FREE = {"kv_bytes_per_token": 0, "link_ms": 2.0, "switch_ms": 0.0}


def models(sigma=0.0, **changes):
    prefill = LatencyTable("prefill", [Plane(f, tokens=a, intercept=c) for f, (a, c) in PREFILL.items()])
    decode = LatencyTable(
        "decode", [Plane(f, tokens=k, intercept=c, batch=b, start=1, end=512) for f, (b, k, c) in DECODE.items()]
    )
    return dataclasses.replace(SimModels(prefill, decode, POWER, noise_sigma=sigma), **changes)


def control(kind="static", freq=None, **changes):
    given = {"freqs": (LOW, HIGH), "static_freq": freq, "prefill_slo_ms": 100, "decode_slo_ms": 10, "margin": 0.0}
    return ControllerConfig(kind, **(given | changes))


def simulate(requests, cluster=None, policy="rr", controller=None, truth=None, seed=0, until=None, record=False):
    cluster = cluster or ClusterConfig(1, 1, **FREE)
    simulator = Simulator(
        cluster, Trace(*map(list, zip(*requests))), policy, controller or control(), truth or models(), seed
    )
    return simulator.run(until, record=record)


@pytest.mark.latest
def test_two_requests_by_hand():
    """Prefills one after the other; the second request joins the first one's batch for its sixth iteration."""
    result = simulate([(0.0, 128, 8), (0.001, 256, 3)])
    assert result.first_token_s.tolist() == pytest.approx([0.016, 0.040])  # 8 + 128 / 16, then 8 + 256 / 16 ms
    alone = [6.25 + (128 + k) / 256 for k in range(7)]  # from 18 ms on; the second cache is there at 42 ms
    joined = 0.018 + sum(alone[:4]) / 1000  # 45.02 ms
    both = [6.5 + (132 + k + 256 + k) / 256 for k in range(2)]
    last = 6.25 + (134 / 256)
    finish = [joined + (sum(both) + last) / 1000, joined + sum(both) / 1000]
    assert result.finish_s.tolist() == pytest.approx(finish, rel=1e-12)
    assert result.ttft_ms.tolist() == pytest.approx([16.0, 39.0])
    assert result.itl_ms.tolist() == pytest.approx([1000 * (finish[0] - 0.016) / 7, 1000 * (finish[1] - 0.040) / 2])
    assert result.itl_token_attainment == pytest.approx(8 / 9)  # the second request's second token waits for a batch
    assert (result.num_done, result.num_aborted, result.output_tokens) == (2, 0, 11)
    assert result.duration_s == pytest.approx(finish[0])
    busy = (0.040, finish[0] - 0.018)
    watts = [POWER.power_w(HIGH, phase, 1.0) for phase in ("prefill", "decode")]
    energy = [w * b + POWER.idle_w * (finish[0] - b) for w, b in zip(watts, busy)]
    np.testing.assert_allclose(result.energy_per_gpu_j, energy)
    assert result.busy_s_by_clock == pytest.approx({HIGH: sum(busy)})
    assert result.joules_per_token == pytest.approx(sum(energy) / 11)
    assert result.joules_per_request == pytest.approx(sum(energy) / 2)
    assert result.mean_in_flight == pytest.approx((finish[0] + finish[1] - 0.001) / finish[0])


requests = st.lists(
    st.tuples(st.sampled_from([0, 0, 0, 2, 7, 40]), st.integers(1, 40).map(lambda n: 16 * n), st.integers(1, 12)),
    min_size=1,
    max_size=14,
)


@settings(max_examples=25, deadline=None)
@given(requests, st.integers(1, 3), st.sampled_from([None, 1, 2]))
def test_against_workers_followed_one_by_one(given, decodes, most):
    arrivals = np.cumsum([Fraction(gap, 256) for gap, _, _ in given]).tolist()
    rows = [(float(at), prompt, output) for at, (_, prompt, output) in zip(arrivals, given)]
    cluster = ClusterConfig(1, decodes, max_prefill_requests=most, max_prefill_tokens=1024, **FREE)
    result = simulate(rows, cluster)
    (a, c), (b, k, d) = PREFILL[HIGH], DECODE[HIGH]
    first, finish, gaps = oracle.timeline(
        arrivals,
        [row[1] for row in rows],
        [row[2] for row in rows],
        prefill_ms=lambda tokens: a * tokens + c,
        decode_ms=lambda batch, tokens: b * batch + k * tokens + d,
        transfer_ms=lambda tokens: 2,
        decodes=decodes,
        max_tokens=1024,
        max_requests=most,
    )
    np.testing.assert_allclose(result.first_token_s, np.array(first, float), rtol=1e-12)
    np.testing.assert_allclose(result.finish_s, np.array(finish, float), rtol=1e-12)
    every = [float(gap) for row in gaps for gap in row]
    if every and min(abs(gap - 0.01) for gap in every) > 1e-9:
        assert result.itl_token_attainment == pytest.approx(np.mean([gap <= 0.01 for gap in every]), rel=1e-12)
    means = [float(sum(row)) / len(row) for row in gaps if row]
    np.testing.assert_allclose(result.itl_ms[np.array([bool(row) for row in gaps])], np.array(means) * 1000, rtol=1e-9)


@settings(max_examples=20, deadline=None)
@given(
    requests,
    st.tuples(st.integers(0, 2), st.integers(1, 3)),
    st.sampled_from(["rr", "random", "ln", "tile_aware", "state_space"]),
    st.sampled_from([("static", 0.0), ("ecofreq", 0.0), ("ecofreq", 25.0)]),
    st.integers(0, 3),
    st.sampled_from([None, 0.2]),
)
def test_the_books_balance(given, shape, policy, controller, seed, until):
    kind, switch = controller
    rows = [(at / 256, prompt, output) for at, (_, prompt, output) in zip(np.cumsum([r[0] for r in given]), given)]
    cluster = ClusterConfig(*shape, **(FREE | {"switch_ms": switch}), kv_tokens=700)
    run = functools.partial(simulate, rows, cluster, policy, control(kind), models(0.1), seed, until)
    result = run()
    arrived = sum(until is None or row[0] <= until for row in rows)
    assert result.num_done + result.num_aborted == arrived
    too_large = sum(row[1] + row[2] - 1 > 700 for row in rows)
    if until is None:
        assert result.num_aborted == too_large
        assert result.output_tokens == sum(row[2] for row in rows if row[1] + row[2] - 1 <= 700)
    assert result.peak_kv_tokens <= 700
    assert result.energy_j == pytest.approx(result.energy_per_gpu_j.sum(), rel=1e-12)
    workers, busy = sum(shape), sum(result.busy_s_by_clock.values())
    assert busy <= workers * result.duration_s + 1e-9
    assert result.idle_energy_j == pytest.approx(POWER.idle_w * (workers * result.duration_s - busy), abs=1e-9)
    done = np.isfinite(result.finish_s)
    assert done.sum() == result.num_done
    assert (result.finish_s >= result.first_token_s)[done].all()
    assert (result.ttft_ms[done] > 0).all()
    assert min(result.ttft_attainment, result.itl_token_attainment, result.itl_request_attainment) >= 0
    assert max(result.ttft_attainment, result.itl_token_attainment, result.itl_request_attainment) <= 1
    again = run()
    np.testing.assert_array_equal(again.finish_s, result.finish_s)
    assert again.energy_j == result.energy_j


def test_one_token_never_visits_a_decode_worker():
    result = simulate([(0.0, 160, 1), (0.5, 160, 1)])
    assert result.decode_iterations == 0
    assert result.finish_s.tolist() == result.first_token_s.tolist()
    assert result.energy_per_gpu_j[1] == pytest.approx(POWER.idle_w * result.duration_s)
    assert result.itl_token_attainment == result.itl_request_attainment == 1.0


def test_room_in_the_kv_pool_is_waited_for():
    """Two requests of 100 tokens at the end, room for 150: the second comes in when the first is done."""
    rows = [(0.0, 96, 5), (0.0, 96, 5), (0.0, 200, 2)]
    result = simulate(rows, ClusterConfig(1, 1, kv_tokens=150, **FREE))
    alone = sum(6.25 + (96 + k) / 256 for k in range(4)) / 1000
    first = 0.008 + 192 * 0.0625 / 1000
    assert result.finish_s[:2].tolist() == pytest.approx([first + 0.002 + alone, first + 2 * (0.002 + alone)])
    assert (result.num_done, result.num_aborted, result.peak_kv_tokens) == (2, 1, 100)
    assert np.isnan(result.first_token_s[2])
    assert result.ttft_attainment == pytest.approx(2 / 3)
    assert result.itl_request_attainment == pytest.approx(1 / 3)
    assert result.itl_token_attainment == pytest.approx(7 / 9)


def test_what_is_cut_off_is_aborted():
    rows = [(0.0, 128, 8), (0.5, 128, 8), (9.0, 128, 8)]
    result = simulate(rows, until=0.525)
    assert (result.num_done, result.num_aborted, result.duration_s) == (1, 1, 0.525)
    assert result.first_token_s.tolist() == pytest.approx([0.016, 0.516, np.nan], nan_ok=True)
    assert result.ttft_attainment == 0.5
    one = 7 * 6.25 + sum(range(128, 135)) / 256
    assert sum(result.busy_s_by_clock.values()) == pytest.approx(0.016 * 2 + one / 1000 + 0.007)


def test_one_pool_computes_prompts_first():
    result = simulate([(0.0, 128, 3), (0.017, 128, 2)], ClusterConfig(0, 1, **FREE))
    step = (6.25 + 128 / 256) / 1000
    assert result.first_token_s.tolist() == pytest.approx([0.016, 0.016 + step + 0.016])
    both = (6.5 + 257 / 256) / 1000
    assert result.finish_s.tolist() == pytest.approx([0.032 + step + both] * 2)
    assert result.itl_token_attainment == pytest.approx(2 / 3)  # the prompt keeps the first request waiting


def test_low_clocks_fill_the_batches():
    trace = Trace.from_lengths([256], [100], rate=12, num_requests=240)
    runs = [Simulator(ClusterConfig(1, 1), trace, "rr", control(freq=freq), models(0.03)).run() for freq in (LOW, HIGH)]
    assert runs[0].mean_in_flight > 1.1 * runs[1].mean_in_flight
    assert runs[0].peak_kv_tokens > runs[1].peak_kv_tokens
    assert runs[0].energy_j < runs[1].energy_j


def test_phases_may_have_controllers_of_their_own():
    rows = [(0.0, 128, 4), (0.5, 128, 1)]
    one, two = control(freq=LOW), control(freq=HIGH)
    result = simulate(rows, controller=(one, two))
    assert result.first_token_s.tolist() == pytest.approx([0.032, 0.532])
    assert result.busy_s_by_clock[HIGH] == pytest.approx(3 * 0.00625 + (128 + 129 + 130) / 256_000)
    assert result.busy_s_by_clock[LOW] == pytest.approx(0.064)


def test_a_truth_without_a_table():
    """Controllers then believe the truth; what needs energy has none."""
    profile = Profile(np.array([1, 64, 1024]), np.array([0.3, 0.4, 2.0]), np.array([0.03, 0.03, 0.2]))
    truth = SimModels(ProfiledLatency("prefill", profile), ProfiledLatency("decode", profile), POWER, noise_sigma=0.0)
    rows = [(0.1 * i, 100, 20) for i in range(20)]
    eco = simulate(rows, controller=control("ecofreq", decode_slo_ms=30), truth=truth)
    assert set(eco.busy_s_by_clock) == {LOW}
    assert eco.first_token_s[0] == pytest.approx(truth.prefill.predict(LOW, 1, 100) / 1000)
    with pytest.raises(ValueError, match="expected an energy table"):
        simulate(rows, controller=control("least_energy"), truth=truth)


def test_arrivals_reach_controllers_that_count_them():
    """More than 40 requests in a second: the highest clock, and the lowest again when they are over."""
    rows = [(0.02 * i, 16, 2) for i in range(60)] + [(4.0 + 0.1 * i, 16, 2) for i in range(5)]
    busy = {}
    for limit in (None, 40.0):
        result = simulate(rows, controller=control("ecofreq", rps_threshold=limit), record=True)
        busy[limit] = [moment.clock_mhz for moment in result.moments if moment.worker == "prefill0"]
    assert set(busy[None]) == {LOW}
    assert busy[40.0].count(HIGH) > 10
    assert busy[40.0][-1] == LOW


def test_ecofreq_raises_the_clock_and_lets_it_fall():
    """A batch whose low-clock latency is over the objective; after five idle seconds the clock is low again."""
    rows = [(0.0, 16, 60)] * 12 + [(8.0, 16, 4)]
    control_ = control("ecofreq", decode_slo_ms=12)
    result = simulate(rows, ClusterConfig(1, 1, **FREE), controller=control_, record=True)
    seen = [moment for moment in result.moments if moment.worker == "decode0"]
    assert [moment.clock_mhz for moment in seen] == [LOW] + [HIGH] * 58 + [LOW] * 3  # it reacts an iteration late
    assert result.clock_switches >= 2
    late = simulate(rows, ClusterConfig(1, 1, **(FREE | {"switch_ms": 30.0})), controller=control_)
    assert late.busy_s_by_clock[LOW] == pytest.approx(result.busy_s_by_clock[LOW] + 0.03, abs=0.02)


def test_a_clock_changes_on_the_way():
    clock = Clock(1000, 0.010, {(1000, "decode"): 100.0, (2000, "decode"): 300.0, (500, "decode"): 50.0})
    whole = {500: 0.080, 1000: 0.040, 2000: 0.020}.__getitem__
    clock.set(2000, 0.0)
    clock.set(2000, 0.001)  # on its way already
    clock.set(500, 0.005)
    stretches = clock.run(0.0, whole)
    assert [mhz for mhz, _ in stretches] == [1000, 2000, 500]
    assert [seconds for _, seconds in stretches] == pytest.approx([0.010, 0.005, 0.080 * (1 - 0.25 - 0.25)])
    clock.spend(stretches, "decode")
    assert clock.busy_j == pytest.approx(1.0 + 1.5 + 2.0)
    assert clock.switches == 2
    clock.settle(0.012)
    assert clock.mhz == 2000
    assert clock.run(0.016, whole) == [(500, 0.080)]


def test_policies_see_the_same_arrivals_and_noise_is_of_the_seed():
    trace = Trace.from_lengths([64, 256], [4, 30], rate=40, num_requests=60, seed=3)
    truth = models(0.05)
    cluster = ClusterConfig(2, 2)
    runs = {
        (policy, seed): Simulator(cluster, trace, policy, control(), truth, seed).run()
        for policy in ("rr", "ln")
        for seed in (0, 1)
    }
    np.testing.assert_array_equal(runs["rr", 0].first_token_s, runs["ln", 0].first_token_s)
    own = Simulator(cluster, trace, Router("rr"), control(), truth, 0)
    assert own.run().energy_j == own.run().energy_j == runs["rr", 0].energy_j
    assert not np.array_equal(runs["rr", 0].first_token_s, runs["rr", 1].first_token_s)
    assert runs["rr", 0].energy_j != runs["ln", 0].energy_j


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_prefill": -1}, "num_prefill: expected at least 0"),
        ({"num_decode": 0}, "num_decode: expected at least 1"),
        ({"max_prefill_requests": 0}, "max_prefill_requests"),
        ({"switch_ms": -1.0}, "switch_ms"),
        ({"poll_ms": float("nan")}, "poll_ms"),
        ({"link_gb_s": 0.0}, "link_gb_s"),
        ({"kv_tokens": 0}, "kv_tokens"),
    ],
)
def test_bad_clusters(wrong, message, unchecked):
    with pytest.raises(ValueError, match=message):
        ClusterConfig(**wrong)


def test_bad_simulations(unchecked):
    trace, cluster = Trace([0.0], [16], [2]), ClusterConfig(1, 1)
    with pytest.raises(ValueError, match="policy: expected one of"):
        Simulator(cluster, trace, "best", control(), models())
    with pytest.raises(ValueError, match="expected a clock of the table"):
        Simulator(cluster, trace, "rr", control(freqs=(900, HIGH), freq=900), models())
    with pytest.raises(ValueError, match="until_s"):
        Simulator(cluster, trace, "rr", control(), models()).run(0.0)
    with pytest.raises(ValueError, match="no prediction for a batch of 513"):
        simulate([(0.0, 16, 4)] * 513)
    with pytest.raises(ValueError, match="noise_sigma"):
        models(sigma=-0.1)
    with pytest.raises(ValueError, match=r"name: expected llama-3\.1-8b-a100"):
        SimModels.preset("llama")
