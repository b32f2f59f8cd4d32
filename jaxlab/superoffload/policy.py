"""Three choices from a few bandwidths: weights stay or flow, casts on the GPU or on the CPU (SuperOffload 2.1, 2.3)."""

from jaxlab.superoffload.machine import Machine
from jaxlab.superoffload.memory import CapacityError, Memory

PAGEABLE = 2
"""How much longer a transfer takes whose staging buffer is not pinned (ours)."""


def weight_flow_efficiency(machine: Machine, tokens: int) -> float:
    """The share of its time that a GPU computes when 16-bit weights are streamed for `tokens` tokens.

    Computing takes 2 FLOPs a parameter and token, streaming 2 bytes a parameter: tokens/peak against 1/bandwidth.

    Raises:
        ValueError: tokens below 1.
    """
    if tokens < 1:
        raise ValueError(f"tokens: expected at least 1, got {tokens}")
    computing = tokens / machine.gpu_flops
    return computing / (computing + 1 / machine.link_bw)


def choose_weight_policy(
    machine: Machine,
    *,
    tokens: int,
    weight_bytes: int,
    free_bytes: int,
    free_bytes_remat: int | None = None,
    min_eff: float = 0.6,
) -> str:
    """Whether 16-bit weights stay on the device or are fetched layer by layer in both passes.

    Args:
        machine: the machine.
        tokens: of a micro-batch on one device.
        weight_bytes: of all 16-bit weights.
        free_bytes: of device memory for them, after everything else.
        free_bytes_remat: the same once activations are recomputed or offloaded; None: that is no way out.
        min_eff: from which `weight_flow_efficiency` on streaming is worth it.

    Returns:
        "stationary" if they fit; else "flow" if that is efficient; else "stationary" if they fit with
        `free_bytes_remat`.

    Raises:
        ValueError: negative bytes, min_eff outside [0, 1], or tokens below 1.
        CapacityError: none of these, with the table of terms.
    """
    for name, size in (("weight_bytes", weight_bytes), ("free_bytes_remat", free_bytes_remat or 0)):
        if size < 0:
            raise ValueError(f"{name}: expected at least 0, got {size}")
    if not 0 <= min_eff <= 1:
        raise ValueError(f"min_eff: expected a share in [0, 1], got {min_eff}")
    efficiency = weight_flow_efficiency(machine, tokens)
    if weight_bytes <= free_bytes:
        return "stationary"
    if efficiency >= min_eff:
        return "flow"
    if free_bytes_remat is not None and weight_bytes <= free_bytes_remat:
        return "stationary"
    terms = {"weights": weight_bytes, "free for them": free_bytes}
    if free_bytes_remat is not None:
        terms["free with remat"] = free_bytes_remat
    raise CapacityError(
        f"16-bit weights do not fit on {machine.name}, and streaming them for {tokens} tokens has efficiency "
        f"{efficiency:.2f}, below {min_eff}\n{Memory(weight_bytes, 0, terms).table()}"
    )


def choose_cast(machine: Machine, n: int, *, pinned: bool = True) -> str:
    """Where n elements are cast between 16-bit and float32 on their way between the memories.

    On the GPU: 4n bytes over the link and 6n in its memory; on the CPU: 2n over the link and 6n in the host's memory.

    Args:
        machine: the machine.
        n: elements.
        pinned: whether the CPU's staging buffer is pinned; if not, the link takes `PAGEABLE` times as long.

    Returns:
        "gpu" or "cpu", whichever takes less time; both give the same bits.

    Raises:
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    on_gpu = 4 * n / machine.link_bw + 6 * n / machine.hbm_bw
    on_cpu = 2 * n / machine.link_bw * (1 if pinned else PAGEABLE) + 6 * n / machine.dram_bw
    return "gpu" if on_gpu <= on_cpu else "cpu"
