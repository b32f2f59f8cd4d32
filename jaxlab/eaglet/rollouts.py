"""Episodes with and without a plan, in pairs that share their seeds; what needs no plan is run once and kept."""

import dataclasses
import functools
import itertools
import math
import os
import pickle
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.core import jsonl, tasks
from jaxlab.eaglet.envs.base import Task, TextEnv
from jaxlab.eaglet.executors import Context, Executor
from jaxlab.eaglet.gain import ecgr, final_reward
from jaxlab.eaglet.plans import Plan, offer

INSERTS = ("query", "observation")
_WIDTH = 16  # episodes side by side for an executor that acts in batches

Env = TextEnv | Callable[[], TextEnv]


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One episode.

    Attributes:
      task_id: of which task.
      executor: name of who acted.
      seed: of its chance.
      plan: what it was given, "" for none.
      reward: the environment's best score, in [0, 1]; -1 after a fatal action.
      steps: actions done, invalid ones too.
      done: whether the environment ended it, by success or by a fatal action.
      actions: what was done.
      observations: what was seen, one more than actions; the first is reset's.
    """

    task_id: str
    executor: str
    seed: int
    plan: str
    reward: float
    steps: int
    done: bool
    actions: tuple[str, ...]
    observations: tuple[str, ...]


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


class RolloutCache:
    """Episodes without a plan, by task, executor and seed; in a file too, where a path is given."""

    def __init__(self, path: str | os.PathLike | None = None):
        """Reads the file, if it is there.

        Raises:
          ValueError: a file of something else.
        """
        self._path = None if path is None else Path(path)
        self._rollouts: dict[tuple[str, str, int], Rollout] = {}
        for row in [] if self._path is None else jsonl.read(self._path):
            try:
                lists: dict[str, Any] = {name: tuple(row[name]) for name in ("actions", "observations")}
                rollout = Rollout(**{**row, **lists})
            except (TypeError, KeyError) as error:
                raise ValueError(f"path: expected {self._path} to hold rollouts, got a line {str(row)[:80]}") from error
            self._rollouts[rollout.task_id, rollout.executor, rollout.seed] = rollout

    def get(self, task_id: str, executor_name: str, seed: int) -> Rollout:
        """The episode.

        Raises:
          KeyError: it was not put here.
        """
        try:
            return self._rollouts[task_id, executor_name, seed]
        except KeyError:
            raise KeyError(
                f"no rollout without a plan of task {task_id!r}, executor {executor_name!r}, seed {seed}"
            ) from None

    def put(self, rollout: Rollout) -> None:
        """Keeps an episode, in place of one under the same names.

        Raises:
          ValueError: it had a plan.
        """
        if rollout.plan:
            raise ValueError(f"rollout: expected one without a plan, got {rollout.plan[:80]!r} for {rollout.task_id!r}")
        if self._path is not None:
            jsonl.append(self._path, dataclasses.asdict(rollout))
        self._rollouts[rollout.task_id, rollout.executor, rollout.seed] = rollout

    def __contains__(self, key: tuple[str, str, int]) -> bool:
        return key in self._rollouts

    def __len__(self) -> int:
        return len(self._rollouts)


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


def rollout(
    env: TextEnv,
    executor: Executor,
    task: Task,
    *,
    plan: str | None = None,
    seed: int = 0,
    max_steps: int | None = None,
    max_consecutive_invalid: int | None = None,
    insert: str = "query",
) -> Rollout:
    """One episode.

    Args:
      env: where.
      executor: who acts.
      task: what is to be done.
      plan: what it is given; None and "" are no plan.
      seed: of its chance.
      max_steps: cap; None: the task's.
      max_consecutive_invalid: end it after so many actions in a row that were not understood (MPO: 10); None: go on.
      insert: "query" shows the plan once, with the task; "observation" with each observation.

    Raises:
      ValueError: an unknown `insert`, or a limit below 1.
    """
    episode = _episode(
        env,
        executor.name,
        task,
        plan=plan,
        seed=seed,
        max_steps=max_steps,
        max_consecutive_invalid=max_consecutive_invalid,
        insert=insert,
    )
    return _drive(episode, executor)


def _drive(episode: Generator[Context, str, Rollout], executor: Executor) -> Rollout:
    try:
        context = next(episode)
        while True:
            context = episode.send(executor.act(context))
    except StopIteration as end:
        return end.value


def _episode(
    env: TextEnv,
    name: str,
    task: Task,
    *,
    plan: str | None = None,
    seed: int = 0,
    max_steps: int | None = None,
    max_consecutive_invalid: int | None = None,
    insert: str = "query",
) -> Generator[Context, str, Rollout]:
    """An episode that asks for its actions: yields contexts, is sent actions, returns the rollout."""
    if insert not in INSERTS:
        raise ValueError(f"insert: expected one of {', '.join(INSERTS)}, got {insert!r}")
    limits = {"max_steps": max_steps, "max_consecutive_invalid": max_consecutive_invalid}
    for argument, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{argument}: expected None or at least 1, got {value}")
    plan, cap = plan or "", max_steps or task.max_steps
    query, beside = (plan, "") if insert == "query" else ("", offer(plan))

    def shown(observation: str) -> str:
        return f"{observation}\n\n{beside}" if beside else observation

    observations, actions, history = [env.reset(task, seed=seed)], [], ()
    reward, done, invalid = 0.0, False, 0
    while not done and len(actions) < cap and (max_consecutive_invalid is None or invalid < max_consecutive_invalid):
        seen = shown(observations[-1])
        action = yield Context(task, query, history, seen, len(actions), seed, env.commands())
        observation, reward, done, info = env.step(action)
        invalid = 0 if info["valid"] else invalid + 1
        actions.append(action)
        observations.append(observation)
        history = (*history, (action, seen))
    return Rollout(task.id, name, seed, plan, float(reward), len(actions), done, tuple(actions), tuple(observations))


def plan_rewards(
    pairs: Sequence[tuple[Task, Plan]],
    *,
    env: Env,
    executors: tuple[Executor, Executor],
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
      executors: expert and novice.
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
    table = table.reshape(4, plans, executors, -1)
    count = (~np.isnan(table)).sum(axis=-1)
    return tuple(np.where(count > 0, np.nansum(table, axis=-1) / np.maximum(count, 1), np.nan))


def check_executors(executors: Sequence[Executor]) -> None:
    """Raises the ValueError of an executor that would be compared with itself."""
    for one, other in itertools.combinations(executors, 2):
        if one is other or one.name == other.name:
            raise ValueError(
                f"executors: expected different ones, got {one.name!r} twice: agreement with oneself is no consensus"
            )


@dataclasses.dataclass(frozen=True)
class _Job:
    task: Task
    plan: str
    executor: int
    seed: int


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
    jobs: dict[tuple[str, str, int, int], _Job] = {}
    for task, plan in pairs:
        for number, seed in itertools.product(range(len(executors)), seeds):
            if not plan.plan:
                continue
            if (task.id, executors[number].name, seed) not in cache:
                jobs.setdefault((task.id, "", number, seed), _Job(task, "", number, seed))
            jobs.setdefault((task.id, plan.plan, number, seed), _Job(task, plan.plan, number, seed))
    made = dict(zip(jobs, _run(list(jobs.values()), env, executors, workers, timeout_s)))
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


def _run(
    jobs: list[_Job], env: Env, executors: Sequence[Executor], workers: int | None, timeout_s: float | None
) -> list[Rollout | None]:
    """Runs episodes; None for one that was lost."""
    if isinstance(env, TextEnv):
        return [rollout(env, executors[job.executor], job.task, plan=job.plan, seed=job.seed) for job in jobs]
    results: list[Rollout | None] = [None] * len(jobs)
    batched = [k for k, job in enumerate(jobs) if hasattr(executors[job.executor], "act_batch")]
    for number, executor in enumerate(executors):
        mine = [k for k in batched if jobs[k].executor == number]
        for k, done in zip(mine, _side_by_side([jobs[k] for k in mine], env, executor)):
            results[k] = done
    rest = [k for k in range(len(jobs)) if k not in set(batched)]
    errors = []
    if rest:
        single = tuple(None if hasattr(executor, "act_batch") else executor for executor in executors)
        play = functools.partial(_play, pickle.dumps(env), pickle.dumps(single))
        played = tasks.map(play, [jobs[k] for k in rest], workers=workers, timeout_s=timeout_s)
        for k, result in zip(rest, played, strict=True):
            results[k] = result.value
            if result.error is not None:
                errors.append(f"{jobs[k].task.id}: {result.error.strip().splitlines()[-1]}")
    if errors and len(errors) == len(rest):
        raise RuntimeError(f"every episode in a worker was lost; {errors[0]}")
    if errors:
        warnings.warn(f"{len(errors)} of {len(jobs)} episodes were lost; {errors[0]}", RuntimeWarning, stacklevel=4)
    return results


def _side_by_side(jobs: list[_Job], make_env: Callable[[], TextEnv], executor: Any) -> list[Rollout]:
    """Many episodes in this process, their executor asked for all actions at once."""
    envs = [make_env() for _ in range(min(_WIDTH, len(jobs)))]
    results: dict[int, Rollout] = {}
    waiting = iter(enumerate(jobs))
    running: dict[int, tuple[int, Generator[Context, str, Rollout], Context]] = {}

    def begin(slot: int) -> None:
        for index, job in waiting:
            episode = _episode(envs[slot], executor.name, job.task, plan=job.plan, seed=job.seed)
            running[slot] = index, episode, next(episode)
            return

    try:
        for slot in range(len(envs)):
            begin(slot)
        while running:
            slots = list(running)
            actions = executor.act_batch([running[slot][2] for slot in slots])
            for slot, action in zip(slots, actions, strict=True):
                index, episode, _ = running.pop(slot)
                try:
                    running[slot] = index, episode, episode.send(action)
                except StopIteration as end:
                    results[index] = end.value
                    begin(slot)
    finally:
        for env in envs:
            env.close()
    return [results[index] for index in range(len(jobs))]


def _play(make_env: bytes, executors: bytes, job: _Job) -> Rollout:
    """One episode in a worker process."""
    executor = _unpickled(executors)[job.executor]
    env = _env(make_env)
    try:
        return rollout(env, executor, job.task, plan=job.plan, seed=job.seed)
    except BaseException:
        _env.cache_clear()  # it may be broken; the next episode gets another
        env.close()
        raise


@functools.lru_cache(maxsize=4)
def _env(make_env: bytes) -> TextEnv:
    return pickle.loads(make_env)()


@functools.lru_cache(maxsize=4)
def _unpickled(executors: bytes) -> Sequence[Any]:
    return pickle.loads(executors)
