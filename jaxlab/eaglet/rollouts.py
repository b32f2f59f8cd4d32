"""Episodes: one, or many in worker processes or side by side; and those without a plan, run once and kept."""

import dataclasses
import functools
import os
import pickle
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from jaxlab.core import jsonl, tasks
from jaxlab.eaglet.envs.base import Task, TextEnv
from jaxlab.eaglet.executors import Context, Executor
from jaxlab.eaglet.plans import offer

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
                self._rollouts[rollout.task_id, rollout.executor, rollout.seed] = rollout
            except (TypeError, KeyError) as error:
                raise ValueError(f"path: expected {self._path} to hold rollouts, got a line {str(row)[:80]}") from error

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


@dataclasses.dataclass(frozen=True)
class Job:
    """An episode to run, with the number of its executor."""

    task: Task
    plan: str
    executor: int
    seed: int


def run(
    jobs: list[Job], env: Env, executors: Sequence[Executor], workers: int | None, timeout_s: float | None
) -> list[Rollout | None]:
    """Runs episodes; None for one that was lost, of which a warning tells.

    Raises:
      RuntimeError: all that went to workers were lost.
    """
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


def _side_by_side(jobs: list[Job], make_env: Callable[[], TextEnv], executor: Any) -> list[Rollout]:
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


def _play(make_env: bytes, executors: bytes, job: Job) -> Rollout:
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
