"""The layer: parameters, router, one of the ways of dispatching, shared expert, metrics, on one device or over a mesh.

Everything but the parameters is a pure function of one device's shards; `MoE` calls it as it is (one device, or inside
the caller's `shard_map`) or inside a `shard_map` of its own.
"""

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, DTypeLike, Float

from jaxlab.core.keys import named_key
from jaxlab.core.mesh import DEFAULT_RULES
from jaxlab.layers.linear import Linear
from jaxlab.layers.mlp import GatedMLP
from jaxlab.layers.sharding import named
from jaxlab.xmoe.config import MoEConfig
from jaxlab.xmoe.experts import Experts, Routed
from jaxlab.xmoe.router import Routing, top_k_gating
from jaxlab.xmoe.ssmb import sequence_shard, sequence_unshard

_DISPATCHERS = {
    "local": "local",
    "pft": "expert_parallel",
    "rbd": "expert_parallel",
    "dense": "baselines",
    "padded": "baselines",
    "tutel": "baselines",
    "megablocks": "baselines",
    "ragged_dot": "baselines",
    "maxtext": "expert_baselines",
    "megatron": "expert_baselines",
}
"""Name of a way of dispatching -> the module of this package that has the function of that name."""

# The mesh axes that split rows, in their order, and the second dimension; and that over which dense layers are cut.
_BATCH_AXES: Any = dict(DEFAULT_RULES)["batch"]
_SEQUENCE_AXIS: Any = dict(DEFAULT_RULES)["sequence"]
_WIDTH_AXIS: Any = dict(DEFAULT_RULES)["mlp"]


@struct.dataclass
class MoEMetrics:
    """What a layer reports; with several devices summed or averaged over them.

    Attributes:
        aux_loss: load-balancing loss, unscaled; the mean of the devices' own.
        z_loss: mean squared logsumexp of the router's logits, unscaled.
        tokens_per_expert: `[E]` int32, slots that reached each expert.
        dropped_fraction: share of the slots that the capacity dropped.
        dropped_recv: rows for which a receive buffer had no room (`recv_buffer_factor`), int32.
        inter_node_rows: rows sent from node to node, one direction, int32.
    """

    aux_loss: Any
    z_loss: Any
    tokens_per_expert: Any
    dropped_fraction: Any
    dropped_recv: Any
    inter_node_rows: Any


@dataclasses.dataclass(frozen=True)
class _Form:
    """What is static about one device's part of the layer."""

    config: MoEConfig
    dtype: str
    train: bool
    reduce_axes: tuple[str, ...]


class MoE(nn.Module):
    """weight_scale * (weighted sum of each token's experts) + shared expert.

    Where it runs: with `mesh`, over that mesh; with `config.expert_axes` (or `tp_axis`) bound by an enclosing
    `jax.shard_map`, on this device's tokens and experts; otherwise over the mesh of `jax.set_mesh`, if that has the
    axes. Over a mesh rows are split over the axes among data, fsdp, node, expert and sequence that the mesh has, and
    over `expert_axes`; the experts lie over `expert_axes`; each device routes its own tokens, and drops among them.
    Without `expert_axes` that is plain data parallelism, with the inner widths cut over `tensor`.

    Attributes:
        config: the layer.
        mesh: over which the layer opens a `shard_map` itself.
        dtype: compute dtype of the experts; None keeps that of x. The router is float32.
        param_dtype: stored dtype.
        out_init_scale: `Linear.init_scale` of the down projections.
        pilot_without_rng: takes the place of `config.pilot` outside training where there is no rng; None: an error.
    """

    config: MoEConfig
    mesh: Mesh | AbstractMesh | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = "float32"
    out_init_scale: float = 1.0
    pilot_without_rng: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h"], *, train: bool = False, rng: Array | None = None
    ) -> tuple[Float[Array, "*batch h"], MoEMetrics]:
        """Applies the layer.

        Args:
            x: tokens, `[..., H]`.
            train: chooses the capacity factor and turns the router's jitter on.
            rng: key of the jitter and of random pilots; None takes `make_rng("mlp")` where that exists.

        Returns:
            y as x, and the metrics.

        Raises:
            ValueError: x is not `[..., H]`; the experts, or the rows, are not divisible by the devices; an axis is
                neither bound nor in a mesh; something random needs a key.
            TypeError: x is not floating.
        """
        config = self.config
        if x.ndim < 1 or x.shape[-1] != config.hidden_size:
            raise ValueError(f"x must be [..., hidden_size={config.hidden_size}], got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x must be floating, got {x.dtype}")
        if self.is_initializing():
            self._create()
            config, mesh = (
                dataclasses.replace(config, dispatch="local", expert_axes=(), tp_axis=None, jitter_eps=0),
                None,
            )
        else:
            config, mesh = _where(config, self.mesh, x)
        if rng is None and self.has_rng("mlp"):
            rng = self.make_rng("mlp")
        config = _with_key(config, train, rng, self.pilot_without_rng)
        params = nn.meta.unbox(self.variables["params"])
        form = _Form(config, str(jnp.dtype(self.dtype or x.dtype)), train, tuple(config.expert_axes))
        if mesh is None:
            y, metrics = _on_device(form, params, x.reshape(-1, x.shape[-1]), rng)
            return y.reshape(x.shape), metrics
        return _over_mesh(form, mesh, params, x, rng)

    def _create(self) -> None:
        """Makes the parameters."""
        config = self.config
        features, width, experts = config.hidden_size, config.ffn_size, config.num_experts
        policy = {"dtype": "float32", "param_dtype": jnp.dtype(self.param_dtype).name}
        token = jnp.zeros((1, features), jnp.float32)
        Linear((experts,), ("embed", None), name="router", **policy)(token)
        # With SSMB the ranks of the tensor axis hold experts, too.
        axis = "expert_tensor" if config.sequence_axis else "expert"

        def matrices(name: str, names: tuple[str, str], shape: tuple[int, int], scale: float) -> None:
            init = nn.initializers.truncated_normal(scale / np.sqrt(shape[0]))
            self.param(name, named(init, (axis, *names)), (experts, *shape), jnp.dtype(self.param_dtype))

        if config.activation == "swiglu":
            matrices("gate", ("embed", "mlp"), (features, width), 1.0)
        matrices("up", ("embed", "mlp"), (features, width), 1.0)
        matrices("down", ("mlp", "embed"), (width, features), self.out_init_scale)
        if config.shared_width:
            GatedMLP(config.shared_width, out_init_scale=self.out_init_scale, name="shared", **policy)(token)
            if config.shared_gate:
                Linear((1,), ("embed", None), name="shared_gate", **policy)(token)


def _with_key(config: MoEConfig, train: bool, rng: Array | None, pilot_without_rng: str | None) -> MoEConfig:
    """Refuses what needs a key and has none."""
    if rng is not None:
        return config
    if train and config.jitter_eps:
        raise ValueError(f"jitter_eps={config.jitter_eps} needs rng (or an 'mlp' rng) in training, got None")
    if config.dispatch == "rbd" and config.pilot == "random":
        if train or pilot_without_rng is None:
            raise ValueError("pilot='random' needs rng (or an 'mlp' rng), got None; 'first' and 'rail' need none")
        return dataclasses.replace(config, pilot=pilot_without_rng)
    return config


def _where(config: MoEConfig, mesh: Any, x: Array) -> tuple[MoEConfig, Any]:
    """The mesh to open, or None where this device's shards are here already (or all there is)."""
    if config.dispatch == "rbd" and not config.expert_axes:
        raise ValueError("dispatch='rbd' needs expert_axes, got ()")
    needed = (*config.expert_axes, *_present(config.width_axis))
    ambient = jax.sharding.get_abstract_mesh()
    if ambient.manual_axes and set(needed) <= set(ambient.manual_axes):
        return config, None
    automatic = not ambient.empty and all(kind == AxisType.Auto for kind in ambient.axis_types)
    if mesh is None and not needed:
        # Left alone, XLA would gather all tokens to sort them. What does not divide (one row, say) is left alone.
        if not automatic or ambient.size == 1 or x.size == 0 or _rows(config, ambient, x.shape)[1] is None:
            return config, None
        parts = ambient.shape.get(_WIDTH_AXIS, 1)
        if parts > 1 and config.ffn_size % parts == 0:
            config = dataclasses.replace(config, tp_axis=_WIDTH_AXIS)
        return config, ambient
    mesh = ambient if mesh is None and automatic else mesh
    if mesh is None:
        raise ValueError(
            f"expert_axes {config.expert_axes} and tp_axis {config.tp_axis!r} must be bound by jax.shard_map, or be "
            f"axes of a mesh (mesh=, or that of jax.set_mesh); bound are {tuple(ambient.manual_axes)}"
        )
    missing = [axis for axis in needed if axis not in mesh.shape]
    if missing:
        raise ValueError(f"expert_axes and tp_axis: {missing} are no axes of the mesh, which has {tuple(mesh.shape)}")
    _check_divisible(config, lambda axes: math.prod(mesh.shape[axis] for axis in axes))
    if isinstance(mesh, Mesh) and ambient.empty:
        # JAX's own make_mesh makes explicit axes, over which a shard_map takes no array that is not sharded yet.
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return config, mesh


def _rows(config: MoEConfig, mesh: Any, shape: tuple[int, ...]) -> tuple[tuple[str, ...], PartitionSpec | None]:
    """The axes that split the tokens, and how they do: x as it is, or its rows; None where they do not divide it."""
    axes = dict.fromkeys((*_BATCH_AXES, *config.expert_axes))
    rows = tuple(axis for axis in axes if axis in mesh.shape and axis != config.tp_axis)
    columns = tuple(axis for axis in (_SEQUENCE_AXIS,) if axis in mesh.shape and axis not in (*rows, config.tp_axis))
    row_parts, column_parts = (math.prod(mesh.shape[axis] for axis in axes) for axes in (rows, columns))
    if len(shape) == 3 and shape[0] % row_parts == 0 and shape[1] % column_parts == 0:
        return (*rows, *columns), PartitionSpec(rows, columns)
    if math.prod(shape[:-1]) % (row_parts * column_parts) == 0:
        return (*rows, *columns), PartitionSpec((*rows, *columns))
    return (*rows, *columns), None


def _over_mesh(form: _Form, mesh: Any, params: Any, x: Array, rng: Array | None) -> tuple[Array, MoEMetrics]:
    """Opens a `shard_map` over all axes of the mesh."""
    config, shape = form.config, x.shape
    axes, tokens = _rows(config, mesh, shape)
    if tokens is None:
        raise ValueError(
            f"x has {math.prod(shape[:-1])} rows, which must be a multiple of "
            f"{math.prod(mesh.shape[axis] for axis in axes)}, the devices of {axes}"
        )
    x = x if len(tokens) == 2 else x.reshape(-1, shape[-1])
    form = dataclasses.replace(form, reduce_axes=(*axes, *_present(config.sequence_axis)))
    y, metrics = _opened(form, mesh, tokens, params, x, () if rng is None else (rng,))
    return y.reshape(shape), metrics


# Jitted, so that a call outside jit is one program, too: a shard_map by itself would run operation by operation.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _opened(form, mesh, tokens, params, x, rng):
    config = form.config
    experts, width = tuple(config.expert_axes) or None, config.width_axis
    weights: dict[str, Any] = dict.fromkeys(params, PartitionSpec())
    weights |= dict.fromkeys(("gate", "up"), PartitionSpec(experts, None, width))
    weights["down"] = PartitionSpec(experts, width)
    if width and config.shared_width % mesh.shape[width] == 0:
        into, out_of = {"kernel": PartitionSpec(None, width)}, {"kernel": PartitionSpec(width)}
        weights["shared"] = {"gate": into, "up": into, "down": out_of}

    def body(params, x, rng):
        y, metrics = _on_device(form, params, x.reshape(-1, x.shape[-1]), *rng or (None,))
        return y.reshape(x.shape), metrics

    in_specs = ({name: weights[name] for name in params}, tokens, PartitionSpec())
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=(tokens, PartitionSpec()))(params, x, rng)


def _on_device(form: _Form, params: Any, x: Float[Array, "s h"], rng: Array | None) -> tuple[Array, MoEMetrics]:
    """One device's part: its tokens, its experts, the metrics of all."""
    config = form.config
    experts = _experts(config, params)
    if config.sequence_axis is not None:
        x = sequence_shard(x, config.sequence_axis)
    if rng is not None and form.reduce_axes:
        rng = jax.random.fold_in(rng, jax.lax.axis_index(form.reduce_axes))
    routing = top_k_gating(_logits(form, params, x, rng), config, train=form.train)

    x = x.astype(form.dtype)
    scaled = dataclasses.replace(routing, weights=routing.weights * config.weight_scale)
    pilot_key = None if rng is None else named_key(rng, "pilots")
    routed = _dispatcher(config.dispatch)(x, scaled, config, experts, pilot_key)
    # What the ranks of `width_axis` have computed in part is summed over them; a whole shared expert is equal on all.
    parts, wholes = [routed.y], []
    if config.shared_width:
        if config.expert_axes:
            # Once the counts are exchanged, not before: a scheduler that hides latency then has it for the rows.
            x, *_ = jax.lax.optimization_barrier((x, routed.dropped_recv, routed.inter_node_rows))
        y, whole = _shared(form, params, x)
        (wholes if whole else parts).append(y)
    y = sum(parts[1:], parts[0])
    if config.width_axis is not None:
        y = jax.lax.psum(y, config.width_axis)
    y = sum(wholes, y)
    if config.sequence_axis is not None:
        y = sequence_unshard(y, config.sequence_axis)
    return y, _metrics(form, routing, routed)


def _logits(form: _Form, params: Any, x: Float[Array, "s h"], rng: Array | None) -> Any:
    """The router's outputs, computed in float32; what is kept of x for its gradient need not be."""
    config = form.config
    if form.train and config.jitter_eps and rng is not None:
        low, high = 1 - config.jitter_eps, 1 + config.jitter_eps
        noise = jax.random.uniform(named_key(rng, "jitter"), x.shape, jnp.float32, low, high)
        x = x.astype(jnp.float32) * noise
    router = Linear((config.num_experts,), ("embed", None), dtype="float32", parent=None)
    return router.apply({"params": params["router"]}, x)


def _dispatcher(name: str) -> Any:
    return getattr(importlib.import_module(f"jaxlab.xmoe.{_DISPATCHERS[name]}"), name)


def _experts(config: MoEConfig, params: Any) -> Experts:
    """This device's experts; with `width_axis` their part, which is cut here where the caller has not done so."""
    _check_divisible(config, lambda axes: math.prod(jax.lax.axis_size(axis) for axis in axes))
    gate, up, down = params.get("gate"), params["up"], params["down"]
    ranks = math.prod(jax.lax.axis_size(axis) for axis in config.expert_axes)
    if up.shape[0] != config.num_experts // ranks:
        raise ValueError(
            f"up must hold {config.num_experts // ranks} of the {config.num_experts} experts on each of {ranks} "
            f"devices, got shape {up.shape}"
        )
    axis = config.width_axis
    if axis is None or up.shape[2] == config.ffn_size // jax.lax.axis_size(axis):
        return Experts(gate, up, down)
    width = config.ffn_size // jax.lax.axis_size(axis)
    cut = functools.partial(
        jax.lax.dynamic_slice_in_dim, start_index=jax.lax.axis_index(axis) * width, slice_size=width
    )
    return Experts(None if gate is None else cut(gate, axis=2), cut(up, axis=2), cut(down, axis=1))


def _check_divisible(config: MoEConfig, size: Callable[[Sequence[str]], int]) -> None:
    ranks, parts = size(config.expert_axes), size(_present(config.width_axis))
    if config.num_experts % ranks:
        raise ValueError(
            f"num_experts={config.num_experts} must be a multiple of the {ranks} devices of expert_axes "
            f"{config.expert_axes}"
        )
    if config.ffn_size % parts:
        raise ValueError(f"ffn_size={config.ffn_size} must be a multiple of the {parts} devices of {config.tp_axis!r}")


def _present(axis: str | None) -> tuple[str, ...]:
    return () if axis is None else (axis,)


def _shared(form: _Form, params: Any, x: Float[Array, "s h"]) -> tuple[Array, bool]:
    """The shared expert, and whether this is all of it, or the part of the inner width that is here."""
    width = params["shared"]["down"]["kernel"].shape[0]
    shared: Any = GatedMLP(width, dtype=form.dtype, parent=None)
    y = shared.apply({"params": params["shared"]}, x)
    if form.config.shared_gate:
        gate: Any = Linear((1,), ("embed", None), dtype=form.dtype, parent=None)
        y = y * jax.nn.sigmoid(gate.apply({"params": params["shared_gate"]}, x))
    return y, width == form.config.shared_width


def _metrics(form: _Form, routing: Routing, routed: Routed) -> MoEMetrics:
    experts = jnp.arange(form.config.num_experts, dtype=jnp.int32)
    kept = (routing.expert_ids[..., None] == experts) & routing.keep[..., None]
    dropped = jnp.sum(~routing.keep, dtype=jnp.float32) / max(routing.keep.size, 1)
    counts = jnp.sum(kept, axis=(0, 1), dtype=jnp.int32)
    averages = (routing.aux_loss, routing.z_loss, dropped)
    sums = (counts, routed.dropped_recv, routed.inter_node_rows)
    if form.reduce_axes:
        averages = jax.lax.pmean(averages, form.reduce_axes)
        sums = jax.lax.psum(sums, form.reduce_axes)
    aux_loss, z_loss, dropped = averages
    return MoEMetrics(aux_loss, z_loss, sums[0], dropped, *sums[1:])
