"""Episodes, pairs of them, rewards and the filter; workers that die or hang."""

import dataclasses
import functools

import numpy as np
import pytest

from jaxlab.core import jsonl
from jaxlab.eaglet import (
    Context,
    Executor,
    GoldPathPlanSource,
    GridGuide,
    GridQuestEnv,
    RolloutCache,
    ScriptedExecutor,
    ecgr,
    hcf_filter,
    plan_rewards,
    rollout,
)
from tests.eaglet.toys import BROKEN, TASK, EchoEnv, Says, SaysAtOnce, plan, task

EXPERT, NOVICE = Says("expert", "half"), Says("novice", "huh")


@pytest.mark.latest
def test_an_episode():
    got = rollout(EchoEnv(), Says("x", "half", "huh", "yes"), TASK, plan="no", seed=3)
    assert got.actions == ("no", "half", "huh", "yes")
    assert (got.task_id, got.executor, got.seed, got.plan) == ("toy", "x", 3, "no")
    assert (got.reward, got.steps, got.done) == (1.0, 4, True)
    assert got.observations[0].startswith("Seed 3")
    assert got.observations[1:] == tuple(f"You said {word}." for word in got.actions)


def test_ends_of_episodes():
    at_cap = rollout(EchoEnv(), EXPERT, TASK)
    assert (at_cap.reward, at_cap.steps, at_cap.done, at_cap.plan) == (0.5, 5, False, "")
    assert rollout(EchoEnv(), EXPERT, TASK, max_steps=2).steps == 2
    fatal = rollout(EchoEnv(), Says("x", "half", "die"), TASK)
    assert (fatal.reward, fatal.steps, fatal.done) == (-1.0, 2, True)
    lost = rollout(EchoEnv(), Says("x", "huh", "half", "huh"), TASK, max_consecutive_invalid=2)
    assert lost.actions == ("huh", "half", "huh", "huh")


class Watching(Executor):
    name = "watching"

    def __init__(self):
        self.seen = []

    def act(self, context):
        self.seen.append(context)
        return "half"


@pytest.mark.parametrize("insert", ["query", "observation"])
def test_where_the_plan_stands(insert):
    executor = Watching()
    got = rollout(EchoEnv(), executor, TASK, plan="Step 1: yes", seed=1, max_steps=2, insert=insert)
    first, second = executor.seen
    shown = "" if insert == "query" else "\n\nThis plan may help you:\nStep 1: yes"
    assert first == Context(
        TASK, "Step 1: yes" if insert == "query" else "", (), got.observations[0] + shown, 0, 1, ("yes", "half")
    )
    assert second.history == (("half", first.observation),)
    assert (second.step, second.observation) == (1, f"You said half.{shown}")
    assert got.plan == "Step 1: yes"


def test_bad_inputs_of_an_episode():
    with pytest.raises(ValueError, match="insert: expected one of query, observation, got 'thought'"):
        rollout(EchoEnv(), EXPERT, TASK, insert="thought")
    with pytest.raises(ValueError, match="max_steps: expected None or at least 1, got 0"):
        rollout(EchoEnv(), EXPERT, TASK, max_steps=0)


def test_the_cache(tmp_path):
    path = tmp_path / "baselines.jsonl"
    cache = RolloutCache(path)
    got = rollout(EchoEnv(), EXPERT, TASK)
    cache.put(got)
    again = RolloutCache(path)
    assert again.get("toy", "expert", 0) == got
    assert len(again) == len(RolloutCache()) + 1
    with pytest.raises(KeyError, match="toy-2"):
        cache.get("toy-2", "expert", 0)
    with pytest.raises(ValueError, match="without a plan"):
        cache.put(dataclasses.replace(got, plan="Step 1: yes"))
    jsonl.append(path, {"else": 1})
    with pytest.raises(ValueError, match=r"baselines.jsonl to hold rollouts"):
        RolloutCache(path)


@pytest.mark.latest
def test_rewards_of_plans():
    cache = RolloutCache()
    long = dataclasses.replace(plan("yes"), ok=False, reason="too_long")
    pairs = [(TASK, plan("half yes")), (TASK, BROKEN), (TASK, plan("die")), (TASK, long)]
    got = plan_rewards(pairs, env=EchoEnv(), executors=(EXPERT, NOVICE), cache=cache, seeds=(0, 7), alpha=0.1)
    np.testing.assert_allclose(got.ecgr, [2 * 1.1**3, 0, 0, 2 * 1.1**4])
    assert got.format.tolist() == [1, 0, 1, 0]
    np.testing.assert_allclose(got.final, got.ecgr + got.format)
    assert [(pair.executor, pair.seed) for pair in got.pairs[:4]] == [
        (x, s) for x in ("expert", "novice") for s in (0, 7)
    ]
    assert all(pair.without is None and pair.with_plan is None for pair in got.pairs[4:8])
    assert got.env_steps == 2 * 2 * (5 + 2 + 1 + 1)
    assert len(cache) == 4
    again = plan_rewards(pairs, env=EchoEnv(), executors=(EXPERT, NOVICE), cache=cache, seeds=(0, 7), alpha=0.1)
    assert again.env_steps == 2 * 2 * (2 + 1 + 1)
    np.testing.assert_array_equal(again.final, got.final)
    bounded = plan_rewards(pairs, env=EchoEnv(), executors=(EXPERT, NOVICE), cache=cache, alpha=1.0, max_decay=2.0)
    assert bounded.ecgr.tolist() == [4, 0, 0, 4]


def test_means_over_seeds_are_compared():
    class Lucky(Executor):
        name = "lucky"

        def act(self, context):
            return "yes" if context.seed == 1 or (context.plan and context.step == context.seed) else "half"

    pairs = [(TASK, plan("anything"))]
    got = plan_rewards(pairs, env=EchoEnv(), executors=(Lucky(), NOVICE), cache=None, seeds=(0, 1), alpha=0.1)
    assert got.ecgr[0] == pytest.approx(ecgr([1.0, 0.0], [0.75, 0.0], [3.0, 5.0], [1.0, 5.0], alpha=0.1))


def test_bad_inputs_of_rewards():
    pairs = [(TASK, plan("yes"))]
    rewards = functools.partial(plan_rewards, env=EchoEnv(), cache=RolloutCache())
    for executors in ((EXPERT, EXPERT), (EXPERT, Says("expert", "yes"))):
        with pytest.raises(ValueError, match="executors: expected different ones, got 'expert' twice"):
            rewards(pairs, executors=executors)
        with pytest.raises(ValueError, match="no consensus"):
            hcf_filter(pairs, *executors, env=EchoEnv())
    with pytest.raises(ValueError, match="pairs: expected at least one"):
        rewards([], executors=(EXPERT, NOVICE))
    with pytest.raises(ValueError, match="seeds"):
        rewards(pairs, executors=(EXPERT, NOVICE), seeds=())
    with pytest.raises(FloatingPointError, match=r"task 'bad' with plan 'Step 1: yes' gave NaN"):
        rewards([(task("bad", nan=True), plan("yes"))], executors=(EXPERT, NOVICE))


@pytest.mark.latest
def test_the_filter():
    harmless, harmful = plan("half"), plan("huh huh huh huh huh")
    pairs = [(TASK, harmless), (TASK, harmful), (TASK, BROKEN), (TASK, plan("yes"))]
    got = hcf_filter(pairs, EXPERT, NOVICE, env=EchoEnv())
    assert got.kept == [pairs[0], pairs[3]]
    assert got.dropped == [pairs[1], pairs[2]]
    assert got.table[0] == {"task_id": "toy", "r_with": [0.5, 0.5], "r_without": [0.5, 0.0], "keep": True}
    assert got.table[1] == {"task_id": "toy", "r_with": [0.0, 0.0], "r_without": [0.5, 0.0], "keep": False}
    assert got.table[2]["r_with"] == [None, None]
    assert hcf_filter(pairs, EXPERT, NOVICE, env=EchoEnv(), strict=True).kept == [pairs[3]]
    assert hcf_filter([], EXPERT, NOVICE, env=EchoEnv()).table == []


def test_an_empty_plan_gains_nothing_and_episodes_repeat():
    env = GridQuestEnv()
    executors = [ScriptedExecutor(name, GridGuide(), skill=skill) for name, skill in (("e", 0.5), ("n", 0.1))]
    for executor in executors:
        for one in env.tasks("seen")[:4]:
            assert rollout(env, executor, one, plan=None, seed=5) == rollout(env, executor, one, plan="", seed=5)


def test_corrupt_plans_are_worth_less():
    env = GridQuestEnv()
    executors = tuple(ScriptedExecutor(name, GridGuide(), skill=skill) for name, skill in (("e", 0.5), ("n", 0.1)))
    tasks, cache = env.tasks("train")[:12], RolloutCache()
    gained = {}
    for corruption in (0.0, 1.0):
        write = GoldPathPlanSource(env, corruption=corruption)
        assert {write.fault(one) is None for one in tasks} == {corruption == 0.0}
        pairs = [(one, write(one)) for one in tasks]
        gained[corruption] = plan_rewards(pairs, env=env, executors=executors, cache=cache).ecgr.mean()
    assert gained[0.0] > gained[1.0] + 0.5


def test_workers():
    """One environment a process, and the same rewards as in this one."""
    pairs = [(task(f"toy-{k}"), plan("half yes")) for k in range(6)]
    arguments = {"executors": (EXPERT, NOVICE), "seeds": (0, 1)}
    got = plan_rewards(pairs, env=EchoEnv, cache=RolloutCache(), workers=2, **arguments)
    here = plan_rewards(pairs, env=EchoEnv(), cache=RolloutCache(), **arguments)
    np.testing.assert_array_equal(got.final, here.final)
    assert got.env_steps == here.env_steps
    firsts = {
        rollout.observations[0].partition(", ")[2] for pair in got.pairs for rollout in (pair.without, pair.with_plan)
    }
    processes = [text.split(",")[0] for text in firsts]
    assert len(processes) == len(set(processes)) <= 2


def test_dead_and_hung_workers_cost_an_episode_at_most(tmp_path):
    pairs = [
        (task("dies-once", exit=str(tmp_path / "a")), plan("yes")),
        (task("hangs-once", hang=str(tmp_path / "b")), plan("yes")),
        (task("well"), plan("yes")),
        (task("broken", broken=True), plan("yes")),
    ]
    with pytest.warns(RuntimeWarning, match=r"4 of 16 episodes were lost; broken: OSError: out of order"):
        got = plan_rewards(
            pairs, env=EchoEnv, executors=(EXPERT, NOVICE), cache=None, workers=2, timeout_s=3.0, alpha=0.0
        )
    assert got.ecgr.tolist() == [2, 2, 2, 0]
    assert [pair.complete for pair in got.pairs] == [True] * 6 + [False] * 2
    with pytest.warns(RuntimeWarning):
        report = hcf_filter(pairs[2:], EXPERT, NOVICE, env=EchoEnv, workers=2)
    assert [row["keep"] for row in report.table] == [True, False]
    with pytest.raises(RuntimeError, match="every episode in a worker was lost; broken"):
        plan_rewards(pairs[3:], env=EchoEnv, executors=(EXPERT, NOVICE), cache=None, workers=2)


def test_an_executor_that_acts_at_once():
    both = SaysAtOnce("expert", "half"), SaysAtOnce("novice", "huh")
    pairs = [(task(f"toy-{k}"), plan("half yes")) for k in range(12)]
    made = []

    def make():
        made.append(EchoEnv())
        return made[-1]

    got = plan_rewards(pairs, env=make, executors=both, cache=None)
    want = plan_rewards(pairs, env=EchoEnv(), executors=(EXPERT, NOVICE), cache=None)
    np.testing.assert_array_equal(got.final, want.final)
    assert max(both[0].sizes) == 16
    assert len(made) == 32
    assert all(env.closed for env in made)
