"""The other controllers: what each does in states where its answer is known, and a loop closed around them."""

import math

import numpy as np
import pytest

from jaxlab.voltanallm import (
    AIMD,
    ControllerConfig,
    DynamoLLM,
    EnergyTable,
    GreenLLM,
    LatencyTable,
    LeastEnergy,
    ModelPredictive,
    PowerModel,
    StaticClock,
    ThrottLLeM,
    best_static_clock,
    make_controller,
)
from jaxlab.voltanallm.config import KINDS
from jaxlab.voltanallm.planning import Rate
from jaxlab.voltanallm.predictor import Plane
from tests.voltanallm import tables
from tests.voltanallm.tables import CLOCKS, Iteration

DECODE, PREFILL, ENERGY = tables.decode_table(), tables.prefill_table(), tables.energy_table()
POWER = PowerModel()
WIDE = (510, 750, 990, 1200, 1410)


def wide(phase):
    """Tables with clocks below the sweet spot."""
    if phase == "prefill":
        table = tables.prefill_table(WIDE)
    else:
        table = LatencyTable(
            "decode",
            [
                Plane(f, 3e-5, 10 + 4 * step * 1410 / f, 0.05 * 1410 / f, end - 63, end)
                for f in WIDE
                for step, end in enumerate(tables.ENDS)
            ],
        )
    return table, POWER.energy_table(table)


def config(kind, **options):
    return ControllerConfig(kind, **{"freqs": CLOCKS, "prefill_slo_ms": 800.0, "decode_slo_ms": 30.0, **options})


@pytest.mark.latest
@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_are_made_in_one_place(kind, phase):
    table = DECODE if phase == "decode" else PREFILL
    made = make_controller(
        config(kind, hysteresis=1), phase, table, energy=POWER.energy_table(table), idle_w=POWER.idle_w
    )
    assert made.freqs == CLOCKS
    assert made.hysteresis == (kind != "static")
    time = 0.0
    for running in (4, 100, 250, 400, 8):  # 400 is above the table
        time += 0.1
        state = Iteration(time, running, running, 200 * running, queue_wait_s=(0.01,))
        assert made.decide([state], [(time, 200)], time) in (*CLOCKS, None)
    assert made.counters.decisions
    idle = made.decide([], (), time + 9.0)
    assert idle == (CLOCKS[-1] if kind == "static" else CLOCKS[0])
    assert made.decide([Iteration(time + 10, 0, 0, 0)], (), time + 10) in (*CLOCKS, None)


def test_what_cannot_be_made():
    with pytest.raises(ValueError, match="energy: expected an energy table for controller 'least_energy'"):
        make_controller(config("least_energy"), "decode", DECODE)
    with pytest.raises(ValueError, match="table: expected a latency table for controller 'ecofreq'"):
        make_controller(config("ecofreq"), "decode", None)
    assert make_controller(config("aimd"), "decode", None).decide([], now=0.0) is None
    with pytest.raises(ValueError, match="table: expected a table of phase 'decode', got one of 'prefill'"):
        make_controller(config("ecofreq"), "decode", PREFILL)
    with pytest.raises(ValueError, match="nearest is 1005 MHz, got 900"):
        make_controller(config("ecofreq", freqs=(900, 1410)), "decode", DECODE)
    with pytest.raises(ValueError, match="energy: expected a table of phase"):
        LeastEnergy(DECODE, CLOCKS, 30.0, energy=POWER.energy_table(PREFILL))
    with pytest.raises(ValueError, match="idle_w"):
        LeastEnergy(DECODE, CLOCKS, 30.0, energy=ENERGY, idle_w=-1.0)
    for name, value in (("steps", 0), ("memory", 1.0), ("memory_s", 0.0), ("deviations", -1.0)):
        with pytest.raises(ValueError, match=name):
            ModelPredictive(DECODE, CLOCKS, 30.0, energy=ENERGY, **{name: value})
    for name in ("step", "factor", "headroom"):
        with pytest.raises(ValueError, match=name):
            AIMD(CLOCKS, 30.0, "decode", **{name: 1.0})


def test_static():
    assert StaticClock(CLOCKS).decide([]) == 1410
    low = make_controller(config("static", static_freq=1005), "decode", DECODE)
    assert [low.decide([Iteration(waiting=5)]), low.decide([], now=99.0)] == [1005, 1005]
    assert low.counters.switches == 0
    with pytest.raises(ValueError, match="nearest are 1005 MHz and 1095 MHz, got 1050"):
        StaticClock(CLOCKS, 1050)


def test_the_static_oracle():
    cost = {1005: (50.0, 0.80), 1200: (60.0, 0.99), 1305: (58.0, 0.98), 1410: (90.0, 0.995)}
    assert best_static_clock(tuple(cost), cost.__getitem__, at_least=0.98) == (1305, 58.0, 0.98)
    assert best_static_clock(tuple(cost), cost.__getitem__, at_least=0.999) == (1410, 90.0, 0.995)


def iterations(gap_ms, count, start=0.0, **state):
    return [Iteration(start + index * gap_ms / 1000, **{"running": 8, **state}) for index in range(count)]


def test_aimd_saves_step_by_step_and_gives_half_back():
    ours = AIMD((1000, 1100, 1200, 1300, 1400), 50.0, "decode", step=0.25, factor=0.5)
    assert ours.decide(iterations(20, 2)) == 1000
    assert ours.decide(iterations(60, 2, 1.0)) == 1200  # 400 MHz saved become 200
    assert ours.decide(iterations(60, 2, 2.0)) == 1300
    assert ours.decide(iterations(47, 2, 2.107)) == 1300  # neither late nor with headroom
    assert ours.decide(iterations(20, 2, 2.174)) == 1200
    assert ours.decide([Iteration(9.0, running=0)]) is None  # what lay between was no iteration
    prefill = AIMD((1000, 1400), 500.0, "prefill")
    assert prefill.decide([Iteration(queue_wait_s=(0.1, 0.6))]) == 1400
    assert prefill.decide([Iteration(0.2, waiting=2, queue_wait_s=(0.1,))]) == 1400
    assert prefill.decide([Iteration(0.65, waiting=2, queue_wait_s=(0.1,))]) == 1400  # 450 ms for the batch before


def test_throttllem_looks_ahead():
    """60 requests are feasible at the lowest clock; those that join at 400 a second are not."""
    ours = ThrottLLeM(DECODE, CLOCKS, 17.0, margin=0.0)
    assert ours.decide(iterations(15, 1, running=60, tokens=6000)) == 1005
    growing = [Iteration(0.015 * index, running=10 + 6 * index, tokens=6000) for index in range(9)]
    assert ours.decide(growing) == 1410
    assert DECODE.predict(1005, 58, 6000) < 17.0
    # A prefill batch of 300 ms leaves as many prompts behind it as come while it runs.
    rushed = ThrottLLeM(PREFILL, CLOCKS, 600.0, margin=0.0)
    batches = [Iteration(0.25 * index, tokens=4000) for index in range(8)]
    assert PREFILL.predict(1005, 1, 4000) < 600
    assert rushed.decide(batches) > 1005


def test_greenllm_corrects_its_coarse_clock_by_a_step():
    ours = GreenLLM(DECODE, CLOCKS, 17.0, margin=0.0)
    assert ours.decide(iterations(14, 1, running=60, tokens=6000), now=0.0) == 1005
    late = iterations(30, 5, 0.1, running=60, tokens=6000)
    assert ours.decide(late, now=0.15) == 1095
    assert ours.decide(late, now=0.16) == 1095  # the fine loop has a period, too
    assert ours.decide(late, now=0.18) == 1095  # no further than a step
    assert ours.decide(iterations(14, 1, 0.3, running=60, tokens=6000), now=0.3) == 1005  # the coarse loop again
    prefill = GreenLLM(PREFILL, CLOCKS, 500.0, margin=0.0)
    assert prefill.decide([Iteration(running=2, tokens=2000)]) == 1005
    assert prefill.decide([Iteration(running=2, tokens=4000, waiting=2)]) == 1410  # 8000 with those behind


def test_dynamollm_changes_once_a_period():
    ours = DynamoLLM(DECODE, CLOCKS, 17.0, margin=0.0, period_s=10.0)
    light, heavy = Iteration(running=20, tokens=2000), Iteration(running=64, tokens=90_000)
    assert ours.decide([light], now=0.0) == 1410
    assert ours.decide([light] * 19, now=9.0) == 1410
    assert ours.decide([light], now=10.0) == 1005
    assert ours.decide([heavy] * 10, now=15.0) == 1005
    assert ours.decide([heavy], now=20.5) == 1095  # 12.7 + 3.2 * 1410 / f
    assert ours.counters.switches == 3


def test_the_least_energy_clock_is_the_sweet_spot_where_that_is_feasible():
    table, energy = wide("prefill")
    calm, late = Iteration(running=2, tokens=4000), Iteration(running=2, tokens=4000, queue_wait_s=(0.5,))
    every = LeastEnergy(table, WIDE, 800.0, margin=0.0, energy=energy)
    assert every.decide([calm]) == 990  # not 510, which is feasible: 672 ms
    assert every.decide([late]) == 1200  # 282 ms; 300 are left
    assert every.decide([Iteration(running=2, tokens=4000, waiting=1)]) == 1410
    # Where idle power is paid for anyway, slower is cheaper down to the lowest clock.
    assert LeastEnergy(table, WIDE, 800.0, margin=0.0, energy=energy, idle_w=62.0).decide([calm]) == 510
    assert every.decide([Iteration(running=2, tokens=20_000)]) == 1410
    assert every.counters.infeasible == 1


def test_planning_leaves_room_for_the_batch_behind():
    table, energy = wide("prefill")
    plan = ModelPredictive(table, WIDE, 800.0, margin=0.0, energy=energy, idle_w=62.0)
    assert plan.decide([Iteration(0.0, 2, 2, 4000, queue_wait_s=(0.0, 0.0))]) == 510
    # All have waited 0.3 s already, 2000 tokens of them stay behind: 500 ms for both.
    behind = Iteration(0.0, 2, 3, 4000, waiting=1, queue_wait_s=(0.3, 0.3, 0.3))
    fresh = ModelPredictive(table, WIDE, 800.0, margin=0.0, energy=energy, idle_w=62.0)
    chosen = fresh.decide([behind])
    both = [table.predict(chosen, 1, 4000) + table.predict(second, 1, 2000) for second in WIDE]
    assert min(both) <= 500
    pairs = [
        ((energy.predict(f, 1, 4000) + energy.predict(s, 1, 2000)) - 0.062 * total, f)
        for f in WIDE
        for s in WIDE
        if (total := table.predict(f, 1, 4000) + table.predict(s, 1, 2000)) <= 500
    ]
    assert chosen == min(pairs)[1]
    # EcoFreq and its like would take the highest clock here.
    assert LeastEnergy(table, WIDE, 800.0, margin=0.0, energy=energy).decide([behind]) == 1410


def closed_loop(controller, table, rate, seconds=12.0, mean_output=100, slowness=1.0):
    """One decode worker, requests at random; joules above nothing, and the share of late tokens after a start-up."""
    rng = np.random.default_rng(0)
    time, left, held, clock, joules, late, tokens = 0.0, [], [], controller.freqs[0], 0.0, 0, 0
    while time < seconds:
        if not left:
            left, held = [int(rng.geometric(1 / mean_output))], [200]
        batch = len(left)
        itl = slowness * table.predict(clock, batch, sum(held))
        itl = 100.0 if math.isnan(itl) else itl
        joules += POWER.power_w(clock, "decode", 1.0) * itl / 1000
        time += itl / 1000
        if time > 3:
            tokens += batch
            late += batch * (itl > controller.target_ms)
        done = [n <= 1 for n in left]
        state = Iteration(time, batch, batch, sum(held))
        left = [n - 1 for n, over in zip(left, done) if not over]
        held = [n + 1 for n, over in zip(held, done) if not over]
        came = rng.poisson(rate * itl / 1000)
        left += [int(n) for n in rng.geometric(1 / mean_output, came)]
        held += [200] * came
        clock = controller.decide([state], (), time) or clock
    return joules, late / tokens


def test_planning_keeps_the_batch_below_a_step_that_it_cannot_bear():
    """Requests stay longer at a low clock, so batches grow over the step that the lowest feasible clock ignores."""
    table, energy = wide("decode")
    greedy = make_controller(config("ecofreq", freqs=WIDE, decode_slo_ms=17.5, margin=0.0), "decode", table)
    plan = ModelPredictive(table, WIDE, 17.5, margin=0.0, energy=energy, idle_w=62.0, mean_output=100.0)
    fast = StaticClock(WIDE)
    fast.target_ms = 17.5
    _, greedy_late = closed_loop(greedy, table, 36.0)
    plan_j, plan_late = closed_loop(plan, table, 36.0)
    static_j, static_late = closed_loop(fast, table, 36.0)
    assert static_late < 0.02
    assert greedy_late > 0.1
    assert plan_late < static_late + 0.03
    assert plan_j < 0.95 * static_j


def test_planning_corrects_a_table_that_is_too_fast():
    table, energy = wide("decode")
    plan = ModelPredictive(table, WIDE, 16.0, margin=0.0, energy=energy, idle_w=62.0, mean_output=100.0)
    _, late = closed_loop(plan, table, 15.0, seconds=8.0, slowness=1.15)
    assert late < 0.05
    assert plan.correction == pytest.approx(1.15, abs=0.05)


def test_decisions_name_the_highest_clock_where_none_lasts():
    table, energy = wide("decode")
    plan = ModelPredictive(table, WIDE, 12.0, margin=0.0, energy=energy)
    assert plan.decide([Iteration(0.0, 200, 200, 40_000)]) == 1410
    assert plan.decide([Iteration(0.1, 999, 999, 40_000)]) == 1410
    assert (plan.counters.infeasible, plan.counters.unpredicted) == (2, 1)
    assert plan.decide([]) is None


def test_rates_fade():
    rate = Rate(memory_s=1.0)
    rate.see([Iteration(0.1 * index, tokens=50) for index in range(30)], lambda before, each: each.tokens)
    assert rate.per_s == pytest.approx(500)
    rate.see([Iteration(2.9 + 0.1 * index, tokens=0) for index in range(1, 40)], lambda before, each: each.tokens)
    assert rate.per_s < 30
    rate.see([Iteration(0.0)], lambda before, each: 1 / 0)  # time does not run backwards
    assert EnergyTable is type(ENERGY)
