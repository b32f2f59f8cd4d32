"""The planner's reinforcement: plans are rewarded by what executors gain from them (arXiv 2510.05608).

The loop, the objective and the optimiser are those of `jaxlab.rl`; here are its rollouts: plans, tried out.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from jaxlab.eaglet.envs.base import Task
from jaxlab.eaglet.executors import Executor
from jaxlab.eaglet.pairs import check_executors, plan_rewards
from jaxlab.eaglet.planner import PLAN_END, Planner, TrainResult
from jaxlab.eaglet.plans import Plan
from jaxlab.eaglet.rollouts import Env, RolloutCache
from jaxlab.inference import SamplingParams, generate
from jaxlab.models.decoder import abstract_params
from jaxlab.rl import GRPOConfig
from jaxlab.rl.config import check_choice
from jaxlab.rl.logps import text_logps
from jaxlab.rl.loop import PolicyTrainer
from jaxlab.rl.rollout import Rollout, chosen_rows, text_inputs

REWARDS = ("gain", "expert", "novice", "success")


@dataclasses.dataclass(frozen=True)
class PlanGRPOConfig(GRPOConfig):
    """GRPO of a planner: `GRPOConfig` with defaults of ours, since the paper's were not found, and the plan's reward.

    Attributes:
      beta: weight of the KL divergence from the planner as it was.
      learning_rate: 1e-6 suits models of a billion parameters and more, 1e-4 small ones.
      alpha: of `capability_gain`.
      max_decay: see there.
      tie_bonus: see there.
      seeds: of the episodes; their baselines are run once.
      reward: "gain" is the paper's, of both executors; "expert" and "novice" are its ablations, the gain of one;
        "success" is the mean reward with the plan. The format's reward is added to each.
      max_plan_tokens: a longer plan is cut and has no format reward; None: the planner's.
    """

    beta: int | float = 0.01
    alpha: int | float = 0.01
    max_decay: int | float | None = None
    tie_bonus: bool = False
    seeds: tuple[int, ...] = (0,)
    reward: Literal["gain", "expert", "novice", "success"] = "gain"
    max_plan_tokens: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.num_generations < 2:
            raise ValueError(f"num_generations: expected a value >= 2, got {self.num_generations}")
        check_choice("reward", self.reward, REWARDS)
        if not self.alpha > -1:
            raise ValueError(f"alpha: expected a value > -1, got {self.alpha}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected at least one, none twice, got {self.seeds}")


class PlanRollouts:
    """Groups of plans for tasks, tried out by executors: the rollout function of the planner's trainer.

    Every process of several draws all plans and tries out those of its own tasks; then they share the rewards.
    """

    def __init__(
        self,
        planner: Planner,
        tasks: Sequence[Task],
        *,
        env: Env,
        executors: tuple[Executor, Executor],
        config: PlanGRPOConfig,
        cache: RolloutCache | None = None,
        mesh: Mesh | None = None,
        workers: int | None = None,
        timeout_s: float | None = None,
    ):
        """Reads all instructions; takes what `train_grpo` does.

        Raises:
          ValueError: one executor twice, no tasks, or an instruction that does not fit.
        """
        check_executors(executors)
        self._planner, self._tasks, self._config, self._mesh = planner, list(tasks), config, mesh
        if config.max_plan_tokens is not None:
            self._planner = dataclasses.replace(planner, max_plan_tokens=config.max_plan_tokens)
        acting = {"expert": executors[:1], "novice": executors[1:]}.get(config.reward, executors)
        self._rewards = functools.partial(
            plan_rewards,
            env=env,
            executors=acting,
            cache=RolloutCache() if cache is None else cache,
            seeds=config.seeds,
            alpha=config.alpha,
            max_decay=config.max_decay,
            tie_bonus=config.tie_bonus,
            workers=workers,
            timeout_s=timeout_s,
        )
        if not self._tasks:
            raise ValueError("tasks: expected at least one, got none")
        self._prompts = [planner.prompt_ids(task.instruction) for task in self._tasks]
        self._longest = max(map(len, self._prompts))
        room = min(
            config.max_prompt_length, planner.model.config.max_position_embeddings - config.max_completion_length
        )
        if self._longest > room:
            raise ValueError(f"tasks: expected instructions of at most {room} tokens, got {self._longest}")

    def __call__(self, params: PyTree, key: Array, draw: int) -> Rollout:
        """Draws and rewards one batch of plans."""
        config, planner = self._config, self._planner
        rows = chosen_rows(draw, config.prompts_per_step, len(self._tasks), config.seed)
        sampling = SamplingParams(
            max_tokens=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            stop=PLAN_END,
        )
        started = time.perf_counter()
        out = generate(
            planner.model,
            params,
            [self._prompts[row] for row in rows],
            sampling,
            n=config.num_generations,
            rng=key,
            tokenizer=planner.tokenizer,
            mesh=self._mesh,
            prompt_length=self._longest,
        )
        tokens, mask, logps, lengths = (
            np.asarray(x) for x in jax.device_get((out.tokens, out.mask, out.logps, out.lengths))
        )
        sampled = time.perf_counter()
        sources = [row for row in rows for _ in range(config.num_generations)]
        rewards, metrics = self._scored([(self._tasks[row], plan) for row, plan in zip(sources, planner.read(out))])
        seconds = {"sampling_seconds": sampled - started, "reward_seconds": time.perf_counter() - sampled}
        return Rollout(
            inputs=text_inputs([self._prompts[row] for row in sources], self._longest, tokens, lengths),
            mask=mask.astype(np.float32),
            logps=logps,
            rewards=rewards,
            truncated=np.array([reason == "length" for reason in out.finish_reason]),
            metrics={**metrics, **seconds},
        )

    def _scored(self, pairs: list[tuple[Task, Plan]]) -> tuple[np.ndarray, dict[str, float]]:
        """Rewards of plans, and what the log says of them; each process tries out its own tasks' plans."""
        processes = jax.process_count()
        mine = [k for k in range(len(pairs)) if k // self._config.num_generations % processes == jax.process_index()]
        table, error = np.zeros((len(_COLUMNS), len(pairs))), None
        try:
            if mine:
                table[:, mine] = self._tried([pairs[k] for k in mine])
        except Exception as raised:
            error = raised
        if processes > 1:
            table = _shared(table, error)
        elif error is not None:
            raise error
        told = dict(zip(_COLUMNS, table))
        metrics = {
            "gain": told["gain"].mean(),
            "format": told["format"].mean(),
            "gain_factor_max": told["factor"].max(),
            "env_steps": told["env_steps"].sum(),
        }
        return told["reward"].astype(np.float32), {name: float(value) for name, value in metrics.items()}

    def _tried(self, pairs: list[tuple[Task, Plan]]) -> list[np.ndarray]:
        """`_COLUMNS` of plans; the environment steps of all of them stand with the first."""
        got = self._rewards(pairs)
        with_plan, factors = np.zeros((2, len(got.pairs)))
        for index, pair in enumerate(got.pairs):
            if pair.without is not None and pair.with_plan is not None:
                with_plan[index] = max(pair.with_plan.reward, 0.0)
                if pair.with_plan.reward > pair.without.reward:
                    factors[index] = (1 + self._config.alpha) ** (pair.without.steps - pair.with_plan.steps)
        success = with_plan.reshape(len(pairs), -1).mean(axis=1)
        reward = success + got.format if self._config.reward == "success" else got.final
        steps = np.eye(1, len(pairs))[0] * got.env_steps
        return [reward, got.ecgr, got.format, factors.reshape(len(pairs), -1).max(axis=1), steps]


_COLUMNS = ("reward", "gain", "format", "factor", "env_steps")


def _shared(table: np.ndarray, error: Exception | None) -> np.ndarray:
    """The sum of all processes' tables, in each of them; where one failed all raise."""
    from jax.experimental import multihost_utils

    failed = multihost_utils.process_allgather(np.array(error is not None))
    if error is not None:
        raise error
    if failed.any():
        raise RuntimeError("another process failed to try out its plans; its own error says why")
    # The gather goes through devices, which would round float64.
    parts = multihost_utils.process_allgather(table.astype(np.float64).view(np.uint32))
    return np.ascontiguousarray(parts).view(np.float64).sum(axis=0)


def train_grpo(
    planner: Planner,
    tasks: Sequence[Task],
    *,
    env: Env,
    executors: tuple[Executor, Executor],
    config: PlanGRPOConfig,
    cache: RolloutCache | None = None,
    folder: str | os.PathLike | None = None,
    mesh: Mesh | None = None,
    workers: int | None = None,
    timeout_s: float | None = None,
    callback: Callable[[PolicyTrainer, dict[str, float]], None] | None = None,
) -> TrainResult:
    """Trains a planner on what executors gain from its plans; the executors stay as they are.

    Advantages are normalised by the deviation of the group as a population. A step in which every group's rewards are
    equal makes no update, and a warning. The log has, beside `PolicyTrainer`'s numbers, `gain`, `format`,
    `gain_factor_max` (the greatest (1 + alpha)^(n - m) that was paid) and `env_steps`. With `config.sfpo` updates are
    slow-fast.

    Args:
      planner: where it starts, and the reference of the KL divergence.
      tasks: of the training split.
      env: as in `plan_rewards`, and so are `workers` and `timeout_s`.
      executors: expert and novice.
      config: of the run.
      cache: where baselines are found, and put; None: one of this run's own.
      folder: for metrics and checkpoints; a run found there goes on to the same bits.
      mesh: axes `data` and `fsdp` share the plans' sequences, `fsdp` and `tensor` the parameters. Of several processes
        every one makes the same call.
      workers: see above.
      timeout_s: see above.
      callback: called after each step with the trainer and the step's numbers.

    Raises:
      ValueError: an argument that cannot work; it is named.
      FloatingPointError: a reward is NaN, or a gradient is not finite.
    """
    rollouts = PlanRollouts(
        planner,
        tasks,
        env=env,
        executors=executors,
        config=config,
        cache=cache,
        mesh=mesh,
        workers=workers,
        timeout_s=timeout_s,
    )
    trainer = PolicyTrainer(
        planner.params,
        rollouts,
        functools.partial(
            text_logps, planner.model, length=config.max_completion_length, temperature=config.temperature
        ),
        config,
        mesh=mesh,
        names=None if mesh is None else abstract_params(planner.model),
        ref_params=planner.params if config.beta > 0 else None,
        folder=folder,
        callback=callback,
        ddof=0,
        skip_uniform=True,
    )
    params, history = trainer.train()
    return TrainResult(dataclasses.replace(planner, params=params), history)
