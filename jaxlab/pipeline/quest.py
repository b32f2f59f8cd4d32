"""The task that every stage shares: the grid world as demonstrations, as prompts with right answers, as episodes."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlab.eaglet import (
    Context,
    GoldPathPlanSource,
    GridGuide,
    GridQuestEnv,
    ScriptedExecutor,
    Task,
    demonstrations,
    executor_prompt,
    world_texts,
)
from jaxlab.models import word_tokenizer
from jaxlab.pipeline.config import QuestConfig

Demonstration = tuple[Context, str]
Row = dict[str, Any]

# A small decoder is shown the next step of its plan, not the whole of it.
prompt = functools.partial(executor_prompt, commands=0, next_step=True)
WORDS = 4  # of a command, its end included


def useful(prompts: Sequence[str], completions: Sequence[str], *, right: Sequence[Sequence[str]]) -> list[float]:
    """The reward: 1.0 for a command that brings what is next in the task nearer, or does it, else 0.0."""
    return [float(completion.strip() in answers) for completion, answers in zip(completions, right, strict=True)]


class Quest:
    """Situations and tasks of one world; the same in every process."""

    def __init__(self, config: QuestConfig, seed: int = 0):
        """Draws nothing yet; `seed` is that of the teacher's detours."""
        self.config, self._seed = config, seed
        self.env = self.make()
        self.plans = GoldPathPlanSource(self.env)
        self._guide = GridGuide()

    def make(self) -> GridQuestEnv:
        """An environment."""
        return GridQuestEnv(self.config.size, self.config.tasks)

    @functools.cached_property
    def shown(self) -> list[Demonstration]:
        """What a teacher does in the training tasks."""
        return self._demonstrated(self.env.tasks("train"))

    @functools.cached_property
    def tokenizer(self) -> Any:
        """A tokenizer of the world's words."""
        return word_tokenizer(world_texts(self.shown, self.plans))

    def rows(self, split: str, planned: bool, count: int | None = None) -> list[Row]:
        """Situations as prompts, each with the commands that are right there; drawn at random where a count is given.

        Args:
          split: of the tasks.
          planned: show the next step of a plan that solves the task.
          count: of rows; None: all.
        """
        shown = self.shown if split == "train" else self._demonstrated(self.env.tasks(split))
        if count is not None:
            chance = np.random.default_rng(self._seed)
            shown = [shown[k] for k in chance.choice(len(shown), min(count, len(shown)), replace=False)]
        return [self._row(context, planned) for context, _ in shown]

    def held_out(self, count: int) -> list[Task]:
        """Tasks for an agent: half of kinds that training has, half of others."""
        half = count // 2
        return [*self.env.tasks("seen")[: count - half], *self.env.tasks("unseen")[:half]]

    def _demonstrated(self, tasks: Sequence[Task]) -> list[Demonstration]:
        teacher = ScriptedExecutor("teacher", self._guide, skill=1.0)
        return demonstrations(self.env, tasks, teacher, detours=self.config.detours, seed=self._seed)

    def _row(self, context: Context, planned: bool) -> Row:
        done = int(context.observation.partition(" of ")[0].split()[-1])
        seen = dataclasses.replace(context, plan=self.plans(context.task).plan if planned else "")
        subgoal = self._guide.subgoals(context.task)[done]
        return {"prompt": "".join(prompt(seen)), "right": self._guide.towards(context, subgoal)}
