"""Edits of several images over a mesh: images over `data`, the guidance branches of each over `view`.

Every device evaluates its branches of its images; only predictions travel, `[h, w, C]` float32 of each branch and step,
and the maps of the first step. Weights are whole on every device. Four devices along `view` take the four branches of
a step at once, so the source's is not made beforehand as on one device.

    mesh = make_mesh({"data": 2, "view": 4})
    network = replicated(network, mesh)
    trajectory, features = invert_sharded(network, z0, edges, null, 0.4, num_steps=4, mode="exact", mesh=mesh)
    result = edit_sharded(network, trajectory, features, prompts, knobs, mesh=mesh)
    images = decode_sharded(network, result.latents, mesh=mesh)

Arrays may be the same NumPy arrays in every process.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxlab.instantedit.edit import Edited, Knobs, Predict, Prompts, decoded, edited, predict_stacked, stacked
from jaxlab.instantedit.inversion import inverted
from jaxlab.instantedit.network import EditorNetwork, Text
from jaxlab.instantedit.scheduler import InverseMode

IMAGES, BRANCHES = "data", "view"
MAX_BRANCHES = 4

_WHOLE = PartitionSpec()
_ROWS, _LATER, _MAPS = (PartitionSpec(*[None] * before, IMAGES) for before in range(3))


def replicated(network: EditorNetwork, mesh: Mesh) -> EditorNetwork:
    """The network with its weights on every device, so that calls move nothing."""
    return jax.device_put(network, NamedSharding(mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnames=("num_steps", "mode", "mesh"))
def invert_sharded(
    network: EditorNetwork,
    z0: Any,
    edges: Any,
    null: Any,
    control_scale: Any,
    *,
    num_steps: int,
    mode: InverseMode,
    mesh: Mesh | AbstractMesh,
) -> tuple[Any, Any]:
    """`invert_program` of B images over `data`; devices along `view` do the same.

    Raises:
      ValueError: a mesh of other axes, or whose `data` does not divide B.
    """
    _check(mesh, z0.shape[0])

    def part(network, z0, edges, null, control_scale):
        features = None if edges is None else network.hint(edges)
        return inverted(network, z0, null, features, control_scale, num_steps=num_steps, mode=mode), features

    specs = (_WHOLE, _ROWS, _ROWS, _WHOLE, _WHOLE)
    return _over(part, mesh, specs, (_LATER, _ROWS))(network, z0, edges, null, control_scale)


@functools.partial(jax.jit, static_argnames=("mesh", "dpg_axes"))
def edit_sharded(
    network: EditorNetwork,
    trajectory: Float[Array, "n b h w c"],
    features: Float[Array, "b h w c0"] | None,
    prompts: Prompts,
    knobs: Knobs,
    *,
    mesh: Mesh | AbstractMesh,
    dpg_axes: tuple[int, ...] = (1, 2),
) -> Edited:
    """`edit_program` of B images, a source and a target prompt for each.

    Values are those of one device up to rounding.

    Raises:
      ValueError: a mesh of other axes, whose `data` does not divide B, or with more than 4 along `view`.
    """
    _check(mesh, trajectory.shape[1])

    def part(network, trajectory, features, prompts, knobs):
        predict = _predictor(network, features, knobs.control_scale, mesh.shape[BRANCHES])
        return edited(network, trajectory, features, prompts, knobs, predict=predict, dpg_axes=dpg_axes)

    specs = (_WHOLE, _LATER, _ROWS, Prompts(_WHOLE, _ROWS, _ROWS, _ROWS, _ROWS), _WHOLE)
    outcome = Edited(_ROWS, _LATER, _LATER, _ROWS, _MAPS)
    return _over(part, mesh, specs, outcome)(network, trajectory, features, prompts, knobs)


@functools.partial(jax.jit, static_argnames="mesh")
def decode_sharded(network: EditorNetwork, latents: Any, *, mesh: Mesh | AbstractMesh) -> Any:
    """`decode_program` of B images over all devices where they divide B, and else over `data`.

    Raises:
      ValueError: a mesh of other axes, or whose `data` does not divide B.
    """
    _check(mesh, latents.shape[0])
    rows = _ROWS if latents.shape[0] % mesh.size else PartitionSpec((IMAGES, BRANCHES))
    return _over(decoded, mesh, (_WHOLE, rows), rows)(network, latents)


def _predictor(network: EditorNetwork, features: Any, control_scale: Any, devices: int) -> Predict:
    """Branches over the devices along `view`, every prediction on each afterwards."""

    def predict(latents: Sequence[Any], texts: Sequence[Text], time: Any, *, capture: bool = False) -> Any:
        count = len(latents)
        each = -(-count // devices)
        more = each * devices - count
        branches = stacked([*latents, *[latents[-1]] * more], [*texts, *[texts[-1]] * more], time)
        start = jax.lax.axis_index(BRANCHES) * each
        own = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, each), branches)
        made = predict_stacked(network, features, control_scale, *own, capture=capture)
        if not capture:
            return jax.lax.all_gather(made, BRANCHES, tiled=True)[:count]
        eps, maps = made
        maps = jax.lax.all_gather(maps, BRANCHES, axis=1, tiled=True)
        return jax.lax.all_gather(eps, BRANCHES, tiled=True)[:count], maps[:, :count]

    return predict


def _over(part: Callable[..., Any], mesh: Any, specs: Any, outcome: Any) -> Callable[..., Any]:
    # What is gathered is the same along `view`, which JAX does not see.
    return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=outcome, check_vma=False)


def _check(mesh: Mesh | AbstractMesh, images: int) -> None:
    if set(mesh.axis_names) != {IMAGES, BRANCHES}:
        raise ValueError(f"mesh: expected the axes {IMAGES} and {BRANCHES}, got {', '.join(mesh.axis_names)}")
    if mesh.shape[BRANCHES] > MAX_BRANCHES:
        raise ValueError(f"mesh: expected at most {MAX_BRANCHES} along {BRANCHES}, got {mesh.shape[BRANCHES]}")
    if images % mesh.shape[IMAGES]:
        raise ValueError(f"mesh: {mesh.shape[IMAGES]} along {IMAGES} do not divide {images} images")
