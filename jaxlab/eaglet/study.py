"""The whole of EAGLET on one world, stage by stage, each kept in a folder: plans, filter, cold start, reinforcement."""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxlab import core
from jaxlab.eaglet.consensus import FilterReport, hcf_filter
from jaxlab.eaglet.controls import ShuffledPlans, sample_plans
from jaxlab.eaglet.envs.base import Task, TextEnv
from jaxlab.eaglet.evaluation import EvalReport, evaluate, plans_of
from jaxlab.eaglet.executors import Executor
from jaxlab.eaglet.pairs import PlanRewards, plan_rewards
from jaxlab.eaglet.planner import Planner, train_sft
from jaxlab.eaglet.plans import Plan
from jaxlab.eaglet.preferences import DPOConfig, train_dpo
from jaxlab.eaglet.reinforcement import PlanGRPOConfig, train_grpo
from jaxlab.eaglet.rollouts import RolloutCache
from jaxlab.eaglet.synth import GoldPathPlanSource, PlanSource
from jaxlab.eaglet.worlds import ExecutorsConfig, Sizes, WorldConfig, make_executors
from jaxlab.models import word_tokenizer
from jaxlab.models.decoder import init_params
from jaxlab.rl.config import check_choice
from jaxlab.training import SFTConfig

METHODS = {
    "none": "no plan",
    "untrained": "untrained planner",
    "other_type": "gold plan of another type",
    "sft_all": "SFT on all plans",
    "sft": "SFT on filtered plans",
    "grpo": "GRPO, gain of both",
    "grpo_expert": "GRPO, gain of the expert",
    "grpo_novice": "GRPO, gain of the novice",
    "grpo_success": "GRPO, success",
    "dpo": "DPO on best and worst plans",
    "packaged": "the package's planner",
    "best_of": "best of 8 (oracle)",
    "gold_told": "gold plan as far as the task tells",
    "gold": "gold plan",
}
_REWARDS: dict[str, Any] = {"grpo": "gain", "grpo_expert": "expert", "grpo_novice": "novice", "grpo_success": "success"}
_HELD_OUT = ("seen", "unseen")
_NAME = "study.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What is trained and compared; every default is ours.

    Attributes:
      world: where.
      executors: who acts.
      planner: sizes of the decoder that plans.
      corruption: probability of a fault in a plan that the cold start gets to see.
      restate: the thinking of these plans repeats the task.
      open_steps: they leave open what the task does not tell, as in `GoldPathPlanSource`; so do plans of another type.
      filter_seeds: episodes of each executor that the filter judges a plan by.
      sft: the cold start.
      grpo: the reinforcement; its `reward` is the method's, and its `max_completion_length` that of every output.
      dpo: what is compared with the reinforcement, on pairs among 8 plans that the cold start draws for each task.
      methods: of `METHODS`.
      eval_seeds: episodes of each held-out task.
      seed: of faults, parameters, orders and draws.
      folder: keeps every stage; none: a temporary one.
    """

    world: WorldConfig = dataclasses.field(default_factory=WorldConfig)
    executors: ExecutorsConfig = dataclasses.field(default_factory=ExecutorsConfig)
    planner: Sizes = dataclasses.field(default_factory=Sizes)
    corruption: int | float = 0.5
    restate: bool = True
    open_steps: bool = False
    filter_seeds: tuple[int, ...] = (0, 1)
    sft: SFTConfig = dataclasses.field(default_factory=SFTConfig)
    grpo: PlanGRPOConfig = dataclasses.field(default_factory=PlanGRPOConfig)
    dpo: DPOConfig = dataclasses.field(default_factory=DPOConfig)
    methods: tuple[str, ...] = ("none", "other_type", "sft_all", "sft", "grpo", "gold")
    eval_seeds: tuple[int, ...] = (0, 1)
    seed: int = 0
    folder: str | None = None

    def __post_init__(self):
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods: expected at least one, none twice, got {self.methods}")
        for method in self.methods:
            check_method("methods", method, self.world)
        if self.grpo.reward != "gain":
            raise ValueError(f"grpo.reward: expected 'gain', since methods set it, got {self.grpo.reward!r}")


def check_method(name: str, method: str, world: WorldConfig) -> None:
    """Refuses an unknown method, and the package's planner in another world than its own.

    Raises:
      ValueError: `name` is the argument that it says.
    """
    check_choice(name, method, tuple(METHODS))
    if method == "packaged" and (world.name, world.options.get("seed", 0)) != ("grid_quest", 0):
        raise ValueError(
            f"{name}: expected 'packaged' with the world grid_quest of seed 0 alone, got it with {world.name} "
            f"{world.options}"
        )


class Study:
    """Stages of one study; what a stage has made before is only read.

    The folder holds `plans.jsonl`, `kept.jsonl`, `executors/`, and a planner a method, such as `sft/` and `grpo/`.
    """

    def __init__(self, config: StudyConfig, folder: str | os.PathLike):
        """Starts nothing, and writes nothing yet.

        Raises:
          ValueError: the folder belongs to a study of other settings.
        """
        self.config, self.folder = config, Path(folder)
        self.env: TextEnv = config.world.make()
        self.cache = RolloutCache()
        self._written: dict[tuple[str, str], PlanSource | None] = {}
        _check_folder(config, self.folder)

    @functools.cached_property
    def train(self) -> list[Task]:
        """Tasks for training."""
        return self.config.world.tasks(self.env, "train")

    @functools.cached_property
    def held_out(self) -> dict[str, list[Task]]:
        """Tasks of the other splits."""
        return {split: self.config.world.tasks(self.env, split) for split in _HELD_OUT}

    @functools.cached_property
    def executors(self) -> dict[str, Executor]:
        """Expert, novice and the other one."""
        others = [task for tasks in self.held_out.values() for task in tasks]
        if self.config.executors.kind == "lm":
            self._claim()
        return make_executors(self.config.executors, self.env, self.train, others, self.folder / "executors")

    @functools.cached_property
    def pair(self) -> tuple[Executor, Executor]:
        """Expert and novice."""
        return self.executors["expert"], self.executors["novice"]

    @functools.cached_property
    def where(self) -> Any:
        """What episodes are run in: this process's environment, or where decoders act, as many as they fill."""
        return self.config.world.make if self.config.executors.kind == "lm" else self.env

    @functools.cached_property
    def gold(self) -> GoldPathPlanSource:
        """Plans of the solutions, some with a fault."""
        config = self.config
        return GoldPathPlanSource(
            self.env,
            corruption=config.corruption,
            seed=config.seed,
            restate=config.restate,
            open_steps=config.open_steps,
        )

    def plans(self, source: PlanSource | None = None) -> list[tuple[Task, Plan]]:
        """A plan for each training task, from `plans.jsonl` or a source; None: `gold`."""
        path = self.folder / "plans.jsonl"
        if not path.exists():
            source = source or self.gold
            self._write(path, [(task, source(task)) for task in core.progress(self.train, "plans")])
        return self._read(path)

    def filtered(self) -> FilterReport:
        """What the filter makes of the plans."""
        expert, novice = self.pair
        report = hcf_filter(
            self.plans(), expert, novice, env=self.where, seeds=self.config.filter_seeds, cache=self.cache
        )
        self._write(self.folder / "kept.jsonl", report.kept)
        return report

    def kept(self) -> list[tuple[Task, Plan]]:
        """The plans that passed the filter."""
        path = self.folder / "kept.jsonl"
        return self._read(path) if path.exists() else self.filtered().kept

    def start(self) -> Planner:
        """A planner that has learnt nothing; its words are those of the plans, of tasks and of numbered steps."""
        config, pairs = self.config, self.plans()
        texts = ["Task:", *(plan.text for _, plan in pairs), *(task.instruction for task, _ in pairs)]
        tokenizer = word_tokenizer(texts)
        model = config.planner.model(tokenizer.vocab_size)
        params = init_params(model, core.named_key(jax.random.key(config.seed), "planner"))
        return Planner(model, params, tokenizer, max_tokens=config.grpo.max_completion_length)

    def planner(self, method: str) -> Planner:
        """The planner of a method that trains one, trained where the folder has none yet."""
        place = self.folder / method
        if not (place / "config.json").exists():
            self._claim()
            trained = self.start() if method == "untrained" else self._trained(method)
            trained.save(place)
        return Planner.load(place, max_tokens=self.config.grpo.max_completion_length)

    def _trained(self, method: str) -> Planner:
        config, run = self.config, self.folder / "runs" / method
        if method in _REWARDS:
            grpo = dataclasses.replace(config.grpo, reward=_REWARDS[method], seed=config.seed)
            start = self.planner("sft")
            return train_grpo(
                start, self.train, env=self.where, executors=self.pair, config=grpo, cache=self.cache, folder=run
            ).planner
        if method == "dpo":
            dpo, start = dataclasses.replace(config.dpo, seed=config.seed), self.planner("sft")
            return train_dpo(start, self._preferences(start), dpo, folder=run).planner
        pairs = self.plans() if method == "sft_all" else self.kept()
        sft = dataclasses.replace(config.sft, seed=config.seed)
        return train_sft(self.start(), [pair for pair in pairs if pair[1].ok], sft, folder=run).planner

    def _preferences(self, planner: Planner) -> list[tuple[Task, Plan, Plan]]:
        """Pairs of a planner's own plans, by the reward that the reinforcement pays."""
        drawn = sample_plans(
            planner,
            self.train,
            env=self.where,
            executors=self.pair,
            cache=self.cache,
            seeds=self.config.grpo.seeds,
            alpha=self.config.grpo.alpha,
            seed=self.config.seed,
        )
        return drawn.preferences()

    def source(self, method: str, split: str) -> PlanSource | Planner | None:
        """Where a method's plans come from.

        Raises:
          ValueError: an unknown method, or one that does not fit the world.
        """
        check_method("method", method, self.config.world)
        if method == "none":
            return None
        if method in ("gold", "gold_told"):
            return GoldPathPlanSource(self.env, open_steps=method == "gold_told")
        if method == "other_type":
            gold = GoldPathPlanSource(self.env, open_steps=self.config.open_steps)
            return ShuffledPlans(gold, self.held_out[split], seed=self.config.seed)
        if method == "packaged":
            return Planner.load()
        if method == "best_of":
            drawn = sample_plans(
                self.planner("sft"), self.held_out[split], env=self.where, executors=self.pair, cache=self.cache
            )
            return Given(*zip(*drawn.best()))
        return self.planner(method)

    def evaluate(self, method: str, split: str, names: Sequence[str] | None = None) -> dict[str, EvalReport]:
        """How executors do with a method's plans on held-out tasks."""
        tasks = self.held_out[split]
        source = self._once(method, split)
        return {
            name: evaluate(
                self.where, self.executors[name], tasks, planner=source, seeds=self.config.eval_seeds, cache=self.cache
            )
            for name in names or self.executors
        }

    def rewards(self, method: str, split: str) -> PlanRewards:
        """What a method's plans of held-out tasks earn: R_final."""
        source, tasks, grpo = self._once(method, split), self.held_out[split], self.config.grpo
        if source is None:
            raise ValueError("method: expected one with plans, got 'none'")
        return plan_rewards(
            [(task, source(task)) for task in tasks],
            env=self.where,
            executors=self.pair,
            cache=self.cache,
            seeds=self.config.eval_seeds,
            alpha=grpo.alpha,
            max_decay=grpo.max_decay,
        )

    def _once(self, method: str, split: str) -> PlanSource | None:
        """A method's plans of a split, written once."""
        if (method, split) not in self._written:
            source, tasks = self.source(method, split), self.held_out[split]
            self._written[method, split] = None if source is None else Given(tasks, plans_of(source, tasks))
        return self._written[method, split]

    def _claim(self) -> None:
        """Says whose folder it is, before anything is kept there."""
        core.replace_file(self.folder / _NAME, json.dumps(_settings(self.config), indent=1) + "\n")

    def _write(self, path: Path, pairs: Sequence[tuple[Task, Plan]]) -> None:
        self._claim()
        core.jsonl.rewrite(path, ({"task_id": task.id, "text": plan.text} for task, plan in pairs))

    def _read(self, path: Path) -> list[tuple[Task, Plan]]:
        known = {task.id: task for task in self.train}
        return [(known[row["task_id"]], Plan.parse(row["text"])) for row in core.jsonl.read(path)]


class Given:
    """Plans that are there already, as a source of them."""

    def __init__(self, tasks: Sequence[Task], plans: Sequence[Plan]):
        self._plans = {task.id: plan for task, plan in zip(tasks, plans, strict=True)}

    def __call__(self, task: Task) -> Plan:
        """The task's plan."""
        return self._plans[task.id]


_FREE = ("methods", "eval_seeds", "folder")


def _settings(config: StudyConfig) -> dict[str, Any]:
    """What decides the stages of a study, as JSON has it."""
    return json.loads(json.dumps({name: value for name, value in core.to_dict(config).items() if name not in _FREE}))


def _check_folder(config: StudyConfig, folder: Path) -> None:
    path = folder / _NAME
    saved = json.loads(path.read_text()) if path.exists() else {}
    for name, value in _settings(config).items():
        if saved.get(name, value) != value:  # a study begun before there was a setting takes ours
            raise ValueError(f"{name}: {folder} has a study with {saved[name]!r}, got {value!r}; use another folder")
