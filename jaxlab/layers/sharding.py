"""Logical axis names: of parameters, and of activations under whatever mesh is in force."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

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


# Where there is a sequence axis, attention takes whole sequences of fewer heads (Ulysses, arXiv:2309.14509).
_ATTENTION_RULES = (("heads", ("tensor", "sequence")), *DEFAULT_RULES)


def split_attention(
    attend: Callable[..., Array],
    q: Float[Array, "b t h dim"],
    k: Float[Array, "b s hkv dim"],
    v: Float[Array, "b s hkv dim"],
    *by_row: Array | None,
) -> Float[Array, "b t h dim"]:
    """`attend(q, k, v, *by_row)`; on a GPU each device of the mesh in force takes its own rows and heads.

    XLA cannot divide a kernel there, and would gather the batch on every device. Elsewhere `attend` is XLA's own to
    divide.

    Args:
        attend: attention of grouped heads; what it gives for a row and a head needs that row and head only.
        q: queries.
        k: keys.
        v: values.
        *by_row: arrays with a leading batch axis, or None.
    """
    own = functools.partial(own_rows_and_heads, attend)
    return jax.lax.platform_dependent(q, k, v, *by_row, default=attend, cuda=own, rocm=own)


def own_rows_and_heads(attend: Callable[..., Array], q: Array, k: Array, v: Array, *by_row: Array | None) -> Array:
    """`split_attention` on every platform: `attend` in a `shard_map` over the mesh of `jax.set_mesh`.

    Key and value heads too few for the devices are repeated. Without a mesh, or inside `shard_map`, a plain call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return attend(q, k, v, *by_row)
    box = nn.Partitioned(jax.ShapeDtypeStruct(q.shape, q.dtype), ("batch", None, "heads"))
    spec = shardings(box, mesh, _ATTENTION_RULES).spec
    if not any(spec):
        return attend(q, k, v, *by_row)
    heads = spec[2] if len(spec) > 2 else ()
    shards = math.prod(mesh.shape[axis] for axis in ((heads,) if isinstance(heads, str) else heads))
    repeats = math.lcm(k.shape[2], shards) // k.shape[2]
    if repeats > 1:
        k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    row_specs = (PartitionSpec(*spec[:1]),) * len(by_row)
    return jax.shard_map(attend, in_specs=(spec, spec, spec, *row_specs), out_specs=spec)(q, k, v, *by_row)
