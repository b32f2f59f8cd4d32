"""What a mixture-of-experts layer is and how it runs, and how devices are grouped into nodes."""

import dataclasses
import math
from collections.abc import Sequence

Number = float | int

ACTIVATIONS = ("swiglu", "silu", "gelu")
DROP_POLICIES = ("none", "probs", "position")
COMBINE_WEIGHTS = ("softmax", "softmax_renorm", "logits", "sigmoid", "sigmoid_scores")
PILOTS = ("random", "first", "rail")
DISPATCHES = (
    "local", "pft", "rbd", "dense", "padded", "tutel", "megablocks", "ragged_dot", "maxtext", "megatron"
)  # fmt: skip
KERNELS = ("reference", "xla", "triton", "interpret")
EXCHANGES = ("ragged", "padded", "gather")


def _require(ok: bool, name: str, rule: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name} must be {rule}, got {got!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture-of-experts layer: its experts, its router, and how tokens reach them.

    Sizes and defaults are those of X-MoE's scripts (arXiv:2508.13337) where they have one; dropless by default.

    Attributes:
        num_experts: E.
        top_k: experts a token visits.
        hidden_size: model width H.
        ffn_size: inner width F of an expert.
        activation: "swiglu" (three matrices), or two matrices with "silu" or "gelu" (the exact one, by erf) between.
        capacity_factor: in training an expert takes ceil(S / E * factor * k) slots of a device's S tokens.
        eval_capacity_factor: the same, outside training.
        min_capacity: the least it takes.
        drop_policy: "none" (dropless), "probs" (the highest scores stay), "position" (the first slots stay).
        combine_weight: "softmax" (top-k probabilities), "softmax_renorm" (over their sum), "logits" (as the released
            X-MoE code does), "sigmoid" (DeepSeek-V3: over their sum, chosen with a selection bias), "sigmoid_scores"
            (the same, not divided by their sum).
        aux_loss_coef: weight of the load-balancing loss in `router_loss`.
        z_loss_coef: weight of the mean squared logsumexp of the logits.
        jitter_eps: in training the router sees x times U(1 - eps, 1 + eps).
        num_shared_experts: experts every token visits, as one of `num_shared_experts * ffn_size`.
        shared_ffn_size: the width of that one, instead.
        shared_gate: scales the shared expert by sigmoid(x @ shared_gate).
        weight_scale: multiplies the routed sum.
        dispatch: "local" (tokens stay, and with `expert_axes` weights are gathered), "pft" (padding-free exchange),
            "rbd" (redundancy-bypassing exchange), or a baseline: "dense", "padded", "tutel", "megablocks",
            "ragged_dot", "maxtext", "megatron".
        pilot: how RBD picks the slot that crosses the network: "random", "first", or "rail" (same local index).
        recv_buffer_factor: rows a device can receive, over S * k; None is the worst case. What does not fit is counted.
        expert_axes: mesh axes over which the experts lie; the last is inside a node, of several the first is across.
        node_size: devices of a node where there is one axis; clipped to its size.
        tp_axis: tensor-parallel axis. Last of `expert_axes`: its ranks split the tokens (SSMB). Not among them: they
            split the experts' inner width (TED).
        implementation: names for the kernels ("xla", "triton", "interpret", "reference") and for the exchange
            ("ragged", "padded", "gather"), one or several; None is the platform's best of both.

    Raises:
        ValueError: a field that no layer can have.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    ffn_size: int
    activation: str = "swiglu"
    capacity_factor: Number = 1.25
    eval_capacity_factor: Number = 1.0
    min_capacity: int = 4
    drop_policy: str = "none"
    combine_weight: str = "softmax"
    aux_loss_coef: Number = 0.01
    z_loss_coef: Number = 0.0
    jitter_eps: Number = 0.0
    num_shared_experts: int = 0
    shared_ffn_size: int | None = None
    shared_gate: bool = False
    weight_scale: Number = 1.0
    dispatch: str = "local"
    pilot: str = "random"
    recv_buffer_factor: Number | None = None
    expert_axes: Sequence[str] = ()
    node_size: int = 8
    tp_axis: str | None = None
    implementation: str | Sequence[str] | None = None

    def __post_init__(self):
        axes = (self.expert_axes,) if isinstance(self.expert_axes, str) else tuple(self.expert_axes)
        object.__setattr__(self, "expert_axes", axes)
        if self.implementation is not None and not isinstance(self.implementation, str):
            object.__setattr__(self, "implementation", tuple(self.implementation))
        _require(self.num_experts >= 1, "num_experts", "at least 1", self.num_experts)
        _require(1 <= self.top_k <= self.num_experts, "top_k", f"in 1..num_experts={self.num_experts}", self.top_k)
        for name in ("hidden_size", "ffn_size", "node_size"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("min_capacity", "num_shared_experts"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("capacity_factor", "eval_capacity_factor"):
            _require(getattr(self, name) > 0, name, "positive", getattr(self, name))
        _require(0 <= self.jitter_eps < 1, "jitter_eps", "in [0, 1)", self.jitter_eps)
        factor = self.recv_buffer_factor
        _require(factor is None or factor > 0, "recv_buffer_factor", "positive or None", factor)
        for name, known in (
            ("activation", ACTIVATIONS),
            ("drop_policy", DROP_POLICIES),
            ("combine_weight", COMBINE_WEIGHTS),
            ("dispatch", DISPATCHES),
            ("pilot", PILOTS),
        ):
            _require(getattr(self, name) in known, name, f"one of {', '.join(known)}", getattr(self, name))
        for name in self._names():
            _require(name in (*KERNELS, *EXCHANGES), "implementation", f"of {', '.join((*KERNELS, *EXCHANGES))}", name)
        if self.shared_ffn_size is not None:
            _require(self.shared_ffn_size >= 0, "shared_ffn_size", "at least 0", self.shared_ffn_size)
        if self.shared_gate and not self.shared_width:
            raise ValueError(
                "shared_gate needs a shared expert: "
                f"num_shared_experts is {self.num_shared_experts}, shared_ffn_size {self.shared_ffn_size}"
            )
        _require(len(set(axes)) == len(axes), "expert_axes", "distinct", axes)
        if self.tp_axis in axes:
            _require(
                self.tp_axis == axes[-1], "tp_axis", f"the last of expert_axes {axes}, or none of them", self.tp_axis
            )

    @property
    def shared_width(self) -> int:
        """Inner width of the shared expert; 0 for none."""
        if self.shared_ffn_size is not None:
            return self.shared_ffn_size
        return self.num_shared_experts * self.ffn_size

    @property
    def sequence_axis(self) -> str | None:
        """The axis whose ranks split the tokens (SSMB), if there is one."""
        return self.tp_axis if self.tp_axis in self.expert_axes else None

    @property
    def width_axis(self) -> str | None:
        """The axis whose ranks split the experts' inner width (TED), if there is one."""
        return None if self.tp_axis in self.expert_axes else self.tp_axis

    @property
    def kernel_implementation(self) -> tuple[str, ...] | None:
        """What `implementation` says about the kernels."""
        return tuple(name for name in self._names() if name in KERNELS) or None

    @property
    def exchange_implementation(self) -> str | None:
        """What `implementation` says about the exchange: the first name that is one."""
        return next((name for name in self._names() if name in EXCHANGES), None)

    def _names(self) -> tuple[str, ...]:
        given = self.implementation
        return () if given is None else (given,) if isinstance(given, str) else tuple(given)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices in nodes: device d is the (d % G)-th of node d // G.

    Attributes:
        num_devices: W.
        devices_per_node: G; more than W is W.

    Raises:
        ValueError: W is no multiple of G.
    """

    num_devices: int
    devices_per_node: int

    def __post_init__(self):
        _require(self.num_devices >= 1, "num_devices", "at least 1", self.num_devices)
        _require(self.devices_per_node >= 1, "devices_per_node", "at least 1", self.devices_per_node)
        object.__setattr__(self, "devices_per_node", min(self.devices_per_node, self.num_devices))
        if self.num_devices % self.devices_per_node:
            raise ValueError(
                f"num_devices must be a multiple of the node size, got {self.num_devices} devices "
                f"in nodes of {self.devices_per_node}"
            )

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.num_devices // self.devices_per_node

    @classmethod
    def of_axes(cls, sizes: Sequence[int], node_size: int) -> "Topology":
        """Of `expert_axes` of these sizes: nodes are the first axis, or `node_size` devices where there is one."""
        devices = math.prod(sizes)
        return cls(devices, devices // sizes[0] if len(sizes) > 1 else node_size)


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, capacity_factor: Number, min_capacity: int) -> int:
    """Slots of one device that an expert takes: max(min_capacity, ceil(tokens / experts * factor * k)).

    Raises:
        ValueError: `capacity_factor` is not positive.
    """
    _require(capacity_factor > 0, "capacity_factor", "positive", capacity_factor)
    return max(min_capacity, math.ceil(num_tokens / num_experts * capacity_factor * top_k))
