"""What a planner is compared with: others' plans as the floor, the best of many as the ceiling, pairs for DPO."""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxlab.eaglet.envs.base import Task
from jaxlab.eaglet.executors import Executor
from jaxlab.eaglet.pairs import plan_rewards
from jaxlab.eaglet.planner import Planner
from jaxlab.eaglet.plans import Plan
from jaxlab.eaglet.rollouts import Env, RolloutCache
from jaxlab.eaglet.synth import PlanSource


class ShuffledPlans:
    """Plans that were written for another task, drawn by seed and task: a plan as such must gain nothing."""

    def __init__(self, source: PlanSource, tasks: Sequence[Task], *, same_type: bool = False, seed: int = 0):
        """Takes plans from a source.

        Args:
          source: writes the plans, such as a planner.
          tasks: whose plans are handed out.
          same_type: take those of tasks of the same type, else of another one.
          seed: of the draw.
        """
        self._source, self._tasks, self._same, self._seed = source, tuple(tasks), same_type, seed

    def __call__(self, task: Task) -> Plan:
        """Another task's plan.

        Raises:
          ValueError: there is no such task.
        """
        others = [each for each in self._tasks if each.id != task.id and (each.type == task.type) == self._same]
        if not others:
            kind = "the same type" if self._same else "another type"
            raise ValueError(f"tasks: expected another one of {kind} as {task.id!r}, {task.type!r}, got none")
        chance = np.random.default_rng((self._seed, zlib.crc32(task.id.encode())))
        return self._source(others[chance.integers(len(others))])


class Sampled(NamedTuple):
    """Plans that were drawn for tasks, and what they earned.

    Attributes:
      tasks: P of them.
      plans: `[P][G]`.
      rewards: `[P,G]`, gain and format.
    """

    tasks: list[Task]
    plans: list[list[Plan]]
    rewards: np.ndarray

    def best(self) -> list[tuple[Task, Plan]]:
        """The best plan of each task: an upper bound, since it is chosen by what it earned."""
        return [(task, group[int(k)]) for task, group, k in zip(self.tasks, self.plans, self.rewards.argmax(axis=1))]

    def preferences(self) -> list[tuple[Task, Plan, Plan]]:
        """Task, best plan and worst plan for preference optimisation as in MPO; equal ones are left out."""
        return [
            (task, group[int(row.argmax())], group[int(row.argmin())])
            for task, group, row in zip(self.tasks, self.plans, self.rewards)
            if row.max() > row.min()
        ]


def sample_plans(
    planner: Planner,
    tasks: Sequence[Task],
    *,
    env: Env,
    executors: tuple[Executor, Executor],
    n: int = 8,
    temperature: float = 1.0,
    cache: RolloutCache | None = None,
    seeds: Sequence[int] = (0,),
    alpha: float = 0.01,
    seed: int = 0,
) -> Sampled:
    """Draws n plans of each task and tries them out.

    Args:
      planner: writes them.
      tasks: what for.
      env: as in `plan_rewards`, like the next three.
      executors: expert and novice.
      n: plans of each task.
      temperature: of the draws.
      cache: of baselines.
      seeds: of the episodes.
      alpha: of `capability_gain`.
      seed: of the draws.
    """
    drawn = planner.plan_all(
        [task.instruction for task in tasks], rng=jax.random.key(seed), temperature=temperature, n=n
    )
    pairs = [(task, plan) for task, group in zip(tasks, drawn) for plan in group]
    rewards = plan_rewards(pairs, env=env, executors=executors, cache=cache, seeds=seeds, alpha=alpha).final
    return Sampled(list(tasks), drawn, rewards.reshape(len(tasks), n))
