"""Which MLP a layer of the decoder gets, and how its experts run."""

import dataclasses

from flax import linen as nn

from jaxlab.layers import GatedMLP
from jaxlab.models.decoder.config import DecoderConfig, MoESpec, Number
from jaxlab.xmoe.config import MoEConfig
from jaxlab.xmoe.moe import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEPolicy:
    """How sparse layers run: an MLP protocol, `Decoder(config, mlp=MoEPolicy(dispatch="rbd", expert_axes=...))`.

    Sizes and weights of the experts are the model's (`MoESpec`) and do not depend on this; the fields are those of
    `jaxlab.xmoe.MoEConfig`. What is random (jitter, random pilots) takes its key from the "mlp" rng; at evaluation
    without one, pilots are "first", which gives the same sums.

    Attributes:
        dispatch: "local", "pft", "rbd", or a baseline's name.
        expert_axes: mesh axes of the experts; () keeps all of them on every device.
        drop_policy: "none", "probs" or "position".
        capacity_factor: of training, where slots are dropped.
        eval_capacity_factor: elsewhere.
        min_capacity: slots an expert takes at least.
        pilot: RBD's choice, "random", "first" or "rail".
        recv_buffer_factor: rows a device can receive, over tokens * k; None is the worst case.
        node_size: devices of a node where there is one expert axis.
        tp_axis: last of `expert_axes` (sequence-sharded blocks), or another axis (sliced experts); None for neither.
        jitter_eps: relative noise on the router's input in training.
        implementation: of kernels and exchange; None is the platform's best.
    """

    dispatch: str = "local"
    expert_axes: tuple[str, ...] = ()
    drop_policy: str = "none"
    capacity_factor: Number = 1.25
    eval_capacity_factor: Number = 1.0
    min_capacity: int = 4
    pilot: str = "random"
    recv_buffer_factor: Number | None = None
    node_size: int = 8
    tp_axis: str | None = None
    jitter_eps: Number = 0.0
    implementation: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "expert_axes", tuple(self.expert_axes))

    def __call__(self, config: DecoderConfig, layer_is_sparse: bool) -> nn.Module:
        """The MLP of a layer: `GatedMLP`, or `xmoe.MoE` where the layer has experts."""
        common = {"dtype": config.dtype, "param_dtype": config.param_dtype, "out_init_scale": out_init_scale(config)}
        if not layer_is_sparse or config.moe is None:
            return GatedMLP(config.intermediate_size, **common)
        return MoE(self.layer_config(config), pilot_without_rng="first", **common)

    def layer_config(self, config: DecoderConfig) -> MoEConfig:
        """What the sparse layers of a decoder are, run this way.

        Raises:
            ValueError: the decoder has none, or the two do not go together.
        """
        spec = config.moe
        if spec is None:
            raise ValueError("config.moe must be a MoESpec, got None")
        return MoEConfig(
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            hidden_size=config.hidden_size,
            ffn_size=spec.ffn_size,
            activation=spec.activation,
            combine_weight=_combine_weight(spec),
            shared_ffn_size=spec.shared_ffn_size,
            shared_gate=spec.shared_gate,
            weight_scale=spec.scale,
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
        )


def out_init_scale(config: DecoderConfig) -> float:
    """Each layer adds twice to the residual stream; this keeps its variance at the start (GPT-2)."""
    return (2 * config.num_hidden_layers) ** -0.5


def _combine_weight(spec: MoESpec) -> str:
    if spec.scoring == "softmax":
        return "softmax_renorm" if spec.renormalise else "softmax"
    return "sigmoid" if spec.renormalise else "sigmoid_scores"


def default_mlp(config: DecoderConfig, layer_is_sparse: bool) -> nn.Module:
    """The MLP of a layer: `GatedMLP`, or `xmoe.MoE` where it has experts, dropless and without expert parallelism.

    Any such function may take its place in `Decoder(config, mlp=...)`, `MoEPolicy` among them: the module it returns
    is called as `module(x[B,T,D], train=...)` and returns y, or (y, aux).
    """
    return MoEPolicy()(config, layer_is_sparse)
