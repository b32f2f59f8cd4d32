"""Bytes of training by place: DeepSpeed's formulas for model states, and our own terms for a model on a machine."""

import dataclasses
import math

from jaxlab.core.plan.targets import FITS_FACTOR
from jaxlab.superoffload.machine import Machine, ModelShape

METHODS = ("superoffload", "zero_offload", "gpu_only")
ACCOUNTINGS = ("ours", "zero2", "zero3")
UNDO_BYTES = {"copy": 12, "residual": 3, "off": 0}
"""Host bytes a parameter of an undo log: old p, m and v in float32, or three int8 differences (spec 2.5)."""
HOST_SHARE = 0.98
"""The share of host memory that a plan may take (ours); of device memory it is `jaxlab.core.plan`'s."""
_LAYER_WORK = 34  # bytes a token and hidden unit that one layer keeps, attention without scores (arXiv:2205.05198)
_CHUNK_LOGITS = 2**26  # the loss works through the vocabulary in pieces, see jaxlab.training


class CapacityError(RuntimeError):
    """A plan does not fit; the message is the table of its bytes."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device and of the host beside it.

    Attributes:
        device_bytes: of device memory.
        host_bytes: of host memory; of the whole node in `estimate_memory`.
        terms: what they consist of, "device: weights" -> bytes.
    """

    device_bytes: int
    host_bytes: int
    terms: dict[str, int]

    @classmethod
    def of(cls, device: dict[str, float], host: dict[str, float]) -> "Memory":
        """From the terms of both places; those of zero bytes are left out."""
        terms = {
            f"{place}: {name}": math.ceil(size)
            for place, parts in (("device", device), ("host", host))
            for name, size in parts.items()
            if size
        }
        device_bytes, host_bytes = (
            sum(size for name, size in terms.items() if name.startswith(place)) for place in ("device", "host")
        )
        return cls(device_bytes, host_bytes, terms)

    def fits(self, machine: Machine) -> bool:
        """Whether both places have room."""
        device, host = usable(machine)
        return self.device_bytes <= device and self.host_bytes <= host

    def table(self, machine: Machine | None = None) -> str:
        """The terms as text, the sums against what a machine has."""
        limits = usable(machine) if machine else (None, None)
        rows = list(self.terms.items())
        for place, total, limit in zip(("device", "host"), (self.device_bytes, self.host_bytes), limits):
            rows.append((f"{place} total", total))
            rows += [(f"{place} usable", limit)] if limit is not None else []
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {size / 1e9:10.2f} GB" for name, size in rows)


def usable(machine: Machine) -> tuple[int, int]:
    """Bytes of device and of host memory that a plan may take."""
    return int(FITS_FACTOR * machine.hbm_bytes), int(HOST_SHARE * machine.host_bytes)


def estimate_memory(
    n_params: int,
    *,
    accounting: str = "ours",
    largest_layer: int = 0,
    offload_optimizer: bool = True,
    offload_params: bool = False,
    devices_per_node: int = 1,
    nodes: int = 1,
) -> Memory:
    """Bytes of model states, without activations.

    "zero2" and "zero3" are DeepSpeed's formulas (its `estimate_zero*_model_states_mem_needs` without the buffer
    factor). "ours" is a ZeRO-3 partition of what SuperOffload keeps: 16-bit weights, one layer's 16-bit gradients on
    their way to the host, there float32 gradients, parameters and moments; without offload all of it on the device, and
    16-bit gradients of everything instead of float32 ones.

    Args:
        n_params: P.
        accounting: "ours", "zero2" or "zero3".
        largest_layer: parameters of the largest layer, gathered as a whole where weights are partitioned or streamed.
        offload_optimizer: parameters and moments in float32 lie on the host.
        offload_params: so do the 16-bit weights; needs `offload_optimizer`.
        devices_per_node: d.
        nodes: n.

    Returns:
        Bytes of one device, and of the host of one node.

    Raises:
        ValueError: unknown accounting, sizes out of range, or parameters offloaded without the optimizer or in "zero2".
    """
    if accounting not in ACCOUNTINGS:
        raise ValueError(f"accounting: got {accounting!r}, expected one of {', '.join(ACCOUNTINGS)}")
    for name, size, least in (
        ("n_params", n_params, 1),
        ("largest_layer", largest_layer, 0),
        ("devices_per_node", devices_per_node, 1),
        ("nodes", nodes, 1),
    ):
        if size < least:
            raise ValueError(f"{name}: expected at least {least}, got {size}")
    if offload_params and not offload_optimizer:
        raise ValueError("offload_params: expected False without offload_optimizer, got True")
    if offload_params and accounting == "zero2":
        raise ValueError("offload_params: expected False for accounting 'zero2', whose weights are whole, got True")
    total = devices_per_node * nodes
    if accounting == "zero2":
        states = 0 if offload_optimizer else 18 * n_params / total
        per_param = max(4 * total, 16) if offload_optimizer else 4 * devices_per_node
        return Memory.of({"weights": 2 * n_params, "states": states}, {"states": per_param * n_params})
    if accounting == "zero3":
        per_param = 0 if offload_params else 2 if offload_optimizer else 18
        on_host = (18 if offload_params else 16) * n_params / nodes if offload_optimizer else 0
        gathered = 0 if offload_optimizer else 4 * largest_layer * devices_per_node
        return Memory.of(
            {"gathered layer": 4 * largest_layer, "states": per_param * n_params / total},
            {"gathered layers": gathered, "states": on_host},
        )
    layers = 2 if offload_params else 2 * (total > 1)  # this one and the next
    weights = {"weights": 0 if offload_params else 2 * n_params / total, "layers in use": 2 * layers * largest_layer}
    if not offload_optimizer:
        return Memory.of({**weights, "gradients": 2 * n_params / total, "optimizer": 12 * n_params / total}, {})
    host = {"optimizer": 12, "gradients": 4, "weights": 2 if offload_params else 0}
    return Memory.of(
        {**weights, "gradients": 2 * largest_layer}, {name: size * n_params / nodes for name, size in host.items()}
    )


def held_bytes(weight_policy: str) -> int:
    """Device bytes of a parameter whose float32 state stays there; weights that would flow otherwise stay with it."""
    return 14 if weight_policy == "flow" else 12


def model_memory(
    model: ModelShape,
    *,
    method: str,
    weight_policy: str = "stationary",
    gpu_elements: int = 0,
    bucket_bytes: int = 64 << 20,
    undo: str = "off",
    offload_inputs: bool = False,
    n_devices: int = 1,
) -> Memory:
    """Bytes of one device, and of its share of the host, while a step runs. Blocks are recomputed (remat).

    Args:
        model: with the tokens of all devices, which lie evenly over them.
        method: "superoffload": ZeRO-3 slices where there are several devices, gradients leave the device layer by
            layer; "zero_offload": whole 16-bit weights, 16-bit gradients until the backward pass has ended; "gpu_only":
            data parallel as DeepSpeed counts it, float32 gradients beside the 16-bit ones, 20 bytes a parameter.
        weight_policy: "stationary" or "flow".
        gpu_elements: parameters whose float32 state stays on the devices.
        bucket_bytes: of a bucket's float32 gradient; two are on their way.
        undo: a key of `UNDO_BYTES`.
        offload_inputs: the blocks' inputs lie on the host.
        n_devices: each with a host share of its own.
    """
    n, tokens = model.n_params, math.ceil(model.tokens / n_devices)
    inputs = 2 * tokens * model.hidden * model.layers
    device: dict[str, float] = {
        "block inputs": 2 * inputs / model.layers if offload_inputs else inputs,
        "a layer's work": _LAYER_WORK * tokens * model.hidden,
        "logits": 8 * min(tokens * model.vocab, _CHUNK_LOGITS),
    }
    if method == "gpu_only":
        whole = {"weights": 2 * n, "gradients": 2 * n, "float32 gradients": 4 * n, "optimizer": 12 * n}
        return Memory.of({**whole, **device}, {})
    if method == "zero_offload":
        host = {"optimizer": 12 * n / n_devices, "gradients": 4 * n / n_devices}
        return Memory.of({"weights": 2 * n, "gradients": 2 * n / n_devices, **device}, host)
    flow, in_use = weight_policy == "flow", 4 * model.layer_params
    resident = 2 * (n - model.layers * model.layer_params) + in_use if flow else 2 * n
    held = (n - gpu_elements) / n_devices
    kept = (held_bytes(weight_policy) - 12) * gpu_elements / n_devices
    return Memory.of(
        {
            "weights": (resident if n_devices == 1 else in_use + (0 if flow else 2 * n / n_devices)) + kept,
            "gradients on their way": 2 * model.layer_params + 2 * bucket_bytes,
            "optimizer": 12 * gpu_elements / n_devices,
            **device,
        },
        {
            "optimizer": 12 * held,
            "gradients": 4 * held,
            "undo": UNDO_BYTES[undo] * held,
            "weights": 2 * n / n_devices if flow else 0,
            "block inputs": inputs if offload_inputs else 0,
        },
    )
