"""Episodes with and without a plan under the same seeds, and what plans earn by them."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from jaxlab.eaglet.envs.base import Task
from jaxlab.eaglet.executors import Executor
from jaxlab.eaglet.gain import ecgr, final_reward
from jaxlab.eaglet.plans import Plan
from jaxlab.eaglet.rollouts import Env, Job, Rollout, RolloutCache, run


@dataclasses.dataclass(frozen=True)
class PairedRollout:
    """One executor's episodes with and without a plan, under one seed.

    Attributes:
      task_id: of which task.
      executor: name of who acted.
      seed: of both.
      without: the episode without a plan; None where the plan was not tried, or the episode was lost.
      with_plan: the episode with it; None likewise.
    """

    task_id: str
    executor: str
    seed: int
    without: Rollout | None
    with_plan: Rollout | None

    @property
    def complete(self) -> bool:
        """Whether both episodes are there."""
        return self.without is not None and self.with_plan is not None


@dataclasses.dataclass(frozen=True)
class PlanRewards:
    """What plans earned.

    Attributes:
      ecgr: executor capability gain reward, `[P]` float64.
      format: 1 for the right format, else 0, `[P]`.
      final: their sum, `[P]`.
      pairs: of each plan, each executor, each seed, in that nesting.
      env_steps: actions done in environments for this, baselines included that were not yet cached.
    """

    ecgr: np.ndarray
    format: np.ndarray
    final: np.ndarray
    pairs: list[PairedRollout]
    env_steps: int


def plan_rewards(
    pairs: Sequence[tuple[Task, Plan]],
    *,
    env: Env,
    executors: tuple[Executor, ...],
    cache: RolloutCache | None,
    seeds: Sequence[int] = (0,),
    alpha: float = 0.01,
    max_decay: float | None = None,
    tie_bonus: bool = False,
    workers: int | None = None,
    timeout_s: float | None = None,
) -> PlanRewards:
    """Tries plans out with both executors, each episode beside the same one without a plan.

    Rewards and steps are means over the seeds. A plan without text is not tried: its gain is 0. An episode that is lost
    (a worker died, hung or raised, twice) is left out with its partner; where that leaves an executor none, its gain is
    0. A warning tells of either.

    Args:
      pairs: tasks and plans for them.
      env: an environment, used in this process; or a function without arguments that makes one, called once a worker
        process. An executor with `act_batch` stays in this process, and then so do several environments.
      executors: expert and novice; or one of them alone.
      cache: where baselines are found, and put; None: nowhere.
      seeds: of the episodes.
      alpha: of `capability_gain`, as `max_decay` and `tie_bonus`.
      max_decay: see there.
      tie_bonus: see there.
      workers: processes; None: one a CPU.
      timeout_s: limit for one episode in a worker.

    Raises:
      ValueError: no plan, no seed, or one executor (or name) twice.
      FloatingPointError: a reward is NaN; the message names task and plan.
      RuntimeError: every episode was lost; the message has the first reason.
    """
    if not pairs:
        raise ValueError("pairs: expected at least one task with a plan, got none")
    paired, env_steps = paired_rollouts(
        pairs, env=env, executors=executors, cache=cache, seeds=seeds, workers=workers, timeout_s=timeout_s
    )
    r1, r0, n, m = means(paired, len(pairs), len(executors))
    known = ~np.isnan(r1)  # where nothing is known, the gain is 0: no rewards, equal steps
    r1, r0, n, m = (np.where(known, values, empty) for values, empty in ((r1, 0.0), (r0, 0.0), (n, 1.0), (m, 1.0)))
    gained = ecgr(r1, r0, n, m, alpha=alpha, max_decay=max_decay, tie_bonus=tie_bonus, allow_raw=True)
    formats = np.array([float(plan.ok) for _, plan in pairs])
    return PlanRewards(gained, formats, final_reward(gained, formats), paired, env_steps)


def means(pairs: Sequence[PairedRollout], plans: int, executors: int) -> tuple[np.ndarray, ...]:
    """Rewards with and without, steps without and with, `[plans, executors]`: means over the seeds that are complete.

    NaN where there is none.
    """
    table = np.full((4, len(pairs)), np.nan)
    for column, pair in enumerate(pairs):
        if pair.without is not None and pair.with_plan is not None:
            table[:, column] = pair.with_plan.reward, pair.without.reward, pair.without.steps, pair.with_plan.steps
    table = table.reshape(4, plans, executors, len(pairs) // max(plans * executors, 1))
    count = (~np.isnan(table)).sum(axis=-1)
    return tuple(np.where(count > 0, np.nansum(table, axis=-1) / np.maximum(count, 1), np.nan))


def check_executors(executors: Sequence[Executor]) -> None:
    """Raises the ValueError of an executor that would be compared with itself."""
    for one, other in itertools.combinations(executors, 2):
        if one is other or one.name == other.name:
            raise ValueError(
                f"executors: expected different ones, got {one.name!r} twice: agreement with oneself is no consensus"
            )


def paired_rollouts(
    pairs: Sequence[tuple[Task, Plan]],
    *,
    env: Env,
    executors: Sequence[Executor],
    cache: RolloutCache | None,
    seeds: Sequence[int],
    workers: int | None = None,
    timeout_s: float | None = None,
) -> tuple[list[PairedRollout], int]:
    """The episodes of `plan_rewards`, and how many actions were done for them; takes and raises what that does."""
    check_executors(executors)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds: expected at least one, none twice, got {tuple(seeds)}")
    cache = RolloutCache() if cache is None else cache
    jobs: dict[tuple[str, str, int, int], Job] = {}
    for task, plan in pairs:
        for number, seed in itertools.product(range(len(executors)), seeds):
            if not plan.plan:
                continue
            if (task.id, executors[number].name, seed) not in cache:
                jobs.setdefault((task.id, "", number, seed), Job(task, "", number, seed))
            jobs.setdefault((task.id, plan.plan, number, seed), Job(task, plan.plan, number, seed))
    made = dict(zip(jobs, run(list(jobs.values()), env, executors, workers, timeout_s)))
    env_steps = 0
    for (_, plan_text, _, _), done in made.items():
        if done is None:
            continue
        env_steps += done.steps
        if math.isnan(done.reward):
            raise FloatingPointError(f"reward: task {done.task_id!r} with plan {plan_text!r} gave NaN")
        if not plan_text:
            cache.put(done)
    results = []
    for task, plan in pairs:
        for (number, executor), seed in itertools.product(enumerate(executors), seeds):
            without = with_plan = None
            if plan.plan:
                with_plan = made[task.id, plan.plan, number, seed]
                if (task.id, executor.name, seed) in cache:
                    without = cache.get(task.id, executor.name, seed)
            results.append(PairedRollout(task.id, executor.name, seed, without, with_plan))
    return results, env_steps
