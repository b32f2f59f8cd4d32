"""The pair representation over many devices: every operation on pairs, with the rows i over a mesh axis.

MegaFold (arXiv:2506.20686, version 2) shards the pair representation; how, its abstract does not say. Ours: rows of z
lie over the axis and stay there, each device computes its rows of every result, and what it needs of the others'
travels in collectives that `pair_shards` writes out, none of which makes `[N, N, C]` whole on a device.

    import jax.numpy as jnp
    from jaxlab.core import make_mesh
    from jaxlab.megafold.sharding import pair_sharded

    transition = pair_sharded("transition", make_mesh({"pair": -1}))  # the arguments of pallas_kernels.transition
    z = jnp.ones((1, 16, 16, 4))
    y = transition(z, jnp.ones(4), jnp.zeros(4), jnp.ones((4, 16)), jnp.ones((8, 4)))

The modules need not be told: under `jax.set_mesh` of a mesh with the axis `pair` they lie over it (`spread`).
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array

from jaxlab.core.mesh import DEFAULT_RULES, shardings
from jaxlab.megafold import ops, pair_shards
from pallas_kernels.dispatch import vary_alike
from pallas_kernels.layernorm_linear import layernorm_linear
from pallas_kernels.transition import transition
from pallas_kernels.triangle_multiplication import triangle_multiplication

AXIS = "pair"

Names = tuple[str | None, ...]
"""Logical names of the first axes of an array; of several called AXIS, the first that the devices divide."""

ROWS: Names = ("batch", AXIS)  # [B, N, ...]
COLUMNS: Names = ("batch", None, AXIS)  # [B, S, N, ...]
SAMPLES: Names = ("batch", AXIS, AXIS)  # [B, T, N, ...]
WHOLE: Names = ("batch",)

_STATIC = ("node", "direction", "eps", "row_chunk", "implementation")


@dataclasses.dataclass(frozen=True)
class _Op:
    """An operation on one device, its part on one of several, and where its arrays lie; weights are whole everywhere.

    Attributes:
      whole: the operation.
      arrays: names of what lies over devices.
      part: None where rows have nothing to do with each other; then all arrays lie as the first does.
      result: None where it lies as the first array does.
    """

    whole: Callable[..., Array]
    arrays: Mapping[str, Names]
    part: Callable[..., Array] | None = None
    result: Names | None = None


_PAIRS = {"z": ROWS, "mask": ROWS}
_OPS: Mapping[str, _Op] = MappingProxyType(
    {
        "triangle_attention": _Op(ops.triangle_attention, _PAIRS, pair_shards.triangle_attention),
        "triangle_multiplication": _Op(triangle_multiplication, _PAIRS, pair_shards.triangle_multiplication),
        "outer_product_mean": _Op(
            ops.outer_product_mean, {"m": COLUMNS, "mask": COLUMNS}, pair_shards.outer_product_mean, ROWS
        ),
        "pair_weighted_averaging": _Op(
            ops.pair_weighted_averaging,
            {"m": COLUMNS, "z": ROWS, "mask": WHOLE},
            pair_shards.pair_weighted_averaging,
        ),
        "attention_pair_bias": _Op(
            ops.attention_pair_bias, {"s": SAMPLES, "z": ROWS, "mask": WHOLE}, pair_shards.attention_pair_bias
        ),
        "adaptive_layer_norm": _Op(ops.adaptive_layer_norm, {"x": SAMPLES, "s": SAMPLES}),
        "transition": _Op(transition, {"x": SAMPLES}),
        "layernorm_linear": _Op(layernorm_linear, {"x": SAMPLES}),
    }
)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Which operation, over which mesh and which of its axes, and how its first array lies."""

    name: str
    mesh: Mesh | AbstractMesh
    axis: str | None
    lead: Names
    strict: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        bound = inspect.signature(_OPS[self.name].whole).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        static = {name: value for name, value in given.items() if name in _STATIC or value is None}
        if isinstance(static.get("implementation"), list):
            static["implementation"] = tuple(static["implementation"])
        arrays = {name: value for name, value in given.items() if name not in static}
        return _opened(self, tuple(static.items()), arrays)

    @property
    def devices(self) -> int:
        return 1 if self.axis is None else self.mesh.shape[self.axis]

    def spec(self, name: str, x: Array, names: Names) -> PartitionSpec:
        """Where `x` lies.

        Raises:
          ValueError: the devices do not divide an axis that must lie over them.
        """
        # The last axis of three is that of channels, or of keys.
        names = names[: max(2, x.ndim - 1)] if names == SAMPLES else names
        batch = tuple(axis for axis in _BATCH_AXES if axis != self.axis)
        box = nn.Partitioned(jax.ShapeDtypeStruct(x.shape, x.dtype), names)
        spec = shardings(box, self.mesh, (("batch", batch), (AXIS, self.axis))).spec
        if self.strict and self.devices > 1 and AXIS in names and self.axis not in spec:
            at = names.index(AXIS)
            raise ValueError(
                f"{name}: expected axis {at} to be a multiple of {self.devices}, the devices along the mesh axis "
                f"{self.axis!r}, got {x.shape[at]} (shape {x.shape}); pad it"
            )
        return spec


_BATCH_AXES: Any = dict(DEFAULT_RULES)["batch"]


def pair_sharded(name: str, mesh: Mesh | AbstractMesh, axis: str = AXIS) -> Callable[..., Array]:
    """An operation with its pairs' rows over a mesh axis.

    Arrays are whole to the caller, and lie over the axis by rows: z and masks of pairs on their first N, alignments
    `[B, S, N, ...]` and their masks on N, tokens `[B, N, C]` on N, samples `[B, T, N, C]` on T where the devices divide
    it and else on N. Results lie as their first argument, those of `outer_product_mean` by rows. What lies elsewhere is
    moved. The batch lies over the axes of the mesh among data, fsdp, node and expert whose devices divide it; weights
    are whole on every device. Values are those of the operation on one device, up to the order of sums.

    Args:
      name: "triangle_attention", "triangle_multiplication", "outer_product_mean", "pair_weighted_averaging",
        "attention_pair_bias", "adaptive_layer_norm", "transition" or "layernorm_linear". The implementation asked of
        triangle_multiplication is that of its layernorm_linear: its own kernel wants all pairs.
      mesh: real devices, those of a topology, or none.
      axis: of the mesh.

    Returns:
      A function of the operation's arguments, to be called inside or outside `jax.jit`; not inside `shard_map`.

    Raises:
      ValueError: unknown name; no such axis. When called: N (T and N, of samples) is no multiple of the devices along
        the axis, and whatever the operation itself refuses.
      TypeError: when called, what the operation refuses.
    """
    if name not in _OPS:
        raise ValueError(f"name: expected one of {', '.join(_OPS)}, got {name!r}")
    if axis not in mesh.shape:
        raise ValueError(f"axis: expected one of the mesh, {tuple(mesh.shape)}, got {axis!r}")
    if isinstance(mesh, Mesh) and jax.sharding.get_abstract_mesh().empty:
        # JAX's own make_mesh makes explicit axes, over which a shard_map takes no array that is not sharded yet.
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return _Place(name, mesh, axis, next(iter(_OPS[name].arrays.values())), strict=True)


def spread(name: str, lead: Names | None = None) -> Callable[..., Array]:
    """The operation as a module calls it: over the mesh of `jax.set_mesh`, if that has devices to share it.

    With an axis `pair` that is `pair_sharded`, except that operations by rows (the last three) also take what the
    devices do not divide; without one, each device has its share of the batch. Without a mesh, or inside `shard_map`,
    it is the operation itself.

    Args:
      name: of `pair_sharded`'s.
      lead: how the first array lies, where it lies otherwise than there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    op = _OPS[name]
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return op.whole
    axis = AXIS if AXIS in mesh.shape else None
    return _Place(name, mesh, axis, lead or next(iter(op.arrays.values())), strict=op.part is not None)


# Jitted, so that a call outside jit is one program, too: a shard_map by itself would run operation by operation.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _opened(place: _Place, static: tuple[tuple[str, Any], ...], arrays: dict[str, Any]) -> Array:
    op, options = _OPS[place.name], dict(static)
    jax.eval_shape(functools.partial(op.whole, **options), **arrays)  # it refuses what it refuses on one device
    (first, *others) = (name for name in op.arrays if name in arrays)
    lead = place.spec(first, arrays[first], place.lead)
    specs: dict[str, Any] = dict.fromkeys(arrays, PartitionSpec()) | {first: lead}
    for name in others:
        x = arrays[name]
        if op.part is None:
            specs[name] = PartitionSpec(*(None if size == 1 else entry for entry, size in zip(lead, x.shape)))
        else:
            specs[name] = place.spec(name, x, op.arrays[name])

    def part(arrays: dict[str, Any]) -> Array:
        # Weights vary from here on, in float32, so that their gradients are summed over devices in float32.
        leaves, tree = jax.tree.flatten(arrays)
        arrays = tree.unflatten(vary_alike(*leaves))
        if op.part is None or place.devices == 1:
            return op.whole(**arrays, **options)
        return op.part(**arrays, **options, axis=place.axis)

    result = lead if op.result is None else PartitionSpec(*lead[:1], place.axis)
    return jax.shard_map(part, mesh=place.mesh, in_specs=(specs,), out_specs=result)(arrays)
