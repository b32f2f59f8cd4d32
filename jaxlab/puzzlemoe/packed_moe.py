"""A mixture of experts that computes from packed words: the decoder's MLP after compression.

The router, the padding-free buffer and the shared expert are those of `jaxlab.xmoe`; only the experts differ. Nothing
is decoded but the block that is being multiplied.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Float

from jaxlab.layers.linear import Linear
from jaxlab.layers.mlp import GatedMLP
from jaxlab.layers.sharding import named
from jaxlab.models.decoder import DecoderConfig, MoEPolicy, MoESpec
from jaxlab.puzzlemoe.bit_packing import pack_pair
from jaxlab.puzzlemoe.compression import MATRICES, ONLY_FIRST, PackedExperts
from jaxlab.puzzlemoe.config import UNMERGED, check_name
from jaxlab.puzzlemoe.merging import dual_mask_merge
from jaxlab.puzzlemoe.quantized_experts import GROUP_SIZE, quantize_experts
from jaxlab.xmoe.config import MoEConfig
from jaxlab.xmoe.pft import build_pft, pft_gather, pft_scatter
from jaxlab.xmoe.router import Routing, top_k_gating
from pallas_kernels.dispatch import Implementation
from pallas_kernels.packed_moe_matmul import packed_moe_matmul

RouterFunction = Callable[[Array], tuple[Array, Array]]
"""Logits `[S,N]` float32 -> experts `[S,k]` integers and weights `[S,k]`; hashable."""

# Mesh axes that split rows, experts and an expert's inner width, as `jaxlab.core.DEFAULT_RULES` has them. Rows are not
# split over the axes of the experts: each device takes the rows of its own slots, and the sums are added up.
_ROW_AXES, _SEQUENCE_AXIS = ("data", "fsdp"), "sequence"
_EXPERT_AXES, _TENSOR_AXIS = ("node", "expert"), "tensor"


class PackedMoE(nn.Module):
    """Weighted sum of each token's packed experts + shared expert (arXiv:2511.04805, section 3.3).

    Parameters: `{"router": {"kernel": [d,N]}, "experts": PackedExperts}`, and "shared" and "shared_gate" as in
    `xmoe.MoE`. Under the mesh of `jax.set_mesh` slots lie over its axes node and expert (both members of a pair on one
    device), the experts' inner width over tensor, and rows over data, fsdp and sequence; an axis that does not divide
    what it would split is not used. Inference only.

    Attributes:
        num_experts: N.
        top_k: experts a token visits.
        norm_topk_prob: whether the k weights are divided by their sum.
        act: activation of the gate, "silu" or "gelu" (exact).
        shared_expert: inner width of the expert that every token visits; None or 0 = none.
        num_pairs: pairs of a freshly initialised layer; None = N // 2.
        ffn_size: f of a freshly initialised layer.
        router_fn: takes the place of softmax and top-k.
        shared_gate: a fresh shared expert's output is scaled by sigmoid(x @ w).
        unmerged: how a fresh layer keeps experts without a partner, see `PuzzleConfig`.
        dtype: compute dtype; None keeps that of x. The router is float32.
        param_dtype: stored dtype of router and shared expert.
        out_init_scale: `Linear.init_scale` of fresh down projections.
        implementation: of the kernels; None is the platform's best.
        bits: of a position of a freshly initialised layer: 16 (words), 8 or 6 (`quantize_experts`).
        group_size: inputs that share a scale, of 8 and 6 bits.
    """

    num_experts: int
    top_k: int
    norm_topk_prob: bool = True
    act: str = "silu"
    shared_expert: int | None = None
    num_pairs: int | None = None
    ffn_size: int | None = None
    router_fn: RouterFunction | None = None
    shared_gate: bool = False
    unmerged: str = "bf16"
    dtype: str | None = None
    param_dtype: str = "float32"
    out_init_scale: float = 1.0
    implementation: Implementation = None
    bits: int = 16
    group_size: int = GROUP_SIZE

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"], *, train: bool = False) -> Float[Array, "*batch d"]:
        """Maps `[..., d]` to `[..., d]`; `train` is accepted for the MLP protocol and changes nothing.

        Raises:
            ValueError: x, router and experts disagree in shape, or concrete slots do not exist.
            TypeError: words are not uint16, or codes not uint8.
        """
        if self.is_initializing():
            self._create(x.shape[-1])
        params = nn.meta.unbox(self.variables["params"])
        self._check(params, x)
        x = x.astype(jnp.dtype(self.dtype or x.dtype))
        if 0 in x.shape:
            return x
        experts = params["experts"]
        form = _Form(self.num_experts, self.top_k, self.norm_topk_prob, self.act, self.router_fn, self.implementation)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types) or self.is_initializing():
            y = _alone(form, params["router"], experts, x)
        else:
            y = _over_mesh(form, mesh, params["router"], experts, x)
        return y + self._shared(params, x) if self.shared_expert else y

    def _create(self, features: int) -> None:
        """Makes parameters: random experts, paired in their order."""
        if self.ffn_size is None:
            raise ValueError("ffn_size must be given to initialise PackedMoE, got None")
        check_name("unmerged", self.unmerged, UNMERGED)
        total, width = self.num_experts, self.ffn_size
        pairs = total // 2 if self.num_pairs is None else self.num_pairs
        if not 1 <= pairs <= total // 2:
            raise ValueError(f"num_pairs must be in 1..{total // 2}, half of num_experts={total}, got {pairs}")
        policy = {"dtype": "float32", "param_dtype": self.param_dtype}
        token = jnp.zeros((1, features), jnp.float32)
        Linear((total,), ("embed", None), name="router", **policy)(token)
        sizes = {"gate": (features, width), "up": (features, width), "down": (width, features)}

        def fresh(key: Array) -> PackedExperts:
            arrays = {}
            for name, one in zip(MATRICES, jax.random.split(key, 3)):
                scale = self.out_init_scale if name == "down" else 1.0
                init = nn.initializers.truncated_normal(scale / np.sqrt(sizes[name][0]))
                weights = init(one, (total, *sizes[name]), jnp.float32)
                rest = weights[2 * pairs :]
                words = _pack(weights[: 2 * pairs : 2], weights[1 : 2 * pairs : 2])
                if self.unmerged == "packed":
                    words = jnp.concatenate([words, _pack(rest, rest) & jnp.uint16(ONLY_FIRST)])
                elif total > 2 * pairs:
                    arrays[f"dense_{name}"] = rest.astype(jnp.bfloat16)
                arrays[name] = words
            experts = jnp.arange(total, dtype=jnp.int32)
            paired = experts < 2 * pairs
            slot_of = jnp.where(paired, experts // 2, experts - pairs)
            packed = PackedExperts(slot_of=slot_of, pos_of=jnp.where(paired, experts % 2, 0), **arrays)
            if self.bits != 16:
                packed = quantize_experts(packed, bits=self.bits, group_size=self.group_size)
            fields = {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
            return PackedExperts(**{name: _boxed(name, array) for name, array in fields.items()})

        self.param("experts", fresh)
        if self.shared_expert:
            GatedMLP(self.shared_expert, out_init_scale=self.out_init_scale, name="shared", **policy)(token)
            if self.shared_gate:
                Linear((1,), ("embed", None), name="shared_gate", **policy)(token)

    def _check(self, params: Any, x: Array) -> None:
        experts = params["experts"]
        router = params["router"]["kernel"]
        if x.ndim < 1 or router.shape != (x.shape[-1], self.num_experts):
            raise ValueError(
                f"x [..., d] and the router [d, num_experts={self.num_experts}] must agree, got {x.shape} and "
                f"{router.shape}"
            )
        shape, d, f = experts.gate.shape, x.shape[-1], experts.gate.shape[-1]
        # A word has a row of its own, codes share rows of bytes.
        bits = 8 if experts.bits == 16 else experts.bits
        gate, down = (shape[0], d * bits // 8, f), (shape[0], f * bits // 8, d)
        if (shape, experts.up.shape, experts.down.shape) != (gate, gate, down):
            raise ValueError(
                "experts.gate and up must be [S, d, f] and down [S, f, d] (of codes bits / 8 as many rows), got "
                f"{shape}, {experts.up.shape} and {experts.down.shape}"
            )
        for name in ("slot_of", "pos_of"):
            if getattr(experts, name).shape != (self.num_experts,):
                raise ValueError(
                    f"experts.{name} must have shape {(self.num_experts,)}, got {getattr(experts, name).shape}"
                )
        slots = shape[0] + (0 if experts.dense_gate is None else experts.dense_gate.shape[0])
        _check_values("slot_of", experts.slot_of, slots)
        _check_values("pos_of", experts.pos_of, 2)

    def _shared(self, params: Any, x: Array) -> Array:
        shared: Any = GatedMLP(int(self.shared_expert or 0), dtype=str(x.dtype), parent=None)
        y = shared.apply({"params": params["shared"]}, x)
        if "shared_gate" not in params:
            return y
        gate: Any = Linear((1,), ("embed", None), dtype=str(x.dtype), parent=None)
        return y * jax.nn.sigmoid(gate.apply({"params": params["shared_gate"]}, x))


@dataclasses.dataclass(frozen=True)
class PackedPolicy:
    """An MLP protocol: `Decoder(config, mlp=PackedPolicy(num_pairs))` runs its sparse layers from packed words.

    Attributes:
        num_pairs: of every sparse layer.
        unmerged: how experts without a partner are kept, see `PuzzleConfig`.
        implementation: of the kernels; None is the platform's best.
        bits: of a position: 16 (words), 8 or 6 (`quantize_moe`).
        group_size: inputs that share a scale, of 8 and 6 bits.
    """

    num_pairs: int
    unmerged: str = "bf16"
    implementation: Implementation = None
    bits: int = 16
    group_size: int = GROUP_SIZE

    def __call__(self, config: DecoderConfig, layer_is_sparse: bool) -> nn.Module:
        """The MLP of a layer: `GatedMLP`, or `PackedMoE` where it has experts."""
        if not layer_is_sparse or config.moe is None:
            return MoEPolicy()(config, False)
        spec = config.moe
        return PackedMoE(
            spec.num_experts,
            spec.top_k,
            norm_topk_prob=spec.renormalise,
            shared_expert=spec.shared_ffn_size or None,
            num_pairs=self.num_pairs,
            ffn_size=spec.ffn_size,
            router_fn=_router_of(config, spec),
            shared_gate=spec.shared_gate,
            unmerged=self.unmerged,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            out_init_scale=(2 * config.num_hidden_layers) ** -0.5,
            implementation=self.implementation,
            bits=self.bits,
            group_size=self.group_size,
        )


@dataclasses.dataclass(frozen=True)
class _XMoERouter:
    """The router of `xmoe.MoE`, weights scaled."""

    config: MoEConfig

    def __call__(self, logits: Array) -> tuple[Array, Array]:
        routing = top_k_gating(logits, self.config, train=False)
        return routing.expert_ids, routing.weights * self.config.weight_scale


def _router_of(config: DecoderConfig, spec: MoESpec) -> RouterFunction | None:
    """None where softmax and top-k are all there is to it."""
    if spec.scoring == "softmax" and spec.scale == 1.0:
        return None
    return _XMoERouter(MoEPolicy().layer_config(config))


def _pack(w_i: Array, w_j: Array) -> Array:
    return pack_pair(dual_mask_merge(w_i, w_j), checked=False)


def _boxed(name: str, array: Array | None) -> Any:
    """The array with the logical names of its axes; addresses have none."""
    if array is None or name.endswith("_of"):
        return array
    matrix = ("mlp", "embed") if name.endswith("down") else ("embed", "mlp")
    return named(lambda: array, ("expert", *matrix))()


def _check_values(name: str, array: Any, limit: int) -> None:
    if isinstance(array, jax.core.Tracer) or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return
    wrong = [(e, int(value)) for e, value in enumerate(np.asarray(array)) if not 0 <= value < limit]
    if wrong:
        raise ValueError(f"experts.{name} must be in 0..{limit - 1}, got {wrong[0][1]} for expert {wrong[0][0]}")


@dataclasses.dataclass(frozen=True)
class _Form:
    """What is static about the layer."""

    num_experts: int
    top_k: int
    norm_topk_prob: bool
    act: str
    router_fn: RouterFunction | None
    implementation: Implementation


# Jitted, so that a call outside jit is one program, too.
@functools.partial(jax.jit, static_argnums=0)
def _alone(form: _Form, router: Any, experts: PackedExperts, x: Array) -> Array:
    config, routing = _route(form, router, experts, x)
    return _products(form, config, routing, experts, x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _over_mesh(form: _Form, mesh: AbstractMesh, router: Any, experts: PackedExperts, x: Array) -> Array:
    """Opens a `shard_map` over all axes of the mesh that are not open yet."""
    free = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]

    def dividing(axes: tuple[str, ...], *sizes: int) -> tuple[str, ...]:
        axes = tuple(axis for axis in axes if axis in free and mesh.shape[axis] > 1)
        return axes if all(size % math.prod(mesh.shape[axis] for axis in axes) == 0 for size in sizes) else ()

    slots = [experts.gate.shape[0], *([] if experts.dense_gate is None else [experts.dense_gate.shape[0]])]
    # Groups that share a scale stay whole.
    widths = [experts.gate.shape[2], *([] if experts.scale_down is None else [experts.scale_down.shape[1]])]
    over, inner = dividing(_EXPERT_AXES, *slots), dividing((_TENSOR_AXIS,), *widths)
    rows = dividing(_ROW_AXES, x.shape[0]) if x.ndim > 1 else ()
    columns = dividing((_SEQUENCE_AXIS,), x.shape[1]) if x.ndim > 2 else ()
    if not (over or inner or rows or columns):
        return _alone(form, router, experts, x)

    def body(router, experts, x):
        config, routing = _route(form, router, experts, x)
        if over:
            experts, routing = _own(experts, routing, over)
        y = _products(form, config, routing, experts, x)
        return jax.lax.psum(y, (*over, *inner)) if over or inner else y

    spec = PartitionSpec
    matrix = {"gate": spec(over or None, None, inner or None), "down": spec(over or None, inner or None)}
    of_field = {
        field.name: spec()
        if field.name.endswith("_of")
        else None
        if getattr(experts, field.name) is None
        else matrix["down" if field.name.endswith("down") else "gate"]
        for field in dataclasses.fields(PackedExperts)
    }
    tokens = spec(rows or None, columns or None) if x.ndim > 2 else spec(rows or None)
    in_specs = (spec(), PackedExperts(**of_field), tokens)
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=tokens)(router, experts, x)


def _route(form: _Form, router: Any, experts: PackedExperts, x: Array) -> tuple[MoEConfig, Routing]:
    config = MoEConfig(
        num_experts=form.num_experts,
        top_k=form.top_k,
        hidden_size=x.shape[-1],
        ffn_size=max(experts.gate.shape[2], 1),
        combine_weight="softmax_renorm" if form.norm_topk_prob else "softmax",
    )
    rows = x.reshape(-1, x.shape[-1])
    linear: Any = Linear((form.num_experts,), ("embed", None), dtype="float32", parent=None)
    logits = linear.apply({"params": router}, rows)
    if form.router_fn is None:
        return config, top_k_gating(logits, config, train=False)
    ids, weights = form.router_fn(logits)
    keep, zero = jnp.ones(ids.shape, bool), jnp.float32(0)
    return config, Routing(ids.astype(jnp.int32), weights.astype(jnp.float32), keep, zero, zero)


def _own(experts: PackedExperts, routing: Routing, axes: tuple[str, ...]) -> tuple[PackedExperts, Routing]:
    """Addresses within this device's slots, and the routing without what other devices hold.

    Words and dense experts are split each for itself, so every device has its share of the pairs, which carry the load
    of two experts.
    """
    here, devices = jax.lax.axis_index(axes), jax.lax.axis_size(axes)
    words = experts.gate.shape[0]
    dense = 0 if experts.dense_gate is None else experts.dense_gate.shape[0]
    packed = experts.slot_of < words * devices
    behind = experts.slot_of - words * devices
    owner = jnp.where(packed, experts.slot_of // max(words, 1), behind // max(dense, 1))
    local = jnp.where(packed, experts.slot_of % max(words, 1), words + behind % max(dense, 1))
    mine = owner == here
    keep = routing.keep & mine[routing.expert_ids]
    return dataclasses.replace(experts, slot_of=jnp.where(mine, local, 0)), dataclasses.replace(routing, keep=keep)


def _products(form: _Form, config: MoEConfig, routing: Routing, experts: PackedExperts, x: Array) -> Array:
    pft = build_pft(routing, config)
    kernels = form.implementation
    gathered = pft_gather(x.reshape(-1, x.shape[-1]), pft, implementation=kernels)
    address = (pft.tokens_per_expert, experts.slot_of, experts.pos_of)
    inner = packed_moe_matmul(
        gathered,
        experts.gate,
        *address,
        words_up=experts.up,
        dense=experts.dense_gate,
        dense_up=experts.dense_up,
        act=form.act,
        scales=experts.scale_gate,
        scales_up=experts.scale_up,
        implementation=kernels,
    )
    outputs = packed_moe_matmul(
        inner,
        experts.down,
        *address,
        dense=experts.dense_down,
        scales=experts.scale_down,
        implementation=kernels,
    )
    return pft_scatter(outputs, pft, routing.weights, implementation=kernels).reshape(x.shape)
