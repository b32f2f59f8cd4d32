"""Plans before there is a planner: from a strong model that has seen the solution, or from the solution itself."""

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxlab.core import jsonl
from jaxlab.eaglet.envs.base import Task, TextEnv
from jaxlab.eaglet.plans import Plan, format_plan, leave_open, subgoals, words_of
from jaxlab.inference import Client, EndpointError

_PROMPT = """You write plans for an agent that acts in a text environment. Below are a task and, for your eyes only,
actions that solve it. Think about how one would find this way knowing the task alone, then write a short global plan
of 3 to 8 steps, without naming what only the solution tells. Answer in exactly this form:
<think> your reasoning </think><plan> Step 1: ... Step 2: ... </plan>

Task: {instruction}

Actions:
{actions}"""


@runtime_checkable
class PlanSource(Protocol):
    """Something that writes a plan for a task."""

    def __call__(self, task: Task) -> Plan:
        """The plan."""
        ...


class PlanSourceError(RuntimeError):
    """A plan could not be had, retries included.

    Attributes:
      task_id: of the task.
      finished: the plans that the source had written before, by task id.
    """

    def __init__(self, message: str, *, task_id: str = "", finished: dict[str, Plan] | None = None):
        super().__init__(message)
        self.task_id, self.finished = task_id, dict(finished or {})


class GoldPathPlanSource:
    """Plans from gold actions, without any model; and broken ones, so that a filter has something to find.

    With probability `corruption` a plan has one fault, drawn at random: a step is left out, two neighbouring steps are
    swapped, or a step of another task stands in the place of one. `fault(task)` tells which. What is drawn depends on
    the seed and the task alone.

    A solution names what its task does not tell, such as the wire that happens to lie there, and who reads the task
    alone can only invent it. With `open_steps` such words become "something", which executors have to find out. A word
    is told where more than half of the other training tasks of the type have it in their solutions, of those whose
    instructions have the word if this one's does, else of those that have it not; without any such task, where the
    instruction has it. In an action that may be fatal it takes more than four in five of them. Told words that come
    from the instruction, and that less than half of the type's other instructions have, become "it": executors read
    the task as well, and a small planner cannot spell names that it has never seen.
    """

    def __init__(
        self, env: TextEnv, *, corruption: float = 0.0, seed: int = 0, restate: bool = True, open_steps: bool = False
    ):
        """Takes gold actions from an environment.

        Args:
          env: has `gold_actions`.
          corruption: probability of a fault.
          seed: of the faults.
          restate: the thinking repeats the task, which makes a long instruction's output twice as long and more.
          open_steps: leave open what the task does not tell.

        Raises:
          ValueError: a probability outside [0, 1].
        """
        if not 0 <= corruption <= 1:
            raise ValueError(f"corruption: expected a probability, got {corruption}")
        self._env, self._corruption, self._seed, self._restate = env, corruption, seed, restate
        self._open_steps = open_steps
        self._tasks: dict[str, list[Task]] = {}
        self._known: dict[str, list[tuple[str, set[str], set[str]]]] = {}  # by type: task, words told, words used

    def __call__(self, task: Task) -> Plan:
        """The plan, right or broken."""
        told = f"The task is: {' '.join(task.instruction.split())} " if self._restate else ""
        return Plan.parse(format_plan(f"{told}These steps lead there.", self._steps(task)[0]))

    def fault(self, task: Task) -> str | None:
        """What is wrong with the task's plan: "drop", "swap", "foreign", or None."""
        return self._steps(task)[1]

    def _steps(self, task: Task) -> tuple[list[str], str | None]:
        steps = self._right(task)
        chance = np.random.default_rng((self._seed, zlib.crc32(task.id.encode())))
        if chance.random() >= self._corruption:
            return steps, None
        at = int(chance.integers(len(steps)))
        unequal = [k for k in range(len(steps) - 1) if steps[k] != steps[k + 1]]
        faults = ["foreign", *(["drop"] if len(steps) > 1 else []), *(["swap"] if unequal else [])]
        fault = faults[chance.integers(len(faults))]
        if fault == "drop":
            return steps[:at] + steps[at + 1 :], fault
        if fault == "swap":
            at = unequal[chance.integers(len(unequal))]
            return [*steps[:at], steps[at + 1], steps[at], *steps[at + 2 :]], fault
        others = [step for step in self._others(task, chance) if step not in steps] or ["wait for a sign"]
        return [*steps[:at], others[chance.integers(len(others))], *steps[at + 1 :]], fault

    def _others(self, task: Task, chance: np.random.Generator) -> list[str]:
        """Steps of one other task of the split, of another type where there is one."""
        if task.split not in self._tasks:
            self._tasks[task.split] = self._env.tasks(task.split)
        known = [other for other in self._tasks[task.split] if other.id != task.id]
        known = [other for other in known if other.type != task.type] or known
        return self._right(known[chance.integers(len(known))]) if known else []

    def _right(self, task: Task) -> list[str]:
        """Steps without a fault."""
        steps = subgoals(self._env.gold_actions(task))
        if not self._open_steps:
            return steps
        usual, sure = (self._told(task, steps, share) for share in (_USUAL, _SURE))
        said = [said for name, said, _ in self._known.get(task.type, []) if name != task.id]
        named = {
            word for word in words_of(task.instruction) if sum(word in words for words in said) <= _USUAL * len(said)
        }
        return leave_open(steps, lambda verb: sure if verb in self._env.fatal else usual, named)

    def _told(self, task: Task, steps: Sequence[str], share: float) -> set[str]:
        """The words of steps that the task tells, by itself or as one of its type."""
        if not self._known:
            for other in self._env.tasks("train"):
                used = set(" ".join(subgoals(self._env.gold_actions(other))).split())
                self._known.setdefault(other.type, []).append((other.id, words_of(other.instruction), used))
        mine, told = words_of(task.instruction), set()
        others = [words for name, *words in self._known.get(task.type, []) if name != task.id]
        for word in set(" ".join(steps).split()):
            alike = [word in used for said, used in others if (word in said) == (word in mine)]
            if np.mean(alike) > share if alike else word in mine:
                told.add(word)
        return told


_USUAL, _SURE = 0.5, 0.8


class OpenAIPlanSource:
    """Plans by a strong model behind an endpoint, that sees the task and its solution (reverse synthesis).

    What it has written it keeps, in a file too where a path is given, and does not ask for again.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        max_retries: int = 5,
        gold: Callable[[Task], Sequence[str]] | None = None,
        path: str | os.PathLike | None = None,
        max_tokens: int = 4096,
        max_plan_tokens: int | None = None,
        temperature: float = 1.0,
        **client: Any,
    ):
        """Connects to nothing yet.

        Args:
          base_url: of the endpoint.
          model: its name there.
          max_retries: how many more times a request is tried that fails for now.
          gold: the solution of a task, such as an environment's `gold_actions`; None: the model sees the task alone.
          path: where finished plans are kept, a JSON line each.
          max_tokens: limit for one answer.
          max_plan_tokens: limit for a plan, in words; a longer one is cut.
          temperature: of the answers.
          **client: further arguments of `jaxlab.inference.Client`.
        """
        self._arguments: dict[str, Any] = {"base_url": base_url, "model": model, "max_retries": max_retries, **client}
        self._gold, self._path = gold, None if path is None else Path(path)
        self._max_tokens, self._max_plan_tokens, self._temperature = max_tokens, max_plan_tokens, temperature
        self._client: Client | None = None
        rows = [] if self._path is None else jsonl.read(self._path)
        self.finished: dict[str, Plan] = {row["task_id"]: self._parse(row["text"]) for row in rows}

    def __call__(self, task: Task) -> Plan:
        """The plan, broken format and all.

        Raises:
          PlanSourceError: the endpoint cannot be used, after the last retry; it holds what was finished before.
        """
        if task.id in self.finished:
            return self.finished[task.id]
        actions = "\n".join(self._gold(task)) if self._gold is not None else "(not known)"
        prompt = _PROMPT.format(instruction=task.instruction, actions=actions)
        if self._client is None:
            self._client = Client(**self._arguments)
        try:
            answer = self._client.chat(
                [{"role": "user", "content": prompt}], max_tokens=self._max_tokens, temperature=self._temperature
            )
        except EndpointError as error:
            raise PlanSourceError(
                f"no plan for {task.id!r}: {error}", task_id=task.id, finished=self.finished
            ) from error
        if self._path is not None:
            jsonl.append(self._path, {"task_id": task.id, "text": answer.text})
        self.finished[task.id] = self._parse(answer.text)
        return self.finished[task.id]

    def _parse(self, text: str) -> Plan:
        return Plan.parse(text, max_plan_tokens=self._max_plan_tokens)
