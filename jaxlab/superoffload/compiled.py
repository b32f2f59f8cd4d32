"""Whole training steps compiled for machines that are not here: what each place would hold."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.core import plan
from jaxlab.core.mesh import DEFAULT_RULES, shardings
from jaxlab.models.cost import parameter_count
from jaxlab.models.decoder import Decoder, DecoderConfig, abstract_params
from jaxlab.superoffload.memory import UNDO_BYTES
from jaxlab.superoffload.placement import offload_tree
from jaxlab.superoffload.stack import OffloadedScan
from jaxlab.superoffload.ulysses import UlyssesAttention
from jaxlab.training import TokenBatch, lm_loss
from jaxlab.training.adamw import OptimizerConfig, optimizer

METHODS = ("superoffload", "zero_offload", "ulysses")
HELD_BYTES = {"superoffload": 12 + UNDO_BYTES["residual"], "zero_offload": 12, "ulysses": 0}
"""Host bytes a parameter that no program shows: float32 master, m and v, and SuperOffload's residual undo log."""


def compile_step(
    config: DecoderConfig,
    target: plan.Target,
    method: str = "superoffload",
    *,
    batch: int,
    length: int,
    offload_inputs: bool = False,
    options: Mapping[str, Any] | None = None,
) -> plan.Plan:
    """Compiles forward and backward pass of a decoder, and AdamW where it is on the GPU; nothing runs.

    "superoffload": the layers' weights lie on the host and flow, their gradients go back there one by one.
    "zero_offload": 16-bit weights and all 16-bit gradients on the GPU. "ulysses": float32 parameters, moments and AdamW
    on the GPUs. Over several devices parameters are partitioned (ZeRO-3), and tokens with a mesh's axis `sequence`
    (Ulysses), otherwise its first axis. `bytes["host"]` has what the program itself does not show, too: float32
    parameters and moments, gradients that come back, inputs of blocks, and the undo log (3 bytes a parameter).

    Args:
      config: the decoder.
      target: from `jaxlab.core.plan.target`.
      method: one of `METHODS`.
      batch: rows, over all devices.
      length: tokens of a row.
      offload_inputs: the blocks' inputs wait on the host; "superoffload" only.
      options: of XLA's compiler.

    Raises:
      ValueError: unknown method, or inputs offloaded by another one.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if offload_inputs and method != "superoffload":
        raise ValueError(f"offload_inputs: expected False for {method!r}, got True")
    mesh, on_gpu = target.mesh, method == "ulysses"
    along = "sequence" in mesh.axis_names
    axis = "sequence" if along else mesh.axis_names[0]
    model = Decoder(
        dataclasses.replace(config, param_dtype="float32" if on_gpu else config.dtype),
        attention=UlyssesAttention() if along and mesh.size > 1 else None,
        repeat=OffloadedScan(offload_inputs) if method == "superoffload" else None,
    )
    boxed = abstract_params(model)
    places = shardings(boxed, mesh, (("embed", axis), *DEFAULT_RULES))  # ZeRO-3 over the same devices
    params = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), nn.meta.unbox(boxed), places)
    part = NamedSharding(mesh, PartitionSpec(None, axis) if along else PartitionSpec(axis))
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=part)
    given = TokenBatch(ids, ids, ids, ids, jax.ShapeDtypeStruct(ids.shape, jnp.float32, sharding=part))
    loss = lm_loss(model)

    def gradients(params: Any, given: TokenBatch) -> Any:
        def mean(params: Any) -> Any:
            out = loss(params, given, None)
            return out.total / out.weight

        return jax.value_and_grad(mean)(params)

    if on_gpu:
        return _with_adamw(gradients, params, places, given, target, options)
    if method == "zero_offload":
        gradients_lie, weights = offload_tree(params), params
    else:
        gradients_lie = weights = {name: offload_tree(t) if name == "blocks_0" else t for name, t in params.items()}
    step = jax.jit(gradients, out_shardings=(None, jax.tree.map(lambda leaf: leaf.sharding, gradients_lie)))
    made = plan.compile(step, weights, given, target=target, labels=("parameters", "input"), options=options)
    host = sum(_on_host(tree) for tree in (weights, gradients_lie))
    if offload_inputs:
        host += jnp.dtype(config.dtype).itemsize * config.num_hidden_layers * config.hidden_size * ids.size // mesh.size
    host += HELD_BYTES[method] * parameter_count(config).total // mesh.size
    note = (
        f"host: weights, gradients and block inputs as placed, and {HELD_BYTES[method]} bytes a parameter of "
        "optimizer state and undo log, counted"
    )
    return dataclasses.replace(made, bytes={**made.bytes, "host": host}, notes=(*made.notes, note))


def _with_adamw(gradients: Any, params: Any, places: Any, given: Any, target: plan.Target, options: Any) -> plan.Plan:
    tx = optimizer(OptimizerConfig())
    like = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(params)}
    everywhere = NamedSharding(target.mesh, PartitionSpec())
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.get(leaf.shape, everywhere)),
        jax.eval_shape(tx.init, params),
    )

    def update(params: Any, state: Any, given: TokenBatch) -> Any:
        value, grads = gradients(params, given)
        grads = jax.lax.with_sharding_constraint(grads, places)
        updates, state = tx.update(grads, state, params)
        return value, jax.tree.map(jnp.add, params, updates), state

    labels = ("parameters", "optimizer", "input")
    return plan.compile(
        update, params, state, given, target=target, labels=labels, donate_argnums=(0, 1), options=options
    )


def _on_host(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if leaf.sharding.memory_kind == "pinned_host"
    )
