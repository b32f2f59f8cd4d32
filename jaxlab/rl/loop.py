"""The loop of policy optimisation: roll out, score, update, log, checkpoint; for rollouts of any kind."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, PyTree

from jaxlab import core
from jaxlab.rl.advantages import compute_advantages
from jaxlab.rl.config import GRPOConfig, SFPOConfig
from jaxlab.rl.entropy_stop import EntropyZScoreStop
from jaxlab.rl.losses import policy_terms
from jaxlab.rl.rollout import LogpFunction, Rollout, RolloutFunction, with_signal
from jaxlab.rl.slow_fast import make_pass, slow_fast
from jaxlab.training import OptimizerConfig, TrainState, optimizer
from jaxlab.training.sharding import batch_sharding, place_batch, place_state, state_shardings

# What decides no number of the steps before, or only how much is kept of them.
_FREE = ("steps", "checkpoint_every")


class TrainResult(NamedTuple):
    """Parameters after the last step, and one dict of numbers for each step of this run."""

    params: PyTree
    history: list[dict[str, float]]


@struct.dataclass
class UpdateBatch:
    """B sequences as an update takes them: rows of arrays, sharded over a mesh's data axes.

    Attributes:
        inputs: for the log-prob function.
        mask: `[B,T]` float32.
        old_logps: `[B,T]` float32, of the policy that drew the tokens.
        advantages: `[B]` float32.
        weights: `[B,T]` float32 factors of the tokens' losses, None: 1.
        ref_logps: `[B,T]` float32 of the reference policy, None without one.
    """

    inputs: PyTree
    mask: Any
    old_logps: Any
    advantages: Any
    weights: Any
    ref_logps: Any


class PolicyTrainer:
    """Policy optimisation with rollouts and log-probabilities of any kind; `GRPOTrainer` is this with text.

    One program makes all passes of a step, whether slow-fast updates are on or off, so that nothing is compiled after
    the first step. With a folder every step is a line of `metrics.jsonl`, and a run goes on from its last checkpoint to
    the same numbers.
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
    ):
        """Nothing is computed yet.

        Args:
            params: of the policy. They are copied, not donated.
            rollout: draws batches, see `jaxlab.rl.rollout`.
            token_logps: log-probabilities of a rollout's inputs, differentiable in the parameters.
            config: of the run.
            mesh: rows lie over its data axes, parameters by `names`.
            names: the parameters' tree with logical axis names; None replicates them on the mesh.
            ref_params: of the reference policy; needed where `config.beta` > 0.
            tx: the optimiser; None: AdamW behind a clip of the gradient's norm, from `config`.
            folder: for metrics and checkpoints.
            callback: called after each step with the trainer and the step's numbers.
            allow_changes: go on from a checkpoint of another config.

        Raises:
            ValueError: `beta` > 0 without `ref_params`.
        """
        if config.beta > 0 and ref_params is None:
            raise ValueError(f"ref_params: expected parameters, since beta = {config.beta}, got None")
        self.config, self.folder = config, None if folder is None else Path(folder)
        self._rollout, self._token_logps = rollout, token_logps
        self._mesh, self._names, self._callback, self._allow_changes = mesh, names, callback, allow_changes
        self._tx = default_optimizer(config) if tx is None else tx
        self._sfpo = config.sfpo or SFPOConfig()
        self._stop = EntropyZScoreStop(self._sfpo.window, self._sfpo.threshold, self._sfpo.two_sided)
        self._checkpointer = None if self.folder is None else core.Checkpointer(self.folder / "checkpoints")
        self._draw = 0
        key = core.named_key(jax.random.key(config.seed), "rollout")
        self._state, self._shardings = self._placed(params, key)
        self._entropies = self._stop.init()
        self._ref_params = ref_params if config.beta > 0 else None
        if mesh is not None and self._ref_params is not None:
            self._ref_params = place_state(ref_params, self._shardings.params)
        where = None if mesh is None else (self._shardings, None)
        self._update = jax.jit(self._update_function, donate_argnums=0, out_shardings=where)
        self._score = jax.jit(self._score_function)

    @property
    def params(self) -> PyTree:
        """Of the policy as it is now; the next step consumes them."""
        return self._state.params

    def train(self) -> TrainResult:
        """Runs until `config.steps`, from the folder's latest checkpoint if there is one.

        Raises:
            ValueError: the checkpoint is of another config, the first difference is named.
            FloatingPointError: a gradient is not finite and `config.nonfinite` is "raise"; its update was not made.
        """
        history: list[dict[str, float]] = []
        self._resume()
        first = int(self._state.step)
        with contextlib.nullcontext() if self.folder is None else core.MetricsLogger(self.folder) as logger:
            for index in core.progress(range(first + 1, self.config.steps + 1), "policy optimisation"):
                row = {"step": index, **self._step()}
                if logger is not None:
                    logger.log(index, {name: value for name, value in row.items() if name != "step"})
                history.append(row)
                every = self.config.checkpoint_every
                if self._checkpointer is not None and (index == self.config.steps or (every and index % every == 0)):
                    self._save(index)
                if self._callback is not None:
                    self._callback(self, row)
        return TrainResult(self._state.params, history)

    def _step(self) -> dict[str, float]:
        config = self.config
        with core.count_compilations() as compiled, self._in_mesh():
            started = time.perf_counter()
            rollout, self._draw = with_signal(
                self._rollout,
                self._state.params,
                self._state.rng,
                self._draw,
                group_size=config.num_generations,
                rounds=config.dynamic_sampling,
            )
            rolled = time.perf_counter()
            batch, numbers = self._prepared(rollout)
            active = self._slow_fast_active()
            self._state, metrics = self._update(self._state, batch, active)
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self._entropies = self._stop.update(self._entropies, values["entropy"])
            updated = time.perf_counter()
        row = {
            **rollout.metrics,
            **numbers,
            **values,
            "rollout_seconds": rolled - started,
            "update_seconds": updated - rolled,
            "compilations": compiled.count,
            "sfpo_active": bool(active),
        }
        if values["skipped"] and config.nonfinite == "raise":
            raise FloatingPointError(
                f"step {int(self._state.step)}: {values['skipped']:.0f} gradients were not finite, their updates were "
                "not made; config.nonfinite='skip' counts them and goes on"
            )
        return row

    def _prepared(self, rollout: Rollout) -> tuple[UpdateBatch, dict[str, float]]:
        """What the passes need of a rollout, computed once before the first of them."""
        config = self.config
        rewards = rollout.rewards + _overlong(rollout, config)
        advantages = np.asarray(
            compute_advantages(
                rewards, group_size=config.num_generations, kind=config.advantage_kind, eps=config.advantage_eps
            )
        )
        mask = rollout.mask * ~rollout.truncated[:, None] if config.mask_truncated else rollout.mask
        mask = np.asarray(mask, np.float32)
        inputs, placed_mask = self._rows((rollout.inputs, mask))
        numbers = rollout_numbers(rollout, rewards, mask, config.num_generations)
        old_logps, weights, ref_logps = self._rows(rollout.logps), None, None
        if config.recompute_old_logps:
            old_logps, gap, weights = self._score(self._state.params, inputs, placed_mask, old_logps)
            numbers["sampler_logp_gap"] = float(gap)
        if self._ref_params is not None:
            ref_logps = self._score(self._ref_params, inputs, placed_mask, old_logps)[0]
        batch = UpdateBatch(inputs, placed_mask, old_logps, self._rows(advantages), weights, ref_logps)
        return batch, numbers

    def _score_function(self, params: PyTree, inputs: PyTree, mask: Array, sampled: Array) -> tuple[Array, Array, Any]:
        """Log-probabilities of the tokens, their mean distance from the sampler's, and the correction for it."""
        config = self.config
        pieces = config.batch_size // (config.micro_batch_size or config.batch_size)

        def score(rows: PyTree) -> Array:
            return self._token_logps(params, self._laid_out(rows)).logp

        if pieces == 1:
            logps = score(inputs)
        else:
            split = jax.tree.map(lambda leaf: leaf.reshape(pieces, -1, *leaf.shape[1:]), inputs)
            logps = jax.lax.map(score, split).reshape(mask.shape)
        logps = jnp.where(mask > 0, logps, 0.0)
        gap = jnp.sum(jnp.abs(logps - sampled) * mask) / jnp.maximum(jnp.sum(mask), 1.0)
        weights = None
        if config.importance_cap is not None:
            ratio = jnp.exp(jnp.clip(logps - sampled, -20.0, 20.0))
            weights = jnp.minimum(ratio, config.importance_cap)
        return logps, gap, weights

    def _update_function(
        self, state: TrainState, batch: UpdateBatch, active: Bool[Array, ""]
    ) -> tuple[TrainState, dict[str, Array]]:
        """All passes of a step."""
        config, sfpo = self.config, self._sfpo
        one_pass = make_pass(self._loss, self._tx, mini_batches=config.mini_batches, micro_batches=config.micro_batches)
        params, opt_state, metrics = slow_fast(
            one_pass,
            state.params,
            state.opt_state,
            batch,
            fast_passes=jnp.where(active, sfpo.inner_steps, config.num_iterations - 1),
            alpha=sfpo.alpha,
            active=active,
            state_policy=sfpo.state_policy,
        )
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    def _loss(self, params: PyTree, batch: UpdateBatch) -> Any:
        config = self.config
        batch = self._laid_out(batch)
        logp, entropy = self._token_logps(params, batch.inputs)
        return policy_terms(
            logp,
            batch.old_logps,
            batch.advantages,
            batch.mask,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            dual_clip=config.dual_clip,
            aggregation=config.aggregation,
            max_length=config.max_completion_length,
            ref_logp=batch.ref_logps,
            beta=config.beta,
            kl=config.kl,
            entropy=entropy,
            entropy_coef=config.entropy_coef,
            weights=batch.weights,
        )

    def _slow_fast_active(self) -> np.ndarray:
        return np.asarray(self.config.sfpo is not None and bool(self._stop.active(self._entropies)))

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

    def _identity(self) -> dict[str, Any]:
        plain = core.to_dict(self.config)
        return json.loads(json.dumps({name: value for name, value in plain.items() if name not in _FREE}))

    def _save(self, step: int) -> None:
        state = {"train": self._state, "entropies": self._entropies}
        assert self._checkpointer is not None
        self._checkpointer.save(step, state, {"draw": self._draw, "config": self._identity()})

    def _resume(self) -> None:
        if self._checkpointer is None or self._checkpointer.latest() is None:
            return
        saved, mine = self._checkpointer.extra()["config"], self._identity()
        if not self._allow_changes:
            _check_same(saved, mine, str(self.folder))
        state = {"train": self._state, "entropies": self._entropies}
        state, extra = self._checkpointer.restore(state)
        self._state, self._entropies, self._draw = state["train"], state["entropies"], extra["draw"]


def _check_same(saved: Mapping[str, Any], mine: Mapping[str, Any], folder: str, prefix: str = "") -> None:
    for name in (*mine, *(name for name in saved if name not in mine)):
        theirs, ours = saved.get(name), mine.get(name)
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            _check_same(theirs, ours, folder, f"{prefix}{name}.")
        elif theirs != ours:
            raise ValueError(
                f"{prefix}{name}: {folder} was trained with {theirs!r}, got {ours!r}; "
                "use another folder, or allow_changes=True"
            )


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


def _overlong(rollout: Rollout, config: GRPOConfig) -> np.ndarray | float:
    """The soft penalty of DAPO (arXiv 2503.14476, equation 13) for completions near the maximum length."""
    if not config.overlong_buffer:
        return 0.0
    lengths = rollout.mask.sum(axis=1)
    free = config.max_completion_length - config.overlong_buffer
    return -np.clip((lengths - free) / config.overlong_buffer, 0.0, 1.0).astype(np.float32)


def rollout_numbers(rollout: Rollout, rewards: np.ndarray, mask: np.ndarray, group_size: int) -> dict[str, float]:
    """What the log says of a batch: enough to answer why a loss is zero, or a run stands still."""
    groups = rewards.reshape(-1, group_size)
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(groups.std(axis=1).mean()),
        "zero_variance_fraction": float((groups.max(axis=1) == groups.min(axis=1)).mean()),
        "completion_length": float(rollout.mask.sum(axis=1).mean()),
        "truncated_fraction": float(rollout.truncated.mean()),
        "all_masked": float(not mask.any()),
    }
