"""What tests of plans share: abstract arrays on meshes, and traffic as a table."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

MIB = 2**20


def shaped(mesh, shape, *spec, dtype=jnp.float32, memory_kind=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec), memory_kind=memory_kind))


def moved(made):
    return {(item.op, item.axes): (item.bytes, item.count) for item in made.collectives}
