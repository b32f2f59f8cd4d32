"""Named device meshes, and the rules that turn logical parameter axes into shardings over them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "sequence", "expert", "node", "pair", "view")
"""Every mesh axis there is: `expert` stays inside a node and `node` goes across; `view` separates independent
evaluations of one input (cameras of a scene, guidance branches of an image)."""

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]

DEFAULT_RULES = (
    ("batch", ("data", "fsdp", "node", "expert")),
    ("sequence", "sequence"),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("expert", ("node", "expert")),
    ("expert_tensor", ("node", "expert", "tensor")),
    ("layers", None),
)
"""Where each logical axis goes: pairs of (logical name, mesh axis, tuple of mesh axes, or None for replicated)."""


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | np.ndarray | None = None) -> Mesh:
    """A mesh of `devices` (default: all of them) with named axes, all of type `Auto`.

    Args:
      shape: axis name -> size in the order the devices are laid out, the last axis over neighbours; one size may be
        -1, the devices that remain. `{}` is `{"data": -1}`.
      devices: the devices to use, real or of an ahead-of-time topology.

    Raises:
      ValueError: an axis outside `MESH_AXES`, an impossible size, or a product that is not the device count.
      TypeError: a size that is no integer.
    """
    devices = list(np.asarray(jax.devices() if devices is None else devices, dtype=object).flat)
    sizes = dict(shape) or {"data": -1}
    for axis, size in sizes.items():
        if axis not in MESH_AXES:
            raise ValueError(f"mesh axis {axis!r} is unknown; known axes: {', '.join(MESH_AXES)}")
        if isinstance(size, bool) or not isinstance(size, int | np.integer):
            raise TypeError(f"mesh axis {axis!r}: expected an integer size, got {size!r}")
        if size < 1 and size != -1:
            raise ValueError(f"mesh axis {axis!r}: expected a size of at least 1, or -1 for the rest, got {size}")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"at most one mesh axis may be -1, got {', '.join(open_axes)}")
    known = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        sizes[open_axes[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {dict(shape)} needs a multiple of {known} devices, got {len(devices)}"
            if open_axes
            else f"mesh {dict(shape)} has {known} places, expected the device count {len(devices)}"
        )
    axis_types = (AxisType.Auto,) * len(sizes)
    if devices[0].platform == "tpu" and len({getattr(device, "slice_index", 0) for device in devices}) == 1:
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types, devices=devices)
    # Elsewhere devices come node by node, which is the layout we want; JAX's make_mesh refuses several nodes.
    return Mesh(np.array(devices, dtype=object).reshape(tuple(sizes.values())), tuple(sizes), axis_types=axis_types)


def shardings(abstract: Any, mesh: Mesh | AbstractMesh, rules: Rules = DEFAULT_RULES) -> Any:
    """The sharding of every leaf of a tree whose leaves carry logical axis names.

    Axes that the mesh lacks, or that an earlier dimension of the leaf already took, are dropped; a dimension that the
    remaining axes do not divide is replicated. A name without a rule that is itself a mesh axis stands for that axis;
    any other name, and a leaf without names, is replicated.

    Args:
      abstract: a pytree of arrays or `ShapeDtypeStruct`s, boxed by `nn.with_partitioning` where they have names, as
        `jax.eval_shape` of a module's `init` gives it.
      mesh: the mesh, over real devices, those of a topology, or none (`AbstractMesh`).
      rules: pairs of (logical name, where it goes); of several for one name the first that shards wins.

    Returns:
      The tree without its boxes, with a `NamedSharding` for each leaf.
    """

    def of_leaf(leaf: Any) -> NamedSharding:
        names = getattr(leaf, "names", None) if _is_box(leaf) else None
        (value,) = jax.tree.leaves(leaf)  # a box's own `unbox` would constrain it to the mesh in force
        spec = _spec(names or (), tuple(np.shape(value)), mesh, rules)
        return NamedSharding(mesh, spec)

    return jax.tree.map(of_leaf, abstract, is_leaf=_is_box)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def _spec(
    names: Sequence[str | None], shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Rules
) -> PartitionSpec:
    if len(names) > len(shape):
        raise ValueError(f"logical axes {tuple(names)} name {len(names)} dimensions, the leaf has shape {shape}")
    taken: set[str] = set()
    entries = []
    for name, size in zip(names, shape):
        axes = _axes(name, size, mesh, rules, taken)
        taken.update(axes)
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _axes(name: str | None, size: int, mesh: Mesh | AbstractMesh, rules: Rules, taken: set[str]) -> tuple[str, ...]:
    candidates = [target for logical, target in rules if logical == name]
    if not candidates and name in MESH_AXES:
        candidates = [name]
    for target in candidates:
        axes = (target,) if isinstance(target, str) else tuple(target or ())
        axes = tuple(axis for axis in axes if axis in mesh.shape and axis not in taken)
        if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0:
            return axes
    return ()
