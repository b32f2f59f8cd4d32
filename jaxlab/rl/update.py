"""The update of a step: all its passes as one pure function, for the trainer and for compiling ahead of time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from jaxlab.rl.batch import UpdateBatch
from jaxlab.rl.config import GRPOConfig, SFPOConfig
from jaxlab.rl.losses import policy_terms
from jaxlab.rl.rollout import LogpFunction
from jaxlab.rl.slow_fast import make_pass, slow_fast
from jaxlab.training import TrainState

Update = Callable[[TrainState, UpdateBatch, Any], tuple[TrainState, dict[str, Array]]]


def update_function(
    config: GRPOConfig,
    tx: optax.GradientTransformation,
    token_logps: LogpFunction,
    laid_out: Callable[[PyTree], PyTree] = lambda rows: rows,
) -> Update:
    """The function (state, batch, active) -> (state, metrics).

    One program makes slow-fast steps and, where `active` is False, plain ones. Without `config.sfpo` it has no anchor.

    Args:
        config: of the run.
        tx: the optimiser.
        token_logps: log-probabilities of a rollout's inputs.
        laid_out: gives a part of a batch its place on a mesh.
    """

    def loss(params: PyTree, batch: UpdateBatch) -> Any:
        batch = laid_out(batch)
        logp, entropy = token_logps(params, batch.inputs)
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

    one_pass = make_pass(loss, tx, mini_batches=config.mini_batches, micro_batches=config.micro_batches)
    sfpo, plain = config.sfpo or SFPOConfig(), config.num_iterations - 1

    def update(state: TrainState, batch: UpdateBatch, active: Bool[Any, ""]) -> tuple[TrainState, dict[str, Array]]:
        params, opt_state, metrics = slow_fast(
            one_pass,
            state.params,
            state.opt_state,
            batch,
            fast_passes=plain if config.sfpo is None else jnp.where(active, sfpo.inner_steps, plain),
            alpha=sfpo.alpha,
            active=False if config.sfpo is None else active,
            state_policy=sfpo.state_policy,
        )
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics

    return update
