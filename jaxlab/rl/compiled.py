"""A step of policy optimisation compiled for machines that are not here: what each phase would hold."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.core import plan
from jaxlab.inference import SamplingParams
from jaxlab.inference.params import SamplingArrays
from jaxlab.inference.steps import decode_step
from jaxlab.models.decoder import Decoder, DecoderConfig, KVCache, abstract_params
from jaxlab.rl.batch import UpdateBatch
from jaxlab.rl.config import GRPOConfig, check_choice
from jaxlab.rl.logps import TextInputs, text_logps
from jaxlab.rl.loop import default_optimizer
from jaxlab.rl.update import update_function
from jaxlab.training import TrainState
from jaxlab.training.sharding import batch_sharding, state_shardings

PHASES = ("update", "rollout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A step to compile.

    Attributes:
      model: the policy.
      rl: batch, lengths, passes, and with `sfpo` the anchor; with `beta` > 0 a reference policy lies there, too.
      phase: "update": all passes over a batch of rollouts; "rollout": a step of decoding the whole batch at once.
      mesh: axes over the devices; empty: `jaxlab plan --mesh` says, or all along `data`.
    """

    model: DecoderConfig
    rl: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)
    phase: Literal["update", "rollout"] = "update"
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_choice("phase", self.phase, PHASES)
        if (length := self.rl.max_prompt_length + self.rl.max_completion_length) > self.model.max_position_embeddings:
            raise ValueError(
                "rl.max_prompt_length, rl.max_completion_length: expected at most max_position_embeddings = "
                f"{self.model.max_position_embeddings} together, got {length}"
            )


def compile_phase(
    config: PlanConfig, target: plan.Target, *, options: Mapping[str, Any] | None = None, read_kernels: bool = True
) -> plan.Plan:
    """Compiles one phase of a step for a target; nothing runs.

    Parameters, moments, and the reference where there is one, lie on the mesh by their logical axis names, rows over
    its data axes. What the phase does not use stays where it is, and counts: the optimiser and the reference while
    rollouts are drawn. The cache is gone by the time of the update.

    Args:
      config: model, batch and phase.
      target: from `jaxlab.core.plan.target`.
      options: of XLA's compiler.
      read_kernels: whether the plan lists kernels.

    Raises:
      ValueError: rows that the mesh's data axes do not divide.
    """
    mesh, tx, model = target.mesh, default_optimizer(config.rl), Decoder(config.model)
    names = abstract_params(model)
    state = jax.eval_shape(
        lambda params, key: TrainState.create(params, tx, key), nn.meta.unbox(names), jax.eval_shape(jax.random.key, 0)
    )
    where = state_shardings(state, tx, mesh, names)
    state = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, where)
    reference = state.params if config.rl.beta > 0 else None
    settled = {"target": target, "options": options, "read_kernels": read_kernels}
    if config.phase == "rollout":
        return _rollout(config, model, state, reference, settled)
    return _update(config, model, tx, state, where, reference, settled)


def _update(config: PlanConfig, model: Any, tx: Any, state: Any, where: Any, reference: Any, settled: Any) -> plan.Plan:
    rl, mesh = config.rl, settled["target"].mesh
    rows, length = rl.batch_size, rl.max_completion_length
    like = functools.partial(_rows, mesh)
    per_token = like((rows, length), jnp.float32)
    batch = UpdateBatch(
        inputs=TextInputs(like((rows, rl.max_prompt_length + length), jnp.int32), like((rows,), jnp.int32)),
        mask=per_token,
        old_logps=per_token,
        advantages=like((rows,), jnp.float32),
        weights=None if rl.importance_cap is None else per_token,
        ref_logps=None if reference is None else per_token,
    )

    def laid_out(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, batch_sharding(mesh, leaf.shape)), tree)

    logps = functools.partial(text_logps, model, length=length, temperature=rl.temperature)
    update = update_function(rl, tx, logps, laid_out)

    def step(state: Any, batch: Any, active: Any, reference: Any) -> Any:
        return update(state, batch, active)

    jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    kinds = TrainState(step="optimizer", params="parameters", opt_state="optimizer", rng="optimizer")
    active = jax.ShapeDtypeStruct((), jnp.bool_)
    return plan.compile(
        jitted, state, batch, active, reference, labels=(kinds, "input", "input", "parameters"), **settled
    )


def _rollout(config: PlanConfig, model: Any, state: Any, reference: Any, settled: Any) -> plan.Plan:
    rl, mesh = config.rl, settled["target"].mesh
    rows = rl.batch_size
    like = functools.partial(_rows, mesh)
    length = rl.max_prompt_length + rl.max_completion_length
    place = batch_sharding(mesh, (rows,))
    cache = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(None, *place.spec))
        ),
        jax.eval_shape(lambda: KVCache.create(config.model, rows, length)),
    )
    sampling, form = jax.tree.flatten(SamplingArrays.stack([SamplingParams(temperature=rl.temperature)] * rows))
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    given = (like((rows,), jnp.int32), like((rows,), jnp.int32), like((rows,), key.dtype))
    sampling = [like(leaf.shape, leaf.dtype) for leaf in sampling]

    def step(params: Any, cache: Any, given: Any, sampling: Any, optimizer: Any, reference: Any) -> Any:
        return decode_step(model, params, cache, *given, jax.tree.unflatten(form, sampling))

    return plan.compile(
        step,
        state.params,
        cache,
        given,
        sampling,
        state.opt_state,
        reference,
        labels=("parameters", "cache", "input", "input", "optimizer", "parameters"),
        donate_argnums=1,
        **settled,
    )


def _rows(mesh: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, shape))
