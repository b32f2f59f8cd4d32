"""The whole plan: where weights, optimizer state, casts and undo logs go, and whether that fits."""

import dataclasses
import itertools

from jaxlab.superoffload.machine import Machine, ModelShape
from jaxlab.superoffload.memory import METHODS, UNDO_BYTES, CapacityError, Memory, model_memory, usable
from jaxlab.superoffload.policy import choose_cast
from jaxlab.superoffload.simulation import bucket_count, gpu_buckets_within, weight_policy

BUCKET_BYTES = 64 << 20
"""Where the link between the memories is saturated (paper)."""


@dataclasses.dataclass(frozen=True)
class OffloadPlan:
    """How a model is trained on a machine.

    Attributes:
        weight_policy: "stationary", or "flow": weights on the host, fetched one layer ahead.
        n_buckets: of 64 MiB of float32.
        gpu_buckets: the first so many keep their float32 state on the GPU.
        cast: where gradients and weights are cast, "gpu" or "cpu".
        undo: how a speculative step is undone, "copy", "residual", or "off": nothing is speculated.
        memory: bytes of one device and its host.
        offload_inputs: the blocks' inputs wait for the backward pass on the host.
    """

    weight_policy: str
    n_buckets: int
    gpu_buckets: int
    cast: str
    undo: str
    memory: Memory
    offload_inputs: bool = False


def plan_offload(
    model: ModelShape, machine: Machine, *, method: str = "superoffload", undo: str = "auto", n_devices: int = 1
) -> OffloadPlan:
    """Plans the training of `model`; blocks are recomputed in the backward pass.

    Weights stay on the device if they fit, else they flow if that is efficient (`choose_weight_policy`), whichever the
    host then has room for; the blocks' inputs stay on the device if they fit; as many buckets stay there as
    `choose_gpu_buckets` wants. The undo log is a copy if the host has room for it, else the residual, else nothing is
    speculated.

    Args:
        model: sizes, and the batch of all devices.
        machine: one device and its share of the host.
        method: "superoffload", "zero_offload" or "gpu_only", see `model_memory`.
        undo: "auto", "copy", "residual" or "off".
        n_devices: equal ones; each holds 1/n of the float32 state, and of the tokens (over data or sequence ranks).

    Raises:
        ValueError: unknown method or undo, an undo log for a method that does not speculate, n_devices below 1.
        CapacityError: it does not fit; the message has the table of terms.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    if undo not in ("auto", *UNDO_BYTES):
        raise ValueError(f"undo: got {undo!r}, expected one of auto, {', '.join(UNDO_BYTES)}")
    if n_devices < 1:
        raise ValueError(f"n_devices: expected at least 1, got {n_devices}")
    n_buckets = bucket_count(model, BUCKET_BYTES)
    if method != "superoffload":
        if undo not in ("auto", "off"):
            raise ValueError(f"undo: expected 'auto' or 'off' for {method!r}, which speculates nothing, got {undo!r}")
        memory = model_memory(model, method=method, n_devices=n_devices)
        _check(memory, machine, method)
        on_gpu = method == "gpu_only"
        return OffloadPlan(
            "stationary", n_buckets, n_buckets if on_gpu else 0, "gpu" if on_gpu else "cpu", "off", memory
        )
    preferred = weight_policy(model, machine, n_devices=n_devices)
    policies = ("flow", "stationary") if preferred == "flow" else ("stationary",)
    undos = ("copy", "residual", "off") if undo == "auto" else (undo,)
    cast = choose_cast(machine, BUCKET_BYTES // 4)
    tried = []
    for kind, policy, offload_inputs in itertools.product(undos, policies, (False, True)):
        choice = {"weight_policy": policy, "undo": kind, "offload_inputs": offload_inputs, "n_devices": n_devices}
        memory = model_memory(model, method=method, **choice)
        if memory.fits(machine):
            free = (usable(machine)[0] - memory.device_bytes) * n_devices
            buckets = gpu_buckets_within(model, machine, policy, free, BUCKET_BYTES)
            elements = min(model.n_params, buckets * BUCKET_BYTES // 4)
            memory = model_memory(model, method=method, gpu_elements=elements, **choice)
            return OffloadPlan(policy, n_buckets, buckets, cast, kind, memory, offload_inputs)
        tried.append(memory)
    raise _capacity(tried[-1], machine, method)


def _check(memory: Memory, machine: Machine, method: str) -> None:
    if not memory.fits(machine):
        raise _capacity(memory, machine, method)


def _capacity(memory: Memory, machine: Machine, method: str) -> CapacityError:
    return CapacityError(f"{method} does not fit on {machine.name}\n{memory.table(machine)}")
