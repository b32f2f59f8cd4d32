"""EAGLET's environments: steps of ScienceWorld beside the package's own, and what cached baselines save.

A step of ours is timed on gold actions, the package's on the same ones, each in a Java process of its own; loading a
task is not counted. Environment steps are counted, not timed: a group of plans for each task of the grid world, whose
episodes without a plan are run once, against once a plan.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.harness import Case
from jaxlab.core.errors import MissingExtra, require
from jaxlab.eaglet import (
    GoldPathPlanSource,
    GridGuide,
    GridQuestEnv,
    RolloutCache,
    ScienceWorldEnv,
    ScriptedExecutor,
    Task,
    plan_rewards,
)

SYSTEM = "eaglet"
STEP_BAR = 4.0
STEPS_BAR = 1 / 0.55
TASKS = (("power-component", 15), ("find-animal", 225), ("chemistry-mix", 24), ("test-conductivity", 675), ("melt", 21))
GROUP = 8  # plans a task


def play(reset: Callable[[], Any], step: Callable[[str], Any], actions: Sequence[str]) -> tuple[int, float]:
    """Actions until the task is done, and their seconds, without those of the reset."""
    reset()
    start = time.perf_counter()
    for number, action in enumerate(actions, 1):
        if step(action)[2] or number == len(actions):
            return number, time.perf_counter() - start
    raise ValueError("actions: expected at least one, got none")


def science_world(quick: bool) -> Case:
    """Steps a second over all tasks, medians over the turns."""
    peer = require("scienceworld", "agents").ScienceWorldEnv("", envStepLimit=10_000)

    def load(task: Task) -> None:
        peer.load(task.data["task"], task.data["variation"], "easy", False)
        peer.reset()

    rates = []
    try:
        with ScienceWorldEnv() as env:
            paths = [
                (task, env.gold_actions(task)) for task in (env.task(*names) for names in TASKS[: 3 if quick else None])
            ]
            for _ in range(3 if quick else 6):
                counts = [
                    (*play(partial(env.reset, task), env.step, path), *play(partial(load, task), peer.step, path))
                    for task, path in paths
                ]
                rates.append([sum(column) for column in zip(*counts)])
    finally:
        peer.close()
    ours, theirs = (statistics.median(turn[k] / turn[k + 1] for turn in rates[1:]) for k in (0, 2))
    what = f"ScienceWorld, gold actions of {len(paths)} tasks"
    return Case(SYSTEM, what, "steps/s", ours, theirs, "scienceworld's step", STEP_BAR, higher_is_better=True)


def env_steps(tasks: int, *, shared: bool, visits: int) -> float:
    """Environment steps of the last of several updates on the same tasks, per plan."""
    env = GridQuestEnv(n_tasks=tasks)
    executors = tuple(ScriptedExecutor(name, GridGuide(), skill=skill) for name, skill in (("e", 0.5), ("n", 0.1)))
    cache, used = RolloutCache(), 0
    for _ in range(visits):
        used = 0
        for seed in range(GROUP):
            write = GoldPathPlanSource(env, corruption=0.8, seed=seed)
            pairs = [(task, write(task)) for task in env.tasks("train")]
            used += plan_rewards(
                pairs, env=env, executors=executors, cache=cache if shared else RolloutCache()
            ).env_steps
    return used / (tasks * GROUP)


def cases(quick: bool) -> Iterator[Case]:
    """Bars of the specification's section 7 that need no training."""
    tasks = 4 if quick else 32
    without = env_steps(tasks, shared=False, visits=1)
    for visits, what in ((1, "first"), (2, "second")):
        case = f"grid world, {tasks} tasks, {GROUP} plans each (4 of 5 with a fault), {what} update on them"
        kept = env_steps(tasks, shared=True, visits=visits)
        yield Case(SYSTEM, case, "environment steps a plan", kept, without, "baselines not cached", STEPS_BAR)
    if shutil.which("java") is not None:
        try:
            yield science_world(quick)
        except MissingExtra as error:
            print(f"ScienceWorld is left out: {error}")
    else:
        print("ScienceWorld is left out: there is no Java")
