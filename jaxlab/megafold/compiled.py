"""The training step compiled for machines that are not here: what each place would hold."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.core import plan
from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.features import abstract_batch
from jaxlab.megafold.train import TrainSettings, TrainState, create_train_state, train_step


def compile_step(
    config: AF3Config,
    target: plan.Target,
    *,
    batch_size: int = 1,
    settings: TrainSettings | None = None,
    options: Mapping[str, Any] | None = None,
    read_kernels: bool = True,
) -> plan.Plan:
    """Compiles a whole training step, the state donated; nothing runs.

    A mesh's axis `data` has the structures of the batch. Weights are whole on every device, and so is everything else
    but for what the modules themselves lay over the mesh in force (an axis `pair`).

    Args:
      config: of the network; its sizes are the batch's.
      target: from `jaxlab.core.plan.target`.
      batch_size: structures, over all devices.
      settings: of the training.
      options: of XLA's compiler.
      read_kernels: also compile the kernels one by one, for their registers.

    Raises:
      ValueError: a batch that the axis `data` does not divide.
    """
    mesh = target.mesh
    across = mesh.shape.get("data", 1)
    if batch_size % across:
        raise ValueError(f"batch_size: expected a multiple of {across}, the mesh's axis data, got {batch_size}")
    place = NamedSharding(mesh, PartitionSpec("data" if across > 1 else None))
    batch = {
        name: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=place)
        for name, like in abstract_batch(config, batch_size).items()
    }
    key = jax.eval_shape(jax.random.key, 0)
    state = jax.eval_shape(lambda key, batch: create_train_state(config, key, batch, settings=settings), key, batch)
    kinds: TrainState = state.replace(
        step="optimizer", params="parameters", ema_params="optimizer", opt_state="optimizer"
    )
    labels = (kinds, "input", "input")
    settled = {"donate_argnums": 0, "options": options, "read_kernels": read_kernels}
    with jax.set_mesh(mesh) if "pair" in mesh.axis_names else contextlib.nullcontext():
        return plan.compile(train_step, state, batch, key, target=target, labels=labels, **settled)
