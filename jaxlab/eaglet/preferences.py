"""A planner that learns from its best and worst plans by DPO (arXiv 2305.18290), as MPO has it (arXiv 2503.02682)."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, PyTree

from jaxlab.eaglet.envs.base import Task
from jaxlab.eaglet.planner import Planner, TrainResult
from jaxlab.eaglet.plans import Plan
from jaxlab.rl.logps import TextInputs, text_logps
from jaxlab.training import Loss, LossOutput, OptimizerConfig, RowBatches, SFTConfig, TrainingRun
from jaxlab.training.supervised import Row, check_rows, padded_length


@dataclasses.dataclass(frozen=True)
class DPOConfig(SFTConfig):
    """Preference optimisation: `SFTConfig`, a row being a pair of plans. Every default is ours but `beta`, DPO's.

    Attributes:
      beta: of the loss; the greater, the closer the planner stays to where it started.
      steps: updates.
      optimizer: of `SFTConfig`; 5e-7 is usual for models of billions of parameters.
    """

    beta: int | float = 0.1
    steps: int = 100
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=5e-5))

    def __post_init__(self):
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta: expected a value > 0, got {self.beta}")


def dpo_loss(policy: Float[Array, "*n 2"], reference: Float[Array, "*n 2"], *, beta: int | float) -> Float[Array, "*n"]:
    """The loss of each pair, -log sigmoid(beta * (margin - reference's margin)), equation 7 of DPO.

    Args:
      policy: log-probabilities of the better and the worse answer under the policy.
      reference: and under the reference.
      beta: above 0.
    """
    margins = policy - reference
    return -jax.nn.log_sigmoid(beta * (margins[..., 0] - margins[..., 1]))


@struct.dataclass
class PreferenceBatch:
    """Pairs of completions, the better one first.

    Attributes:
      tokens: `[B,2,S]` int32, prompt and completion, and after them any ids.
      starts: `[B]` int32, tokens of the prompt.
      counts: `[B,2,T]` float32, 1 at tokens of the completion.
      reference: `[B,2]` float32, log-probabilities of the completions under the reference.
    """

    tokens: Any
    starts: Any
    counts: Any
    reference: Any


class PreferenceBatches(RowBatches):
    """Batches of pairs, padded to the longest; the reference, which stays, is asked once."""

    def __init__(self, model: Any, params: Any, pairs: Sequence[tuple[Row, Row]], *, batch_size: int, seed: int):
        """Lays the pairs out and has `params` judge them."""
        size = padded_length([row for pair in pairs for row in pair])
        longest = max(len(completion) for pair in pairs for _, completion in pair)
        tokens = np.zeros((len(pairs), 2, size), np.int32)
        counts = np.zeros((len(pairs), 2, longest), np.float32)
        for index, pair in enumerate(pairs):
            for which, (prompt, completion) in enumerate(pair):
                tokens[index, which, : len(prompt) + len(completion)] = [*prompt, *completion]
                counts[index, which, : len(completion)] = 1
        starts = np.array([len(prompt) for (prompt, _), _ in pairs], np.int32)
        super().__init__((tokens, starts, counts), batch_size=batch_size, seed=seed)
        judge, judged = jax.jit(functools.partial(plan_logps, model)), []
        for first in range(0, len(pairs), batch_size):
            rows = np.arange(first, first + batch_size) % len(pairs)  # the last piece has the first one's shape
            judged.append(np.asarray(judge(params, tokens[rows], starts[rows], counts[rows])))
        self._reference = np.concatenate(judged)[: len(pairs)]

    def _batch(self, rows: np.ndarray) -> PreferenceBatch:
        return PreferenceBatch(*(array[rows] for array in (*self._arrays, self._reference)))


def plan_logps(model: Any, params: PyTree, tokens: Array, starts: Array, counts: Array) -> Float[Array, "B 2"]:
    """Log-probabilities of whole completions; arrays as in `PreferenceBatch`."""
    pairs, _, length = counts.shape
    inputs = TextInputs(jnp.reshape(tokens, (2 * pairs, -1)), jnp.repeat(starts, 2))
    logps = text_logps(model, params, inputs, length=length).logp
    return jnp.sum(logps.reshape(counts.shape) * counts, axis=-1)


def preference_loss(model: Any, beta: int | float) -> Loss:
    """The sum of `dpo_loss` over a `PreferenceBatch`.

    Metrics: `margin`, by which beta times the log-ratio of the better plan is above the worse one's; `preferred`, where
    it is above 0; `better_logp` and `worse_logp`, log-probabilities of whole plans.
    """

    def loss(params: PyTree, batch: PreferenceBatch, rng: Array | None) -> LossOutput:
        policy = plan_logps(model, params, batch.tokens, batch.starts, batch.counts)
        ratios = beta * (policy - batch.reference)
        margins = ratios[:, 0] - ratios[:, 1]
        metrics = {
            "margin": jnp.sum(margins),
            "preferred": jnp.sum(margins > 0, dtype=jnp.float32),
            "better_logp": jnp.sum(policy[:, 0]),
            "worse_logp": jnp.sum(policy[:, 1]),
        }
        total = jnp.sum(dpo_loss(policy, batch.reference, beta=beta))
        return LossOutput(total, jnp.float32(len(margins)), metrics)

    return loss


def train_dpo(
    planner: Planner,
    preferences: Sequence[tuple[Task, Plan, Plan]],
    config: DPOConfig | None = None,
    *,
    folder: str | os.PathLike | None = None,
) -> TrainResult:
    """Preference optimisation: the better plan of a task becomes likelier beside the worse one.

    A worse plan may be of broken format, and is cut at `max_tokens`, where the planner itself would have stopped.

    Args:
      planner: where it starts, and the reference.
      preferences: task, better plan, worse plan, such as `sample_plans(...).preferences()` gives.
      config: of the run; None: the defaults.
      folder: for metrics and checkpoints; a run found there goes on.

    Raises:
      ValueError: no preferences, two equal plans, a better plan of broken format or of more than `max_tokens`, or one
        that does not fit into the model's context.
    """
    config, pairs = config or DPOConfig(), []
    for index, (task, better, worse) in enumerate(preferences):
        if better.text == worse.text:
            raise ValueError(f"preferences[{index}]: expected two different plans, got {better.text!r} of {task.id!r}")
        chosen = planner.completion_ids(task, better, f"preferences[{index}]")
        prompt, other = planner.prompt_ids(task.instruction), planner.written_ids(worse)[: planner.max_tokens]
        pairs.append(((prompt, chosen), (prompt, other)))
    check_rows("preferences", planner.model, [row for pair in pairs for row in pair])
    sizes = {"batch_size": config.batch_size, "seed": config.seed}
    batches = PreferenceBatches(planner.model, planner.params, pairs, **sizes)
    run = TrainingRun(planner.params, preference_loss(planner.model, config.beta), batches, config, folder=folder)
    params = run.until(config.steps)
    return TrainResult(dataclasses.replace(planner, params=params), run.history)
