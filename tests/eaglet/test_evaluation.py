"""Reports with intervals, comparisons, controls, and what reinforcement costs."""

import math

import numpy as np
import pytest

from jaxlab.core import statistics
from jaxlab.eaglet import (
    Executor,
    Plan,
    Planner,
    RolloutCache,
    ShuffledPlans,
    compare,
    evaluate,
    false_gain_rate,
    sample_plans,
)
from jaxlab.eaglet.controls import Sampled
from jaxlab.eaglet.cost import Counts, executor_update, planner_update
from tests.eaglet import toys
from tests.eaglet.toys import TASK, EchoEnv, Says, plan, task

TASKS = [task(f"toy-{k}") for k in range(4)]
NOVICE = Says("novice", "huh")


def half_yes(task):
    return plan("yes") if task.id in ("toy-0", "toy-1") else plan("half")


@pytest.mark.latest
def test_a_report_and_a_comparison():
    cache = RolloutCache()
    without = evaluate(EchoEnv(), NOVICE, TASKS, seeds=(0, 1), cache=cache)
    assert (without.reward.mean, without.success.mean, without.steps.mean) == (0, 0, 5)
    assert len(cache) == 8
    made = EchoEnv.made
    assert evaluate(EchoEnv, NOVICE, TASKS, seeds=(0, 1), cache=cache) == without
    assert EchoEnv.made == made

    report = evaluate(EchoEnv(), NOVICE, TASKS, planner=half_yes, seeds=(0, 1))
    assert report.table[0] == {
        "task_id": "toy-0", "type": "toy", "seed": 0, "plan": "Step 1: yes", "reward": 1.0, "success": True, "steps": 1,
    }  # fmt: skip
    values = [row["reward"] for row in report.table]
    clusters = [row["task_id"] for row in report.table]
    assert report.reward == statistics.bootstrap_ci(values, clusters=clusters)
    assert report.success.mean == 0.5

    gained = compare(report, without)
    assert (gained.reward.mean, gained.success.mean, gained.steps.mean) == (0.75, 0.5, -2)
    assert gained.reward.low > 0
    assert gained.pvalue == 2 * 0.5**4
    one = evaluate(EchoEnv(), NOVICE, TASKS[:1])
    assert math.isnan(one.reward.low)
    assert compare(report, one).success.mean == 1
    with pytest.raises(ValueError, match="baseline: expected a report on the same tasks and seeds"):
        compare(report, evaluate(EchoEnv(), NOVICE, [TASK]))


def test_fatal_rewards_count_as_nothing():
    report = evaluate(EchoEnv(), NOVICE, TASKS[:2], planner=lambda _: plan("die"))
    assert (report.reward.mean, report.success.mean, report.steps.mean) == (0, 0, 1)


def test_bad_inputs_of_an_evaluation():
    for tasks, seeds, message in (([], (0,), "tasks"), (TASKS, (), "seeds"), (TASKS, (1, 1), "seeds")):
        with pytest.raises(ValueError, match=f"{message}: expected at least one"):
            evaluate(EchoEnv(), NOVICE, tasks, seeds=seeds)
    with pytest.raises(FloatingPointError, match="'bad' with plan 'Step 1: yes' gave NaN"):
        evaluate(EchoEnv(), NOVICE, [task("bad", nan=True)], planner=lambda _: plan("yes"))
    with pytest.raises(ValueError, match="other_seeds: expected 1, got 2"):
        false_gain_rate(EchoEnv(), NOVICE, TASKS, other_seeds=(1, 2))


def test_what_an_empty_plan_gains():
    class Lucky(Executor):
        name = "lucky"

        def act(self, context):
            return "yes" if context.seed == 1 else "half"

    assert false_gain_rate(EchoEnv(), Lucky(), TASKS, seeds=(0, 1)) == 0
    assert false_gain_rate(EchoEnv(), Lucky(), TASKS, seeds=(0, 1), other_seeds=(1, 2)) == 0.5


def test_shuffled_plans():
    others = [toys.task(name) for name in "abc"]
    one = toys.Task("x", "Say yes.", 5, "another", "train")
    handed = ShuffledPlans(lambda task: plan(task.id), [*others, one])
    assert {handed(each).plan for each in others} == {"Step 1: x"}
    same = ShuffledPlans(lambda task: plan(task.id), [*others, one], same_type=True)
    assert [same(each).plan for each in others] == [same(each).plan for each in others]
    assert all(same(each).plan != f"Step 1: {each.id}" for each in others)
    with pytest.raises(ValueError, match="another one of the same type as 'x', 'another'"):
        same(one)


def test_the_best_of_many_and_pairs_for_preferences():
    planner = Planner(*toys.decoder(), toys.tokenizer(), max_tokens=16)
    drawn = sample_plans(planner, TASKS[:2], env=EchoEnv(), executors=(Says("expert", "half"), NOVICE), n=4)
    assert drawn.rewards.shape == (2, 4)
    assert drawn.preferences() == []  # an untrained one never gets the format right
    words = [[plan("huh"), plan("yes"), plan("half")], [plan("yes")] * 3]
    rewards = np.array([[1.0, 3.0, 2.0], [3.0, 3.0, 3.0]])
    known = Sampled(TASKS[:2], words, rewards)
    assert known.best() == [(TASKS[0], plan("yes")), (TASKS[1], plan("yes"))]
    assert known.preferences() == [(TASKS[0], plan("yes"), plan("huh"))]
    assert isinstance(known.preferences()[0][1], Plan)


def test_the_cost_of_an_update():
    counts = Counts(
        tasks=8, group=8, steps=20.0, step_tokens=50.0, prompt_tokens=100.0,
        plan_prompt_tokens=10.0, plan_tokens=30.0,
    )  # fmt: skip
    mine, theirs = planner_update(counts, 2.0, 3.0), executor_update(counts, 3.0)
    assert (mine.environment_steps, theirs.environment_steps) == (8 * 8 * 2 * 20, 8 * 8 * 20)
    assert mine.executor_tokens == 128 * 1100
    assert mine.trained_tokens == 64 * 40
    assert mine.flops == 12 * 2.0 * 64 * 40 + 2 * 3.0 * 128 * 1100
    assert theirs.trained_tokens == theirs.executor_tokens == 64 * 1100
    assert theirs.flops == 12 * 3.0 * 64 * 1100
