"""How well an executor does with plans and without: reward, success and steps, each with its interval."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxlab.core import statistics
from jaxlab.core.statistics import Interval
from jaxlab.eaglet.envs.base import Task
from jaxlab.eaglet.executors import Executor
from jaxlab.eaglet.planner import Planner
from jaxlab.eaglet.plans import Plan
from jaxlab.eaglet.rollouts import Env, Job, Rollout, RolloutCache, run
from jaxlab.eaglet.synth import PlanSource

MEASURES = ("reward", "success", "steps")


@dataclasses.dataclass(frozen=True)
class EvalReport:
    """What an executor reached; 95 % intervals of a bootstrap that draws whole tasks. One task has none: NaN.

    Attributes:
      reward: best scores, a fatal one counts as 0.
      success: episodes with the full score.
      steps: actions done.
      table: for each task and seed `task_id`, `type`, `seed`, `plan`, `reward`, `success`, `steps`; without episodes
        that were lost.
    """

    reward: Interval
    success: Interval
    steps: Interval
    table: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One report minus another, on the tasks and seeds that both have; intervals as there.

    Attributes:
      reward: what was gained in reward.
      success: and in success.
      steps: difference of actions; negative is shorter.
      pvalue: of McNemar's exact test that both succeed equally often.
    """

    reward: Interval
    success: Interval
    steps: Interval
    pvalue: float


def evaluate(
    env: Env,
    executor: Executor,
    tasks: Sequence[Task],
    *,
    planner: Planner | PlanSource | None = None,
    seeds: Sequence[int] = (0,),
    cache: RolloutCache | None = None,
    workers: int | None = None,
    timeout_s: float | None = None,
) -> EvalReport:
    """Lets an executor do tasks, with the likeliest plan of a planner or without any.

    Args:
      env: an environment, or what makes one in each worker process, as in `plan_rewards`.
      executor: who acts.
      tasks: what is to be done.
      planner: writes one plan a task, which all seeds share; any `PlanSource` does. None: no plans.
      seeds: of the episodes; with the same ones, reports can be compared.
      cache: where episodes without a plan are found, and put.
      workers: processes; None: one a CPU.
      timeout_s: limit for one episode in a worker.

    Raises:
      ValueError: no task, or no seed or one twice.
      FloatingPointError: a reward is NaN.
      RuntimeError: every episode was lost.
    """
    if not tasks:
        raise ValueError("tasks: expected at least one, got none")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds: expected at least one, none twice, got {tuple(seeds)}")
    plans = ["" for _ in tasks] if planner is None else [plan.plan for plan in plans_of(planner, tasks)]
    cache = RolloutCache() if cache is None else cache
    jobs = [Job(task, plan, 0, seed) for task, plan in zip(tasks, plans) for seed in seeds]
    known = [not job.plan and (job.task.id, executor.name, job.seed) in cache for job in jobs]
    new = iter(run([job for job, found in zip(jobs, known) if not found], env, [executor], workers, timeout_s))
    table = []
    for job, found in zip(jobs, known):
        done = cache.get(job.task.id, executor.name, job.seed) if found else next(new)
        if done is None:
            continue
        if np.isnan(done.reward):
            raise FloatingPointError(f"reward: task {job.task.id!r} with plan {job.plan!r} gave NaN")
        if not found and not job.plan:
            cache.put(done)
        table.append(_row(job.task, done))
    clusters = [row["task_id"] for row in table]
    measured = {name: _interval([row[name] for row in table], clusters) for name in MEASURES}
    return EvalReport(**measured, table=table)


def compare(report: EvalReport, baseline: EvalReport) -> Comparison:
    """What one report has over another, episode by episode.

    Raises:
      ValueError: they share no task and seed.
    """
    theirs = {(row["task_id"], row["seed"]): row for row in baseline.table}
    pairs = [
        (row, theirs[row["task_id"], row["seed"]]) for row in report.table if (row["task_id"], row["seed"]) in theirs
    ]
    if not pairs:
        raise ValueError("baseline: expected a report on the same tasks and seeds, got one that shares none")
    clusters = [mine["task_id"] for mine, _ in pairs]
    gains = {
        name: _interval([float(mine[name]) - float(other[name]) for mine, other in pairs], clusters)
        for name in MEASURES
    }
    pvalue = statistics.mcnemar_exact([mine["success"] for mine, _ in pairs], [other["success"] for _, other in pairs])
    return Comparison(**gains, pvalue=pvalue)


def false_gain_rate(
    env: Env,
    executor: Executor,
    tasks: Sequence[Task],
    *,
    seeds: Sequence[int] = (0,),
    other_seeds: Sequence[int] | None = None,
    **options: Any,
) -> float:
    """How often an empty plan "gains": the noise that a gain stands beside.

    With shared seeds it is 0 unless something outside of them is left to chance, such as an endpoint's sampling.

    Args:
      env: as in `evaluate`.
      executor: who acts.
      tasks: what is to be done.
      seeds: of the episodes without a plan.
      other_seeds: of those with the empty one, as many; None: the same. Others tell what sharing seeds is worth.
      **options: `workers` and `timeout_s` of `evaluate`.

    Raises:
      ValueError: another number of other seeds, and as `evaluate`.
    """
    others = seeds if other_seeds is None else other_seeds
    if len(others) != len(seeds):
        raise ValueError(f"other_seeds: expected {len(seeds)}, got {len(others)}")
    without, empty = (evaluate(env, executor, tasks, seeds=each, **options) for each in (seeds, others))
    partner = dict(zip(others, seeds))
    known = {(row["task_id"], row["seed"]): row["reward"] for row in without.table}
    keys = [(row["task_id"], partner[row["seed"]], row["reward"]) for row in empty.table]
    return float(np.mean([reward > known[name, seed] for name, seed, reward in keys if (name, seed) in known]))


def plans_of(source: Planner | PlanSource | Callable[[Task], Plan], tasks: Sequence[Task]) -> list[Plan]:
    """A source's plan of each task; a planner writes its likeliest ones, all together."""
    if isinstance(source, Planner):
        return [plans[0] for plans in source.plan_all([task.instruction for task in tasks], temperature=0.0)]
    return [source(task) for task in tasks]


def _row(task: Task, done: Rollout) -> dict[str, Any]:
    reward = max(done.reward, 0.0)
    return {
        "task_id": task.id,
        "type": task.type,
        "seed": done.seed,
        "plan": done.plan,
        "reward": reward,
        "success": reward >= 1,
        "steps": done.steps,
    }


def _interval(values: Sequence[float], clusters: Sequence[str]) -> Interval:
    if len(set(clusters)) == 1:
        return Interval(float(np.mean(values)), float("nan"), float("nan"))
    return statistics.bootstrap_ci(np.asarray(values, np.float64), clusters=clusters)
