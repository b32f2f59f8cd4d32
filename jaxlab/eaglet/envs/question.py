"""Questions with one answer each: reasoning-gym's data sets as episodes of a single step."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxlab.core.errors import require
from jaxlab.eaglet.envs.base import SPLITS, Task, TextEnv


class ReasoningGymEnv(TextEnv):
    """Single-turn tasks: the action is the answer, the reward its score by reasoning-gym.

    Kinds in `names` are split into "train" and "seen" questions; those in `unseen` are met in "unseen" only. An answer
    with a score below 1 ends the episode too, for there is no second try.
    """

    def __init__(
        self,
        names: Sequence[str] = ("chain_sum", "basic_arithmetic"),
        *,
        unseen: Sequence[str] = ("spell_backward",),
        n_tasks: int = 64,
        seed: int = 0,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        """Makes the data sets when they are first asked for.

        Args:
          names: data sets of reasoning-gym for training.
          unseen: those for the split "unseen".
          n_tasks: questions in each split.
          seed: of the questions.
          options: arguments of a data set, by its name.

        Raises:
          MissingExtra: reasoning-gym is not installed.
          ValueError: a name in both lists, none, or no task.
        """
        super().__init__()
        self._gym = require("reasoning_gym", "rl")
        if not names or not unseen or set(names) & set(unseen):
            raise ValueError(f"names, unseen: expected names in both lists and none twice, got {names} and {unseen}")
        if n_tasks < 1:
            raise ValueError(f"n_tasks: expected at least 1, got {n_tasks}")
        self._names = {"train": tuple(names), "seen": tuple(names), "unseen": tuple(unseen)}
        self._n_tasks, self._seed, self._options = n_tasks, seed, dict(options or {})
        self._entry: Mapping[str, Any] = {}

    def _tasks(self, split: str) -> list[Task]:
        names = self._names[split]
        size = -(-self._n_tasks // len(names))
        tasks = []
        for name in names:
            seed = self._seed * len(SPLITS) + SPLITS.index(split)
            questions = self._gym.create_dataset(name, size=size, seed=seed, **self._options.get(name, {}))
            tasks += [
                Task(f"{name}-{seed}-{number}", entry["question"], 1, name, split, {"entry": entry})
                for number, entry in enumerate(questions)
            ]
        return tasks[: self._n_tasks]

    def _reset(self, task: Task, seed: int) -> str:
        if "entry" not in task.data:
            raise ValueError(f"task: expected one of ReasoningGymEnv's, got {task.id!r}")
        self._entry = task.data["entry"]
        return self._entry["question"]

    def _step(self, action: str) -> tuple[str, float, bool, dict[str, Any]]:
        score = self._gym.get_score_answer_fn(self._entry["metadata"]["source_dataset"])(action, self._entry)
        return "The answer is noted.", float(score), True, {"valid": bool(action)}

    def gold_actions(self, task: Task) -> list[str]:
        """The answer of the data set."""
        return [task.data["entry"]["answer"]]
