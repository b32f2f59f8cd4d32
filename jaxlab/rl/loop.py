"""The loop of policy optimisation: roll out, score, update, log, checkpoint; for rollouts of any kind."""

import contextlib
import dataclasses
import functools
import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from jaxlab import core
from jaxlab.rl.advantages import compute_advantages
from jaxlab.rl.batch import UpdateBatch, loss_mask, rollout_numbers, shaped_rewards
from jaxlab.rl.config import GRPOConfig, SFPOConfig
from jaxlab.rl.entropy_stop import EntropyZScoreStop
from jaxlab.rl.identity import check_same, identity
from jaxlab.rl.rollout import LogpFunction, Rollout, RolloutFunction, next_batch
from jaxlab.rl.update import update_function
from jaxlab.training import OptimizerConfig, TrainState, optimizer
from jaxlab.training.sharding import BATCH_AXES, batch_sharding, place_batch, place_state, state_shardings


class TrainResult(NamedTuple):
    """Parameters after the last step, and one dict of numbers for each step of this run."""

    params: PyTree
    history: list[dict[str, float]]


class PolicyTrainer:
    """Policy optimisation with rollouts and log-probabilities of any kind; `GRPOTrainer` is this with text.

    One program makes all passes of a step, whether slow-fast updates are on or off, so that nothing is compiled after
    the first step. With a folder every step is a line of `metrics.jsonl`, and a run goes on from its last checkpoint to
    the same numbers, bit for bit on one device.

    The numbers of a step:

    | name | |
    | --- | --- |
    | `loss`, `grad_norm`, `entropy`, `clip_fraction`, ... | means over the updates of its last pass |
    | `kl` | from the reference policy; where there is none `approx_kl`, from the policy that drew the batch |
    | `skipped` | updates that were not made since their gradient was not finite, in all passes |
    | `reward`, `reward_std` | mean of the (shaped) rewards, and of the groups' deviations |
    | `zero_variance_fraction` | groups whose rewards are all equal: they have no gradient |
    | `all_masked` | 1 where no token counts: loss and gradient are 0 |
    | `sampler_logp_gap` | mean distance of the trainer's log-probabilities from the sampler's |
    | `sfpo_active` | whether the step made fast passes |
    | `rollout_seconds`, `update_seconds` | sampling and rewards; everything else |
    | `compilations` | programs compiled; 0 from the second step of a process on |
    """

    def __init__(
        self,
        params: PyTree,
        rollout: RolloutFunction,
        token_logps: LogpFunction,
        config: GRPOConfig,
        *,
        mesh: Mesh | None = None,
        names: PyTree | None = None,
        ref_params: PyTree | None = None,
        tx: optax.GradientTransformation | None = None,
        folder: str | os.PathLike | None = None,
        callback: Callable[["PolicyTrainer", dict[str, float]], None] | None = None,
        allow_changes: bool = False,
        ddof: int = 1,
        skip_uniform: bool = False,
    ):
        """Lays out the state; the step is compiled when it is first made.

        Args:
            params: of the policy. They are copied, not donated.
            rollout: draws batches, see `jaxlab.rl.rollout`.
            token_logps: log-probabilities of a rollout's inputs, differentiable in the parameters.
            config: of the run.
            mesh: rows lie over its data axes, parameters by `names`.
            names: the parameters' tree with logical axis names; None replicates them on the mesh.
            ref_params: of the reference policy; needed where `config.beta` > 0, else for the metric `kl` alone.
            tx: the optimiser; None: AdamW behind a clip of the gradient's norm, from `config`.
            folder: for metrics and checkpoints.
            callback: called after each step with the trainer and the step's numbers, in every process.
            allow_changes: go on from a checkpoint of another config; the stop rule's window must be the same.
            ddof: of the groups' standard deviation, see `compute_advantages`.
            skip_uniform: where the rewards of every group are equal, warn and make no update, which would be that of
                decay and old moments alone.

        Raises:
            ValueError: `beta` > 0 without `ref_params`, several processes without a mesh, or a batch, mini-batch or
                micro-batch whose rows the mesh's data axes do not divide.
        """
        if config.beta > 0 and ref_params is None:
            raise ValueError(f"ref_params: expected parameters, since beta = {config.beta}, got None")
        _check_mesh(config, mesh)
        self.config, self.folder = config, None if folder is None else Path(folder)
        self._rollout, self._token_logps = rollout, token_logps
        self._mesh, self._names, self._callback, self._allow_changes = mesh, names, callback, allow_changes
        self._skip_uniform = skip_uniform
        self._tx = default_optimizer(config) if tx is None else tx
        sfpo = config.sfpo or SFPOConfig()
        self._checkpointer = None if self.folder is None else core.Checkpointer(self.folder / "checkpoints")
        self._draw = 0
        self._state, self._shardings = self._placed(params, core.named_key(jax.random.key(config.seed), "rollout"))
        self._ref_params = ref_params
        if mesh is not None and ref_params is not None:
            self._ref_params = place_state(ref_params, self._shardings.params)
        stop = EntropyZScoreStop(sfpo.window, sfpo.threshold, sfpo.two_sided)
        self._entropies = stop.init()
        self._active, self._observe = stop.active, jax.jit(stop.update)
        self._advantages = jax.jit(
            functools.partial(
                compute_advantages,
                group_size=config.num_generations,
                kind=config.advantage_kind,
                eps=config.advantage_eps,
                ddof=ddof,
            )
        )
        self._score = jax.jit(self._score_function)
        where = None if mesh is None else (self._shardings, None)
        update = update_function(config, self._tx, token_logps, self._laid_out)
        self._update = jax.jit(update, donate_argnums=0, out_shardings=where)

    @property
    def params(self) -> PyTree:
        """Of the policy as it is now; the next step consumes them."""
        return self._state.params

    def train(self) -> TrainResult:
        """Runs until `config.steps`, from the folder's latest checkpoint if there is one.

        Called again it goes on from there; without any checkpoint, from the last step made.

        Raises:
            ValueError: the checkpoint is of another config, the first difference is named; or a rollout does not fit.
            FloatingPointError: a gradient is not finite and `config.nonfinite` is "raise"; its update was not made.
        """
        history: list[dict[str, float]] = []
        self._resume()
        first = int(self._state.step)
        with contextlib.nullcontext() if self.folder is None else core.MetricsLogger(self.folder) as logger:
            for index in core.progress(range(first + 1, self.config.steps + 1), "policy optimisation"):
                numbers = self._step(index)
                if logger is not None:
                    logger.log(index, numbers)
                history.append({"step": index, **numbers})
                every = self.config.checkpoint_every
                if index == self.config.steps or (every and index % every == 0):
                    self._save(index)
                if self._callback is not None:
                    self._callback(self, history[-1])
        return TrainResult(self._state.params, history)

    def _step(self, index: int) -> dict[str, float]:
        config = self.config
        with core.count_compilations() as compiled:
            started = time.perf_counter()
            state = self._state
            rollout, self._draw = next_batch(self._rollout, state.params, state.rng, self._draw, config)
            rolled = time.perf_counter()
            active = np.asarray(config.sfpo is not None and bool(self._active(self._entropies)))
            with self._in_mesh():
                batch, numbers = self._prepared(rollout)
                updates = not (self._skip_uniform and numbers["zero_variance_fraction"] == 1)
                values = self._updated(batch, active) if updates else self._not_updated(index)
            if updates and not numbers["all_masked"]:  # it would be the entropy of nothing
                self._entropies = self._observe(self._entropies, values["entropy"])
            updated = time.perf_counter()
        if values["skipped"] and config.nonfinite == "raise":
            raise FloatingPointError(
                f"step {index}: {values['skipped']:.0f} gradients were not finite, their updates were not made; "
                "config.nonfinite='skip' counts them and goes on"
            )
        return {
            **rollout.metrics,
            **numbers,
            **({"kl": values["approx_kl"]} if updates else {}),
            **values,
            "rollout_seconds": rolled - started,
            "update_seconds": updated - rolled,
            "compilations": compiled.count,
            "sfpo_active": bool(active) and updates,
        }

    def _updated(self, batch: UpdateBatch, active: np.ndarray) -> dict[str, float]:
        self._state, metrics = self._update(self._state, batch, active)
        return {name: float(value) for name, value in jax.device_get(metrics).items()}

    def _not_updated(self, index: int) -> dict[str, float]:
        warnings.warn(f"step {index}: the rewards of every group are equal, no update is made", RuntimeWarning, 4)
        step = self._state.step
        place = step.sharding if step.committed else None  # as it was, or everything would be compiled anew
        self._state = dataclasses.replace(self._state, step=jax.device_put(np.int32(index), place))
        return {"loss": 0.0, "grad_norm": 0.0, "skipped": 0.0}

    def _prepared(self, rollout: Rollout) -> tuple[UpdateBatch, dict[str, float]]:
        """What the passes need of a rollout, computed once before the first of them."""
        config = self.config
        rewards, mask = shaped_rewards(rollout, config), loss_mask(rollout, config)
        numbers = rollout_numbers(rollout, rewards, mask, config.num_generations)
        advantages = np.asarray(self._advantages(rewards))
        inputs, mask, sampled, advantages = self._rows((rollout.inputs, mask, rollout.logps, advantages))
        old_logps, weights, ref_logps = sampled, None, None
        if config.recompute_old_logps:
            old_logps, gap, weights = self._score(self._state.params, inputs, mask, sampled)
            numbers["sampler_logp_gap"] = float(gap)
        if self._ref_params is not None:
            ref_logps = self._score(self._ref_params, inputs, mask, sampled)[0]
        return UpdateBatch(inputs, mask, old_logps, advantages, weights, ref_logps), numbers

    def _score_function(self, params: PyTree, inputs: PyTree, mask: Array, sampled: Array) -> tuple[Array, Array, Any]:
        """Log-probabilities of the tokens, their mean distance from the sampler's, and the correction for it."""
        config = self.config
        pieces = config.batch_size // (config.micro_batch_size or config.batch_size)

        def score(rows: PyTree) -> Array:
            return self._token_logps(params, self._laid_out(rows)).logp

        if pieces == 1:
            logps = score(inputs)
        else:
            split = jax.tree.map(lambda leaf: jnp.reshape(leaf, (pieces, -1, *leaf.shape[1:])), inputs)
            logps = jax.lax.map(score, split).reshape(mask.shape)
        away = jnp.where(mask > 0, logps - sampled, 0.0)
        gap = jnp.sum(jnp.abs(away)) / jnp.maximum(jnp.sum(mask), 1.0)
        weights = None
        if config.importance_cap is not None:
            weights = jnp.minimum(jnp.exp(jnp.clip(away, -20.0, 20.0)), config.importance_cap)
        return self._laid_out(logps), gap, self._laid_out(weights)

    def _in_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _rows(self, tree: PyTree) -> PyTree:
        return jax.device_put(tree) if self._mesh is None else place_batch(tree, self._mesh)

    def _laid_out(self, rows: PyTree) -> PyTree:
        """A part of a batch over the mesh's data axes again: its rows lay together."""
        if self._mesh is None:
            return rows
        mesh = self._mesh
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, batch_sharding(mesh, leaf.shape)), rows)

    def _placed(self, params: PyTree, key: Array) -> tuple[TrainState, Any]:
        """The state before the first step, in memory of its own."""
        if self._mesh is None:
            return TrainState.create(jax.tree.map(jnp.copy, params), self._tx, key), None
        state = jax.eval_shape(lambda params, key: TrainState.create(params, self._tx, key), params, key)
        where = state_shardings(state, self._tx, self._mesh, self._names)
        placed = place_state(params, where.params)
        create = jax.jit(lambda params, key: TrainState.create(params, self._tx, key), out_shardings=where)
        with self._in_mesh():
            return create(placed, key), where

    def _save(self, step: int) -> None:
        if self._checkpointer is not None:
            state = {"train": self._state, "entropies": self._entropies}
            self._checkpointer.save(step, state, {"draw": self._draw, "config": identity(self.config)})

    def _resume(self) -> None:
        if self._checkpointer is None or self._checkpointer.latest() is None:
            return
        if not self._allow_changes:
            check_same(self._checkpointer.extra()["config"], identity(self.config), str(self.folder))
        state, extra = self._checkpointer.restore({"train": self._state, "entropies": self._entropies})
        self._state, self._entropies, self._draw = state["train"], state["entropies"], extra["draw"]


def default_optimizer(config: GRPOConfig) -> optax.GradientTransformation:
    """AdamW as SFPO's scripts have it, behind a clip of the gradient's global norm."""
    return optimizer(
        OptimizerConfig(
            learning_rate=config.learning_rate,
            b2=0.999,
            weight_decay=config.weight_decay,
            clip_norm=config.max_grad_norm,
        )
    )


def _check_mesh(config: GRPOConfig, mesh: Mesh | None) -> None:
    if mesh is None:
        if jax.process_count() > 1:
            raise ValueError(f"mesh: expected one over the devices of all {jax.process_count()} processes, got None")
        return
    axes = [axis for axis in BATCH_AXES if axis in mesh.shape]
    shards = math.prod(mesh.shape[axis] for axis in axes)
    rows = {
        "prompts_per_step * num_generations": config.batch_size,
        "mini_batch_size": config.mini_batch_size,
        "micro_batch_size": config.micro_batch_size,
    }
    for name, count in rows.items():
        if count is not None and count % shards:
            raise ValueError(
                f"{name}: expected a multiple of {shards}, the shards of mesh axes {', '.join(axes)}, got {count}"
            )
