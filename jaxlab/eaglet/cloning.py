"""Executors of one family by behaviour cloning: the same run stopped early is a novice, at its end an expert.

Half of what they see has a plan, for they could not follow one otherwise, and half has none. A second run that begins
with the first one's parameters and sees fewer plans makes an expert of tasks rather than of plans.
"""

import dataclasses
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlab.eaglet.envs.base import Task, TextEnv
from jaxlab.eaglet.executors import Context, Executor
from jaxlab.eaglet.lm_executor import LMExecutor
from jaxlab.eaglet.plans import Plan
from jaxlab.eaglet.prompts import ExecutorPrompt, command_ids, executor_prompt, fitted
from jaxlab.eaglet.rollouts import rollout
from jaxlab.training import SFTConfig, Supervised

Demonstration = tuple[Context, str]
"""What was known, and what a teacher did."""


def demonstrations(
    env: TextEnv, tasks: Sequence[Task], teacher: Executor, *, detours: float = 0.0, seed: int = 0
) -> list[Demonstration]:
    """What a teacher does in tasks, without a plan.

    Args:
      env: where.
      tasks: of the training split; a task for evaluation must not be shown.
      teacher: such as a `ScriptedExecutor` of full skill, whose actions are gold.
      detours: how often a listed command is done at random in place of the teacher's, which is recorded all the same:
        its way back is shown then. It fits where the teacher knows a way from anywhere.
      seed: of the detours, and of the episodes.

    Raises:
      ValueError: a probability outside [0, 1).
    """
    if not 0 <= detours < 1:
        raise ValueError(f"detours: expected a probability below 1, got {detours}")
    seen: list[Demonstration] = []

    class Shown(Executor):
        name = "teacher"

        def act(self, context: Context) -> str:
            action = teacher.act(context)
            seen.append((context, action))
            chance = np.random.default_rng((zlib.crc32(context.task.id.encode()), seed, context.step, 1))
            away = context.commands and chance.random() < detours
            return context.commands[chance.integers(len(context.commands))] if away else action

    for task in tasks:
        rollout(env, Shown(), task, seed=seed)
    return seen


def clone_executors(
    model: Any,
    params: Any,
    tokenizer: Any,
    shown: Sequence[Demonstration],
    plans: Callable[[Task], Plan],
    stops: Mapping[str, int],
    config: SFTConfig,
    *,
    decoys: bool = False,
    plain: int = 1,
    length: int | None = None,
    prompt: ExecutorPrompt = executor_prompt,
    folder: str | os.PathLike | None = None,
    **executor: Any,
) -> dict[str, LMExecutor]:
    """Trains one decoder on demonstrations, each with its task's plan and without, and takes executors on the way.

    Args:
      model: a `Decoder`.
      params: where it starts.
      tokenizer: reads prompts and commands.
      shown: what `demonstrations` gave.
      plans: a plan of a task, such as a `GoldPathPlanSource`.
      stops: name of an executor -> step at which it is taken, at most `config.steps`.
      config: of the run.
      decoys: where there is a plan, show it with another task's instruction, so that the plan has to be read; an
        executor that knows its tasks by heart learns from nothing else to follow one.
      plain: how often a demonstration is there without a plan, for each time with it.
      length: tokens of a context, as in `LMExecutor`.
      prompt: a context as text.
      folder: for metrics and checkpoints.
      **executor: further arguments of `LMExecutor`.

    Raises:
      ValueError: no demonstrations, `plain` below 1, a stop outside 1 to `config.steps`, or a context that does not
        fit.
    """
    if plain < 1:
        raise ValueError(f"plain: expected at least 1, got {plain}")
    for name, step in stops.items():
        if not 1 <= step <= config.steps:
            raise ValueError(f"stops: expected steps from 1 to config.steps = {config.steps}, got {step} for {name!r}")
    common: dict[str, Any] = {"length": length, "prompt": prompt, **executor}
    room = LMExecutor(model, params, tokenizer, name="room", **common).length
    told = {context.task.id: plans(context.task).plan for context, _ in shown}
    instructions = {context.task.id: context.task.instruction for context, _ in shown}
    rows = []
    for index, (context, action) in enumerate(shown):
        for plan in (*[""] * plain, told[context.task.id]):
            task = context.task
            if decoys and plan:
                others = [text for name, text in instructions.items() if name != task.id] or [task.instruction]
                chance = np.random.default_rng((config.seed, index))
                task = dataclasses.replace(task, instruction=others[chance.integers(len(others))])
            planned = dataclasses.replace(context, task=task, plan=plan)
            ids = fitted(tokenizer, *prompt(planned), room, task.id)
            rows.append((ids, command_ids(tokenizer, action)))
    run = Supervised(model, params, rows, config, folder=folder)
    made = {}
    for name, step in sorted(stops.items(), key=lambda stop: stop[1]):
        made[name] = LMExecutor(model, run.until(step), tokenizer, name=name, **common)
    return {name: made[name] for name in stops}


def world_texts(shown: Sequence[Demonstration], plans: Callable[[Task], Plan]) -> list[str]:
    """Everything that was to be read and written in demonstrations, for `word_tokenizer`."""
    tasks = {context.task.id: context.task for context, _ in shown}
    texts = [task.instruction for task in tasks.values()] + [plans(task).text for task in tasks.values()]
    for context, action in shown:
        texts += [context.observation, action, *context.commands]
    return ["Task: Plan: >", *dict.fromkeys(texts)]
