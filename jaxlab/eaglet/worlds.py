"""Worlds and executors of a study, by name: what a config file can say about them."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jaxlab.eaglet.cloning import clone_executors, demonstrations, world_texts
from jaxlab.eaglet.envs import GridGuide, GridQuestEnv, ScienceWorldEnv, Task, TextEnv, TextWorldEnv
from jaxlab.eaglet.executors import Executor, GoldGuide, Guide, ScriptedExecutor
from jaxlab.eaglet.lm_executor import LMExecutor
from jaxlab.eaglet.prompts import ExecutorPrompt, executor_prompt
from jaxlab.eaglet.synth import GoldPathPlanSource
from jaxlab.models import word_tokenizer
from jaxlab.models.decoder import Decoder, DecoderConfig, init_params
from jaxlab.rl.config import check_choice
from jaxlab.training import SFTConfig

WORLDS: dict[str, Callable[..., TextEnv]] = {
    "grid_quest": GridQuestEnv,
    "text_world": TextWorldEnv,
    "science_world": ScienceWorldEnv,
}
NAMES = ("expert", "novice", "other")
"""The executors of a study; the third one is never used in training."""


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """A world and how much of it is used.

    Attributes:
      name: of `WORLDS`.
      options: arguments of its class.
      train: tasks for training at most; None: all.
      held_out: tasks of each other split at most; None: all.
    """

    name: str = "grid_quest"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: int | None = None
    held_out: int | None = None

    def __post_init__(self):
        check_choice("name", self.name, tuple(WORLDS))
        for name in ("train", "held_out"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected None or at least 1, got {getattr(self, name)}")

    def make(self) -> TextEnv:
        """The environment."""
        return WORLDS[self.name](**self.options)

    def tasks(self, env: TextEnv, split: str) -> list[Task]:
        """The tasks that are used: the first of each type, then the second ones, and so on."""
        limit, by_type = self.train if split == "train" else self.held_out, dict[str, list[Task]]()
        for task in env.tasks(split):
            by_type.setdefault(task.type, []).append(task)
        rounds = itertools.zip_longest(*by_type.values())
        return [task for each in rounds for task in each if task is not None][:limit]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A Llama-like decoder over the words of a world.

    Attributes:
      hidden_size: width.
      layers: how many.
      heads: of attention.
      context: tokens at most.
    """

    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 128

    def model(self, vocabulary: int) -> Decoder:
        """The network."""
        return Decoder(
            DecoderConfig(
                vocab_size=vocabulary,
                hidden_size=self.hidden_size,
                intermediate_size=2 * self.hidden_size,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                max_position_embeddings=self.context,
                tie_word_embeddings=True,
            )
        )


@dataclasses.dataclass(frozen=True)
class ExecutorsConfig:
    """Expert, novice, and a third executor for evaluation alone.

    Attributes:
      kind: "scripted", or "lm": decoders cloned from gold paths. The novice has learnt to follow plans and little
        else; the expert is the novice trained further, on tasks without a plan above all; the third one came the same
        way from other parameters.
      skills: of scripted ones, what each knows of a task.
      follow: of scripted ones, how well each keeps to a plan.
      sizes: of the decoders.
      sft: the expert's further training.
      novice_steps: the novice's training, in all else the same.
      other_steps: the third one's further training; None: as long as the expert's.
      plain: of `clone_executors`, in the further training.
      temperature: of the decoders; a little chance ends the loops that small ones run into.
      detours: of `demonstrations`.
      commands: earlier commands that decoders see; None: all.
      next_step: of `executor_prompt`, like `commands`.
      decoys: of `clone_executors`.
    """

    kind: Literal["scripted", "lm"] = "scripted"
    skills: tuple[int | float, ...] = (0.5, 0.1, 0.3)
    follow: tuple[int | float, ...] = (0.95, 0.9, 0.9)
    sizes: Sizes = dataclasses.field(default_factory=lambda: Sizes(context=256))
    sft: SFTConfig = dataclasses.field(default_factory=lambda: SFTConfig(steps=3000))
    novice_steps: int = 2000
    other_steps: int | None = None
    plain: int = 4
    temperature: int | float = 0.5
    detours: int | float = 0.2
    commands: int | None = 0
    next_step: bool = True
    decoys: bool = True

    def __post_init__(self):
        check_choice("kind", self.kind, ("scripted", "lm"))
        for name in ("skills", "follow"):
            if len(getattr(self, name)) != len(NAMES):
                raise ValueError(f"{name}: expected one of each of {', '.join(NAMES)}, got {getattr(self, name)}")


def make_executors(
    config: ExecutorsConfig, env: TextEnv, train: Sequence[Task], others: Sequence[Task], folder: Path
) -> dict[str, Executor]:
    """The executors, by name.

    Args:
      config: which ones.
      env: knows gold actions.
      train: tasks that may be learnt from.
      others: tasks that scripted executors meet besides; their gold actions are their hands and feet there.
      folder: keeps decoders, each as a Hugging Face folder.
    """
    if config.kind == "scripted":
        guide = _guide(env, [*train, *others])
        return {
            name: ScriptedExecutor(name, guide, skill=skill, follow=follow)
            for name, skill, follow in zip(NAMES, config.skills, config.follow)
        }
    if not all((folder / name / "config.json").exists() for name in NAMES):
        _clone(config, env, train, folder)
    options: dict[str, Any] = {"temperature": config.temperature, "prompt": _prompt(config)}
    return {name: LMExecutor.load(folder / name, name=name, **options) for name in NAMES}


def _clone(config: ExecutorsConfig, env: TextEnv, train: Sequence[Task], folder: Path) -> None:
    """Trains a novice and then the expert, and the same again for the other one."""
    teacher = ScriptedExecutor("teacher", _guide(env, train), skill=1.0)
    shown, gold = demonstrations(env, train, teacher, detours=config.detours), GoldPathPlanSource(env)
    tokenizer = word_tokenizer(world_texts(shown, gold))
    model = config.sizes.model(tokenizer.vocab_size)

    def trained(name: str, steps: int, params: Any, seed: int, plain: int = 1) -> LMExecutor:
        adam = dataclasses.replace(config.sft.optimizer, steps=steps)
        made = clone_executors(
            model,
            params,
            tokenizer,
            shown,
            gold,
            {name: steps},
            dataclasses.replace(config.sft, steps=steps, seed=seed, optimizer=adam),
            decoys=config.decoys,
            plain=plain,
            prompt=_prompt(config),
            folder=folder / f"run-{name}",
        )
        return made[name]

    further = (("novice", "expert", config.sft.steps), ("base", "other", config.other_steps or config.sft.steps))
    for seed, (first, last, steps) in enumerate(further, config.sft.seed):
        novice = trained(first, config.novice_steps, init_params(model, jax.random.key(seed)), seed)
        novice.save(folder / first)
        trained(last, steps, novice.params, seed, config.plain).save(folder / last)


def _prompt(config: ExecutorsConfig) -> ExecutorPrompt:
    return functools.partial(executor_prompt, commands=config.commands, next_step=config.next_step)


def _guide(env: TextEnv, tasks: Sequence[Task]) -> Guide:
    if isinstance(env, GridQuestEnv):
        return GridGuide()
    return GoldGuide({task.id: env.gold_actions(task) for task in tasks})
