"""What every environment is: tasks in three splits, and episodes of text in, text out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

SPLITS = ("train", "seen", "unseen")


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to do.

    Attributes:
      id: its name, the same in every process.
      instruction: what the planner and the executor are told.
      max_steps: cap of an episode.
      type: what kind of task it is.
      split: "train", "seen" (kinds that training has) or "unseen".
      data: what its environment needs to set it up.
    """

    id: str
    instruction: str
    max_steps: int
    type: str
    split: str
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)


class TextEnv:
    """An environment: one episode at a time, in this process or in one that the environment starts and ends.

    The reward is a state, not an increment: the best score of the episode so far, in [0, 1], or -1 after a fatal
    action. A subclass has `_tasks`, `_reset` and `_step`, and `gold_actions`, `commands` and `close` where it can.

    Attributes:
      fatal: first words of actions that end an episode where they are done to the wrong thing.
    """

    fatal: tuple[str, ...] = ()

    def __init__(self):
        self._running = False
        self._why = "before reset"
        self._best = 0.0

    def tasks(self, split: str) -> list[Task]:
        """The tasks of a split, always the same.

        Raises:
          ValueError: an unknown split.
        """
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        return self._tasks(split)

    def reset(self, task: Task, *, seed: int = 0) -> str:
        """Begins an episode; returns the first observation.

        Args:
          task: one of this environment's.
          seed: for environments with chance in them.

        Raises:
          ValueError: another environment's task.
        """
        self._running, self._why, self._best = False, "before reset", 0.0
        observation = self._reset(task, seed)
        self._running = True
        return observation

    def step(self, action: str) -> tuple[str, float, bool, dict[str, Any]]:
        """Does something.

        Returns:
          The observation; the best score so far in [0, 1], or -1 if this action was fatal; whether the episode ended,
          by success or by a fatal action, never by a cap; and `info`, where `valid` tells whether the action was
          understood. One that was not changes nothing.

        Raises:
          RuntimeError: before `reset`, or after the end.
        """
        if not self._running:
            raise RuntimeError(f"step: expected a running episode, got an action {self._why}; call reset first")
        observation, score, done, info = self._step(action.strip())
        if score < 0:
            self._best, done = -1.0, True
        else:
            self._best = max(min(float(score), 1.0), self._best)  # in this order NaN stays, for others to see
        self._running, self._why = not done, "after the end"
        return observation, self._best, done, info

    def gold_actions(self, task: Task) -> list[str]:
        """Actions that complete the task from its beginning, where they are known.

        Raises:
          NotImplementedError: the environment knows none.
        """
        raise NotImplementedError(f"{type(self).__name__} knows no gold actions")

    def commands(self) -> tuple[str, ...]:
        """What can be done now, where the environment lists it; else empty."""
        return ()

    def close(self) -> None:
        """Ends what the environment has started. It may be closed twice, and used again after a reset."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _tasks(self, split: str) -> list[Task]:
        raise NotImplementedError

    def _reset(self, task: Task, seed: int) -> str:
        raise NotImplementedError

    def _step(self, action: str) -> tuple[str, float, bool, dict[str, Any]]:
        """Observation, score (below 0: fatal), whether the task is complete, and info with `valid`."""
        raise NotImplementedError
