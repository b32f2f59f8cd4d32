"""What it takes to reach a target, on made-up curves: smoothing, censored runs, paired ratios, collapse."""

import dataclasses
import types

import numpy as np
import pytest

from jaxlab.sfpo.comparison import Costs, Curve, collapsed, compare, first_at, smoothed, target_of


def curve(values, *, rollouts=100, seconds=1.0) -> Curve:
    """Measured every step, so many rollouts and seconds apart."""
    steps = np.arange(len(values))
    return Curve(
        steps=steps,
        rollouts=rollouts * steps.astype(float),
        seconds=seconds * steps,
        sampled=np.asarray(values, float),
        greedy=np.asarray(values, float),
        entropy=np.ones(len(values) - 1),
        rollout_seconds=0.1,
        update_seconds=0.2,
        fast_steps=0,
        skipped=0,
    )


def test_smoothing_looks_back():
    np.testing.assert_allclose(smoothed(np.array([1.0, 3.0, 5.0, 1.0]), 3), [1, 2, 3, 3])
    np.testing.assert_allclose(smoothed(np.array([1.0, 3.0]), 1), [1, 3])


def test_the_target_is_a_share_of_the_mean_gain():
    runs = [curve([0.2, 0.4, 0.6, 0.5]), curve([0.2, 0.4, 0.4, 0.7])]
    assert target_of(runs, 1.0, 1) == pytest.approx(0.6)  # at the last step, not the mean of each run's best
    assert target_of(runs, 0.5, 1) == pytest.approx(0.4)


@pytest.mark.latest
def test_ratios_are_paired_by_seed():
    slow = [curve([0.2, 0.3, 0.4, 0.5, 0.6]), curve([0.2, 0.2, 0.4, 0.5, 0.6])]
    fast = [curve([0.2, 0.6, 0.6, 0.6, 0.6], seconds=3.0), curve([0.2, 0.5, 0.6, 0.6, 0.6], seconds=3.0)]
    base, other = compare({"grpo": slow, "sfpo": fast}, shares=(1.0,), width=1)
    assert (base.reached, other.reached, other.runs, base.ratios["rollouts"].mean) == (2, 2, 2, 1.0)
    assert other.needed == {"rollouts": 150.0, "seconds": 4.5}
    ratio = other.ratios["rollouts"]
    assert ratio.mean == pytest.approx(np.sqrt(4 / 1 * 4 / 2))
    assert (ratio.low, ratio.high) == (pytest.approx(2), pytest.approx(4))
    assert ratio.bound == ""
    assert other.ratios["seconds"].mean == pytest.approx(ratio.mean / 3)


def test_the_start_does_not_count_as_reaching():
    flat = curve([0.5, 0.4, 0.5])
    assert target_of([flat], 1.0, 1) == 0.5
    assert first_at(flat, 0.5, 1) == 2
    assert first_at(curve([0.5, 0.4, 0.3]), 0.5, 1) is None


@pytest.mark.parametrize(
    ("first", "second", "bound", "mean", "reached"),
    [
        ([0.2, 0.4, 0.6], [0.2, 0.3, 0.3], "at most", 2 / 2, 0),  # its whole budget is too little for it
        ([0.2, 0.6, 0.6], [0.2, 0.3, 0.3], "at most", 1 / 2, 0),
        ([0.2, 0.4, 0.6], [0.2, 0.6, 0.6], "", 2 / 1, 2),
    ],
)
def test_runs_that_never_get_there(first, second, bound, mean, reached):
    outcome = compare({"grpo": [curve(first)] * 2, "sfpo": [curve(second)] * 2}, shares=(1.0,), width=1)[1]
    assert (outcome.ratios["rollouts"].bound, outcome.reached) == (bound, reached)
    assert outcome.ratios["rollouts"].mean == pytest.approx(mean)


def test_a_first_method_whose_runs_miss_their_own_mean_best():
    mixed = [curve([0.2, 0.4, 0.8]), curve([0.2, 0.4, 0.4])]  # the target is 0.6
    good, bad = [curve([0.2, 0.8, 0.8])] * 2, [curve([0.2, 0.8, 0.8]), curve([0.2, 0.2, 0.2])]
    base, at_least, unknown = compare({"grpo": mixed, "sfpo": good, "dapo": bad}, shares=(1.0,), width=1)
    assert (base.reached, base.ratios["rollouts"].bound) == (1, "")
    assert at_least.ratios["rollouts"].bound == "at least"
    assert unknown.ratios["rollouts"].bound == "unknown"
    assert at_least.ratios["rollouts"].mean == pytest.approx(2.0)


def test_one_seed_has_no_interval():
    outcome = compare({"grpo": [curve([0.2, 0.4, 0.6])], "sfpo": [curve([0.2, 0.6, 0.6])]}, shares=(0.5, 1.0), width=1)
    assert [(x.method, x.share) for x in outcome] == [("grpo", 0.5), ("sfpo", 0.5), ("grpo", 1.0), ("sfpo", 1.0)]
    assert outcome[3].ratios["rollouts"] == dataclasses.replace(outcome[3].ratios["rollouts"], low=None, high=None)


def test_unequal_numbers_of_runs():
    for curves in ({"grpo": [], "sfpo": []}, {"grpo": [curve([0.1, 0.2])], "sfpo": []}):
        with pytest.raises(ValueError, match="as many runs"):
            compare(curves, shares=(1.0,), width=1)


def test_collapse():
    assert not collapsed(curve([0.2, 0.4, 0.6]), 1)
    assert not collapsed(curve([0.2, 0.6, 0.41]), 1)
    assert collapsed(curve([0.2, 0.6, 0.39]), 1)
    assert collapsed(curve([0.2, 0.2, 0.1]), 1)
    assert not collapsed(curve([0.2, 0.2, 0.2]), 1)


def test_a_log_becomes_a_curve():
    logged = {"entropy": 1.0, "rollout_seconds": 1.0, "update_seconds": 2.0, "skipped": 0.0}
    steps = [{**logged, "compilations": 3.0 * (i == 0), "sfpo_active": float(i < 3)} for i in range(4)]
    steps[0] |= {"rollout_seconds": 50.0, "update_seconds": 60.0}  # it compiled, and counts as the others
    steps[1] |= {"rollout_seconds": 3.0, "sampling_rounds": 3.0, "skipped": 2.0}
    steps[3] |= {"update_seconds": 0.5}
    found = [{"step": 2, "sampled": 0.3, "greedy": 0.4}, {"step": 4, "sampled": 0.5, "greedy": 0.6}]
    before = types.SimpleNamespace(sampled=0.1, greedy=0.2)
    assert Costs.of(steps) == (1.0, 0.5, 2.0)
    made = Curve.of(steps, found, before, 10)
    assert made.steps.tolist() == [0, 2, 4]
    assert made.rollouts.tolist() == [0, 40, 60]
    assert made.seconds.tolist() == [0, 3 + 5, 3 + 5 + 3 + 1.5]
    assert made.sampled.tolist() == [0.1, 0.3, 0.5]
    assert (made.fast_steps, made.skipped, made.rollout_seconds, made.update_seconds) == (3, 2, 6 / 4, 6.5 / 4)
    assert Curve.of(steps, found, before, 10, Costs(1.0, 1.0, 1.0)).seconds.tolist() == [0, 2 + 4, 2 + 4 + 4]


def test_an_interruption_does_not_count():
    rows = [
        {"compilations": 0, "sfpo_active": 0.0, "rollout_seconds": 0.1, "update_seconds": taken}
        for taken in (0.2, 3600.0, 0.2)
    ]
    assert Costs.of(rows) == (0.1, 0.2, 0.0)
