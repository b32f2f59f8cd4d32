"""Where a training state and its batches lie on a mesh."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxlab import core
from jaxlab.models.decoder import MoEPolicy

BATCH_AXES = ("data", "fsdp", "node", "expert")
"""Mesh axes that share out the rows of a batch: the ranks of expert parallelism are data parallel in dense blocks."""


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Axis 0 over the mesh's data axes, everything else replicated.

    Raises:
        ValueError: Axis 0 is not divisible by their product.
    """
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    shards = 1
    for axis in axes:
        shards *= mesh.shape[axis]
    if not axes or not shape:
        return NamedSharding(mesh, PartitionSpec())
    if shape[0] % shards:
        raise ValueError(f"batch_size: expected a multiple of {shards} (mesh axes {', '.join(axes)}), got {shape[0]}")
    return NamedSharding(mesh, PartitionSpec(axes))


def expert_policy(policy: MoEPolicy, mesh: Mesh | None) -> MoEPolicy:
    """The policy as it runs on a mesh: where it names no expert axes they are `node` and `expert`, then its `tp_axis`.

    A policy that names its axes stays as it is, and so does `local`, under which tokens stay and weights are gathered.
    """
    if mesh is None or policy.expert_axes or policy.dispatch == "local":
        return policy
    return dataclasses.replace(
        policy, expert_axes=tuple(axis for axis in ("node", "expert", policy.tp_axis) if axis in mesh.shape)
    )


def place_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """A batch over the mesh's data axes; every process passes the same whole batch, or arrays already placed."""

    def place(leaf):
        sharding = batch_sharding(mesh, leaf.shape)
        if isinstance(leaf, jax.Array) and (leaf.sharding == sharding or not leaf.is_fully_addressable):
            return leaf
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(place, batch)


def params_shardings(params: PyTree, mesh: Mesh, names: PyTree | None = None) -> PyTree:
    """Shardings of parameters on a mesh.

    Args:
        params: Arrays or `ShapeDtypeStruct`s. If they already lie on the mesh they stay where they are.
        mesh: The mesh.
        names: The same tree with the logical axis names of `nn.with_partitioning` (`abstract_params`);
            without names, parameters are replicated.
    """
    placed = [
        isinstance(s := getattr(leaf, "sharding", None), NamedSharding) and s.mesh == mesh
        for leaf in jax.tree.leaves(params)
    ]
    if placed and all(placed):
        return jax.tree.map(lambda leaf: leaf.sharding, params)
    if names is None:
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params)
    return core.shardings(names, mesh)


def moment_sharding(shape: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    """ZeRO-1 (arXiv 1910.02054): a parameter's sharding, further split over the data axes it does not use.

    The axes go to the largest dimension that they divide; where none is divided by all of them, by as many as will.
    """
    mesh, spec = sharding.mesh, (*sharding.spec, *(None,) * len(shape))[: len(shape)]
    taken = [() if axes is None else (axes,) if isinstance(axes, str) else tuple(axes) for axes in spec]
    local = [size // math.prod(mesh.shape[axis] for axis in axes) for size, axes in zip(shape, taken)]
    unused = [axis for axis in BATCH_AXES if mesh.shape.get(axis, 1) > 1 and axis not in itertools.chain(*taken)]
    subsets = [axes for count in range(len(unused), 0, -1) for axes in itertools.combinations(unused, count)]
    for axes in sorted(subsets, key=lambda axes: -math.prod(mesh.shape[axis] for axis in axes)):
        shards = math.prod(mesh.shape[axis] for axis in axes)
        divided = [dimension for dimension, size in enumerate(local) if size and size % shards == 0]
        if divided:
            largest = max(divided, key=lambda dimension: local[dimension])
            taken[largest] = (*taken[largest], *axes)
            entries = [axes[0] if len(axes) == 1 else axes or None for axes in taken[: largest + 1]]
            entries += sharding.spec[largest + 1 :]
            return NamedSharding(mesh, PartitionSpec(*entries), memory_kind=sharding.memory_kind)
    return sharding


def gradient_shardings(params: PyTree, mesh: Mesh, names: PyTree | None = None) -> PyTree:
    """Where the gradients of a step with a sharded optimiser lie: with the moments, each device the part it updates."""
    return jax.tree.map(
        lambda leaf, place: moment_sharding(leaf.shape, place), params, params_shardings(params, mesh, names)
    )


def state_shardings(
    state: Any,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    names: PyTree | None = None,
    *,
    shard_optimizer: bool = False,
) -> Any:
    """Shardings of a `TrainState`: optimiser moments lie as their parameters, counters and keys are replicated.

    With `shard_optimizer` the moments, and only they, are split over the data axes too (`moment_sharding`).
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    params = params_shardings(state.params, mesh, names)
    opt_state = optax.tree.map_params(
        tx.init,
        lambda leaf, sharding: moment_sharding(leaf.shape, sharding) if shard_optimizer else sharding,
        state.opt_state,
        params,
        transform_non_params=lambda _: replicated,
    )
    return state.replace(step=replicated, rng=replicated, params=params, opt_state=opt_state)


def place_state(state: Any, shardings: Any) -> Any:
    """A state on its shardings; leaves that lie there already are not copied, and no process sends to another.

    Arrays that a process has for itself must be the same in every process.
    """

    def place(leaf, sharding):
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if jax.process_count() == 1 or not getattr(leaf, "is_fully_addressable", True):
            return jax.device_put(leaf, sharding)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, state, shardings)
