"""Bytes that a mixture-of-experts layer keeps for its backward pass, from shapes alone (X-MoE section 2)."""

from typing import Any

import jax.numpy as jnp

from jaxlab.xmoe.config import MoEConfig, expert_capacity

MODES = ("padded", "tutel", "pft", "rbd", "ted")


def activation_memory(
    cfg: MoEConfig, batch: int, seq: int, tp: int, ep: int, dtype: Any, mode: str, *, ssmb: bool = False
) -> dict[str, int]:
    """What one device keeps of one layer's routed experts between the forward and the backward pass.

    With S = batch * seq tokens (S / tp under SSMB), R rows of expert input, b bytes a number of `dtype`:

    - dispatch: R * H * b, the rows the experts get;
    - combine: R * H * b, the rows they give;
    - intermediate: two of R * F * b, before and after the activation ("swiglu": gate and up, the rest is made again);
      TED splits F over the tp ranks;
    - mask: what a dense [S, E, C] formulation needs beside them: combine weights in float32, the boolean dispatch mask,
      and both once more in `dtype` for the two einsums.

    PFT and RBD have R = S * k (with dropping at most E * C), the others R = E * C, C slots for each expert and source;
    without dropping C = S. Balanced routing is assumed, so a device receives as many rows as it sends and `ep` changes
    nothing but what it must divide. RBD saves network, not this memory: at the experts every replica is a row again.
    Integers of the routing (S * k of them) are left out, and so is what only lives within a pass.

    For the paper's Large layer, one sequence of 4096 in 2 bytes, capacity 1.25, this gives 1.125 GiB for PFT, 1.406 for
    "tutel" and 2.813 for "padded"; the paper's plot says 1.21, 1.95 and 2.81. Its Tutel is more by 0.547 GiB, exactly
    one more buffer of E * C * H.

    Args:
        cfg: the layer.
        batch: sequences of one data-parallel rank.
        seq: tokens of one sequence.
        tp: tensor-parallel ranks, which hold the same tokens.
        ep: devices the experts lie on.
        dtype: of the activations.
        mode: "padded" (GShard, DeepSpeed-MoE), "tutel" (indices, no masks), "pft", "rbd", or "ted" (DeepSpeed-TED:
            padded, experts sliced over the tp ranks).
        ssmb: the tp ranks split the tokens.

    Returns:
        Bytes: "dispatch", "combine", "intermediate", "mask" and their "total".

    Raises:
        ValueError: an unknown mode, sizes below 1, `ep` that does not divide E, tokens or F that `tp` does not divide,
            or SSMB for "ted", which splits the experts instead of the tokens.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    for name, size in (("batch", batch), ("seq", seq), ("tp", tp), ("ep", ep)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if cfg.num_experts % ep:
        raise ValueError(f"ep must divide num_experts={cfg.num_experts}, got {ep}")
    if ssmb and mode == "ted":
        raise ValueError("ssmb must be False for mode 'ted', whose tp ranks split the experts, got True")
    tokens, width = batch * seq, cfg.ffn_size
    if ssmb:
        tokens = _split("the number of tokens", tokens, tp)
    if mode == "ted":
        width = _split("ffn_size", width, tp)

    capacity = tokens
    if cfg.drop_policy != "none":
        capacity = expert_capacity(tokens, cfg.num_experts, cfg.top_k, cfg.capacity_factor, cfg.min_capacity)
    slots = cfg.num_experts * capacity
    rows = min(tokens * cfg.top_k, slots) if mode in ("pft", "rbd") else slots
    item = jnp.dtype(dtype).itemsize
    kept = {
        "dispatch": rows * cfg.hidden_size * item,
        "combine": rows * cfg.hidden_size * item,
        "intermediate": 2 * rows * width * item,
        "mask": tokens * slots * _mask_bytes(item) if mode in ("padded", "ted") else 0,
    }
    return {**kept, "total": sum(kept.values())}


def _split(name: str, size: int, tp: int) -> int:
    if size % tp:
        raise ValueError(f"tp must divide {name}, {size}, got {tp}")
    return size // tp


def _mask_bytes(item: int) -> int:
    """Bytes of an entry of [S, E, C]: weights in float32, a bool, and copies in the compute dtype if that differs."""
    return 4 + 1 + item + (item if item != 4 else 0)
