"""Who acts in an environment: scripted executors of chosen capability, and models behind an endpoint."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxlab.eaglet.envs.base import Task
from jaxlab.eaglet.plans import describe, is_open, offer, offered, owners, plan_steps, says, subgoals
from jaxlab.inference import Client


@dataclasses.dataclass(frozen=True)
class Context:
    """What an executor knows when it acts.

    Attributes:
      task: what is to be done.
      plan: the plan, "" without one. Where plans are shown with each observation, they stand there, and not here.
      history: what was done and what came of it, (action, observation) each.
      observation: the present one.
      step: actions done so far.
      seed: of the episode; with `step` all the chance an executor may use.
      commands: what the environment lists as possible now; empty where it lists nothing.
    """

    task: Task
    plan: str
    history: tuple[tuple[str, str], ...]
    observation: str
    step: int
    seed: int
    commands: tuple[str, ...] = ()


class Executor:
    """Something that acts. It keeps nothing between calls, so that one executor can be in many episodes at once.

    One that answers many contexts cheaper than one by one has `act_batch(contexts) -> actions` too. One without it goes
    to worker processes, so it has to pickle.
    """

    name: str

    def act(self, context: Context) -> str:
        """The next action."""
        raise NotImplementedError


@runtime_checkable
class Guide(Protocol):
    """What a scripted executor can do and knows in one environment."""

    def subgoals(self, task: Task) -> Sequence[str]:
        """What leads to the end of the task."""
        ...

    def achieves(self, subgoal: str, action: str, observation: str) -> bool:
        """Whether an action, and what came of it, was this step of a plan; in vain counts too."""
        ...

    def next_action(self, context: Context, subgoal: str) -> str | None:
        """The next action towards a subgoal; None where it is not understood."""
        ...


class GoldGuide:
    """Guide to any environment, from gold actions. It fits where exploring changes nothing, as `idle` actions do.

    A subgoal that is next in the gold order is walked to and done; one that is not is tried on the spot.
    """

    def __init__(self, gold: Mapping[str, Sequence[str]]):
        """Keeps gold actions, by task id."""
        self._gold = {name: tuple(actions) for name, actions in gold.items()}

    def subgoals(self, task: Task) -> Sequence[str]:
        """The gold actions, called as in plans."""
        return subgoals(self._gold[task.id])

    def achieves(self, subgoal: str, action: str, observation: str) -> bool:
        """Whether the action is called that, or may be what the subgoal leaves open."""
        return says(subgoal, describe(action))

    def next_action(self, context: Context, subgoal: str) -> str | None:
        """The next gold action, where it serves the subgoal; else any that is called that, else None."""
        gold = self._gold[context.task.id]
        done = 0
        for action, _ in context.history:
            done += done < len(gold) and action == gold[done]
        told = context.task.instruction
        called = [k for k, action in enumerate(gold) if says(subgoal, describe(action), told)]
        if not called:
            return None
        ahead = [k for k in called if k >= done]
        if ahead:
            numbers = owners(gold)
            again = done > 0 and describe(gold[done]) == describe(gold[done - 1])
            if numbers[ahead[0]] - numbers[done] in ((0, 1) if again else (0,)):
                return gold[done]
        return gold[(ahead or called)[0]]


class ScriptedExecutor(Executor):
    """An executor without a model, of chosen capability: it pursues the plan, then what it knows, or else explores.

    At each step, while the plan has a step left that it has not tried, it goes on with that with probability `follow`;
    after that, or without a plan, it goes on with the task's next true subgoal with probability `skill`. Otherwise it
    does something at random: a listed command, or one of `idle`. A step of a plan that it does not understand it tries
    as it stands, which costs an action. "It" in a step is what the task names; "something" nobody tells, and such a
    step is done with probability `skill`. Chance depends on task, seed and step alone.
    """

    def __init__(
        self, name: str, guide: Guide, *, skill: float, follow: float = 1.0, idle: Sequence[str] = ("look around",)
    ):
        """Makes an executor.

        Args:
          name: of the executor.
          guide: its hands and feet; `GridGuide`, `GoldGuide`, or one's own.
          skill: how much it knows of the task, in [0, 1].
          follow: how well it keeps to plans, in [0, 1].
          idle: what it explores with where no commands are listed.

        Raises:
          ValueError: a probability outside [0, 1], or nothing to explore with.
        """
        for argument, value in {"skill": skill, "follow": follow}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{argument}: expected a probability, got {value}")
        if not idle:
            raise ValueError("idle: expected at least one action, got none")
        self.name, self._guide, self._skill, self._follow, self._idle = name, guide, skill, follow, tuple(idle)

    def act(self, context: Context) -> str:
        """The next action."""
        chance = np.random.default_rng((zlib.crc32(context.task.id.encode()), context.seed, context.step))
        subgoal = self._pending(plan_steps(context.plan or offered(context.observation)), context)
        certain = self._follow
        if subgoal is None:
            subgoal, certain = self._pending(self._guide.subgoals(context.task), context), self._skill
        elif is_open(subgoal):
            certain = self._skill
        if subgoal is not None and chance.random() < certain:
            return self._guide.next_action(context, subgoal) or subgoal
        options = context.commands or self._idle
        return options[chance.integers(len(options))]

    def _pending(self, subgoals: Sequence[str], context: Context) -> str | None:
        """The first subgoal that was not yet tried, in their order."""
        pending = iter(subgoals)
        subgoal = next(pending, None)
        for action, observation in context.history:
            if subgoal is None:
                return None
            if action == subgoal or self._guide.achieves(subgoal, action, observation):
                subgoal = next(pending, None)
        return subgoal


class RemoteExecutor(Executor):
    """What executors behind an endpoint share: a connection for each process, and a seed for each step."""

    def __init__(self, base_url: str, model: str, *, name: str | None = None, **client: Any):
        """Connects to nothing yet.

        Args:
          base_url: of the endpoint.
          model: its name there.
          name: of the executor; default: the model's.
          **client: further arguments of `jaxlab.inference.Client`.
        """
        self.name = name or model
        self._client_arguments: dict[str, Any] = {"base_url": base_url, "model": model, **client}
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """This process's connection."""
        if self._client is None:
            self._client = Client(**self._client_arguments)
        return self._client

    @staticmethod
    def seed_of(context: Context) -> int:
        """For the endpoint's draw; of task, seed and step alone."""
        return zlib.crc32(f"{context.task.id} {context.seed} {context.step}".encode()) >> 1

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_client": None}  # each process has a connection of its own


class OpenAIExecutor(RemoteExecutor):
    """A ReAct-like model behind an OpenAI-compatible endpoint.

    The prompt is in the order of MPO's harness: instruction, example, task, and the plan after a sentence that offers
    it. The action is what stands behind the answer's last "Action:", up to the end of that line; without one, its last
    line.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        name: str | None = None,
        instruction: str = 'Solve the task in the environment. End each answer with one line "Action: <action>".',
        example: Sequence[Mapping[str, str]] = (),
        list_commands: bool = False,
        max_tokens: int = 256,
        temperature: float = 0.0,
        **client: Any,
    ):
        """Connects to nothing yet.

        Args:
          base_url: of the endpoint.
          model: its name there.
          name: of the executor; default: the model's.
          instruction: what the model is told about the environment and the form of its answers.
          example: messages of one solved task.
          list_commands: show the commands that the environment lists, with each observation.
          max_tokens: limit for one answer.
          temperature: of the answers.
          **client: further arguments of `jaxlab.inference.Client`.
        """
        super().__init__(base_url, model, name=name, **client)
        self._instruction, self._example = instruction, [dict(message) for message in example]
        self._list_commands, self._max_tokens, self._temperature = list_commands, max_tokens, temperature

    def act(self, context: Context) -> str:
        """The next action.

        Raises:
          EndpointError: the endpoint cannot be used, after its retries.
        """
        answer = self.client.chat(
            self.messages(context),
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            seed=self.seed_of(context),
        )
        return _action(answer.text)

    def messages(self, context: Context) -> list[dict[str, str]]:
        """The prompt, as messages."""
        observations = [observation for _, observation in context.history]
        first, later = [*observations, context.observation][0], [*observations, context.observation][1:]
        if self._list_commands and context.commands:
            shown = f"\nPossible actions: {', '.join(context.commands)}"
            first, later = (first, [*later[:-1], later[-1] + shown]) if later else (first + shown, later)
        parts = (f"Task: {context.task.instruction}", first, offer(context.plan))
        messages = [{"role": "system", "content": self._instruction}, *self._example]
        messages.append({"role": "user", "content": "\n\n".join(part for part in parts if part)})
        for (action, _), observation in zip(context.history, later):
            messages.append({"role": "assistant", "content": f"Action: {action}"})
            messages.append({"role": "user", "content": f"Observation: {observation}"})
        return messages


def _action(answer: str) -> str:
    _, found, rest = answer.rpartition("Action:")
    lines = [line.strip() for line in (rest if found else answer).splitlines() if line.strip()]
    return "" if not lines else lines[0] if found else lines[-1]
