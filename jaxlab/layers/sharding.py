"""Logical axis names: of parameters, and of activations under whatever mesh is in force."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AxisType
from jaxtyping import Array

from jaxlab.core.mesh import DEFAULT_RULES, shardings


def named(init: Callable[..., Any], names: tuple[str | None, ...]) -> Callable[..., Any]:
    """An initialiser whose result carries logical axis names; modules see the plain array."""
    return nn.with_partitioning(init, names)


def constrain(x: Array, names: tuple[str | None, ...]) -> Array:
    """Lays `x` out over the mesh of `jax.set_mesh` by `DEFAULT_RULES`; without a mesh, or inside `shard_map`, x itself.

    Without it XLA may prefer to split an activation's features as its weights are (FSDP) and gather the batch.

    Args:
        x: an activation.
        names: logical name of each axis ("batch", "sequence", ...), or None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    box = nn.Partitioned(jax.ShapeDtypeStruct(x.shape, x.dtype), names)
    return jax.lax.with_sharding_constraint(x, shardings(box, mesh, DEFAULT_RULES))
