"""EAGLET's models: plans drawn together beside one by one, commands scored together, programs compiled by a run.

Environments and cached baselines are in `eaglet_envs.py`, generation of a real model in `inference.py`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from benchmarks.harness import Case, interleaved
from jaxlab.eaglet import (
    GoldPathPlanSource,
    GridGuide,
    GridQuestEnv,
    LMExecutor,
    PlanGRPOConfig,
    Planner,
    ScriptedExecutor,
    train_grpo,
    train_sft,
)
from jaxlab.eaglet.cloning import demonstrations, world_texts
from jaxlab.eaglet.prompts import executor_prompt
from jaxlab.eaglet.worlds import Sizes
from jaxlab.models import word_tokenizer
from jaxlab.models.decoder import init_params
from jaxlab.training import OptimizerConfig, SFTConfig

SYSTEM = "eaglet"
BATCH = 8
# Bars of the specification, section 7.
SAMPLER_BAR = 3.0


def cases(quick: bool) -> Iterator[Case]:
    """A toy planner after a short cold start, and a toy executor, which need not have learnt anything."""
    env = GridQuestEnv(size=5, n_tasks=BATCH)
    tasks, gold = env.tasks("train"), GoldPathPlanSource(env)
    shown = demonstrations(env, tasks, ScriptedExecutor("teacher", GridGuide(), skill=1.0))
    tokenizer = word_tokenizer(world_texts(shown, gold))
    model = Sizes(context=64).model(tokenizer.vocab_size)
    planner = Planner(model, init_params(model, jax.random.key(0)), tokenizer, max_tokens=40)
    sft = SFTConfig(steps=100, batch_size=16, optimizer=OptimizerConfig(learning_rate=3e-3))
    planner = train_sft(planner, [(task, gold(task)) for task in tasks], sft).planner
    repeats = 3 if quick else 9

    instructions, key = [task.instruction for task in tasks], jax.random.key(1)
    together, one = (functools.partial(function, rng=key) for function in (planner.plan_all, planner.plan))
    seconds = interleaved(
        lambda: _waited(together(instructions)), lambda: _waited(map(one, instructions)), repeats=repeats
    )
    what = f"toy planner, {BATCH} plans of {planner.max_tokens} tokens"
    yield Case(SYSTEM, what, "s", *seconds, "one by one", SAMPLER_BAR)

    sizes = Sizes(layers=3, context=256)
    network = sizes.model(tokenizer.vocab_size)
    prompt = functools.partial(executor_prompt, commands=0)
    executor = LMExecutor(network, init_params(network, jax.random.key(0)), tokenizer, name="lm", prompt=prompt)
    contexts = [dataclasses.replace(context, plan=gold(context.task).plan) for context, _ in shown[:64]]
    seconds = interleaved(
        lambda: _waited(executor.act_batch(contexts)), lambda: _waited(map(executor.act, contexts)), repeats=repeats
    )
    rates = (len(contexts) / each for each in seconds)
    what = "toy executor, actions in the grid world"
    yield Case(SYSTEM, what, "actions/s", *rates, "one by one", higher_is_better=True)

    config = PlanGRPOConfig(
        prompts_per_step=2, num_generations=4, max_prompt_length=16, max_completion_length=40, steps=12
    )
    executors = tuple(ScriptedExecutor(name, GridGuide(), skill=skill) for name, skill in (("e", 0.5), ("n", 0.1)))
    history = train_grpo(planner, tasks, env=env, executors=executors, config=config).history
    updates = [row for row in history if row["grad_norm"] > 0]  # the others had equal rewards
    compiled = sum(row["compilations"] for row in updates[2:])
    yield Case(
        SYSTEM, f"GRPO of the toy planner, updates 3 to {len(updates)}", "compilations", compiled, 0, "none", 1.0
    )


def _waited(results: Iterable[Any]) -> None:
    """These are no arrays."""
    list(results)
