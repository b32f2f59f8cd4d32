"""EAGLET's models: plans drawn together beside one by one, commands scored together, programs compiled by a run.

Environments and cached baselines are in `eaglet_envs.py`, generation of a real model in `inference.py`.
"""

import dataclasses
import functools
from collections.abc import Iterator

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
    word_tokenizer,
)
from jaxlab.eaglet.cloning import demonstrations, world_texts
from jaxlab.eaglet.prompts import executor_prompt
from jaxlab.eaglet.worlds import Sizes
from jaxlab.models.decoder import init_params

SYSTEM = "eaglet"
BATCH = 8
# Bars of the specification, section 7.
SAMPLER_BAR = 3.0


def cases(quick: bool) -> Iterator[Case]:
    """The toy planner and executor of the laptop's config; they need not have learnt anything."""
    env = GridQuestEnv(size=5, n_tasks=BATCH)
    tasks, gold = env.tasks("train"), GoldPathPlanSource(env)
    shown = demonstrations(env, tasks, ScriptedExecutor("teacher", GridGuide(), skill=1.0))
    tokenizer = word_tokenizer(world_texts(shown, gold))
    model = Sizes(context=64).model(tokenizer.vocab_size)
    planner = Planner(model, init_params(model, jax.random.key(0)), tokenizer, max_tokens=40)
    repeats = 3 if quick else 9

    instructions, key = [task.instruction for task in tasks], jax.random.key(1)
    together = functools.partial(planner.plan_all, instructions, rng=key)
    seconds = interleaved(
        lambda: _none(together()), lambda: _none(map(_one(planner, key), instructions)), repeats=repeats
    )
    what = f"toy planner, {BATCH} plans of {planner.max_tokens} tokens"
    yield Case(SYSTEM, what, "s", *seconds, "one by one", SAMPLER_BAR)

    sizes = Sizes(layers=3, context=256)
    network = sizes.model(tokenizer.vocab_size)
    prompt = functools.partial(executor_prompt, commands=0)
    executor = LMExecutor(network, init_params(network, jax.random.key(0)), tokenizer, name="lm", prompt=prompt)
    contexts = [dataclasses.replace(context, plan=gold(context.task).plan) for context, _ in shown[:64]]
    seconds = interleaved(
        lambda: _none(executor.act_batch(contexts)), lambda: _none(map(executor.act, contexts)), repeats=repeats
    )
    rates = (len(contexts) / each for each in seconds)
    what = "toy executor, actions in the grid world"
    yield Case(SYSTEM, what, "actions/s", *rates, "one by one", higher_is_better=True)

    config = PlanGRPOConfig(
        prompts_per_step=2, num_generations=4, max_prompt_length=16, max_completion_length=40, steps=6
    )
    executors = tuple(ScriptedExecutor(name, GridGuide(), skill=skill) for name, skill in (("e", 0.5), ("n", 0.1)))
    history = train_grpo(planner, tasks, env=env, executors=executors, config=config).history
    compiled = sum(row["compilations"] for row in history[2:])
    yield Case(SYSTEM, "GRPO of the toy planner, updates 3 to 6", "compilations", compiled, 0, "none", 1.0)


def _one(planner: Planner, key: jax.Array):
    return lambda instruction: planner.plan(instruction, rng=key)


def _none(results) -> None:
    """Waits for results that are no arrays."""
    list(results)
