"""The padding-free token buffer (PFT): kept slots sorted by expert, one row each (X-MoE section 2.3).

XLA needs static shapes, so the buffer has room for `B_max` rows; rows past `num_valid` belong to nobody.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxlab.xmoe.config import MoEConfig
from jaxlab.xmoe.router import Routing
from pallas_kernels.dispatch import Implementation
from pallas_kernels.token_combine import token_combine
from pallas_kernels.token_gather import token_gather


@struct.dataclass
class PFT:
    """Kept slots in the order of their experts, and inside an expert in their own.

    Rows past `num_valid` have expert E, slot S * k, token S and weight 0.

    Attributes:
        slots: `[B_max]` int32, slot of each row.
        token_ids: `[B_max]` int32, slot // k.
        expert_ids: `[B_max]` int32.
        combine_weights: `[B_max]` float32, differentiable in the routing's weights.
        tokens_per_expert: `[E]` int32, after drops.
        bins: `[E]` int32, their cumulative sum.
        num_valid: rows that hold a slot, int32.
        inv: `[S,k]` int32, row of each slot; B_max where it was dropped.
    """

    slots: Any
    token_ids: Any
    expert_ids: Any
    combine_weights: Any
    tokens_per_expert: Any
    bins: Any
    num_valid: Any
    inv: Any


def build_pft(routing: Routing, cfg: MoEConfig) -> PFT:
    """Sorts the kept slots by expert, once, by unique keys.

    `B_max` is S * k, or min(S * k, E * capacity) where slots are dropped.

    Args:
        routing: of `top_k_gating`.
        cfg: the layer.
    """
    tokens, k = routing.expert_ids.shape
    experts, total = cfg.num_experts, tokens * k
    rows = total if routing.capacity is None else min(total, experts * routing.capacity)
    owner = jnp.where(routing.keep, routing.expert_ids, experts).reshape(-1)
    index = jnp.arange(total, dtype=jnp.int32)
    if (experts + 1) * total < 2**31:
        keys = jax.lax.sort(owner * total + index)
        expert_ids, slots = keys // max(total, 1), keys % max(total, 1)
    else:
        expert_ids, slots = jax.lax.sort((owner, index), num_keys=1, is_stable=True)
    bins = jnp.searchsorted(expert_ids, jnp.arange(experts, dtype=jnp.int32), side="right").astype(jnp.int32)
    num_valid = bins[-1]
    expert_ids, slots, index = expert_ids[:rows], slots[:rows], index[:rows]
    slots = jnp.where(index < num_valid, slots, total)
    # Dropped slots keep the fill: their writes lie out of bounds.
    inv = jnp.full(total, rows, jnp.int32).at[slots].set(index, mode="drop", unique_indices=True)
    # Rows of one number are no work for a kernel; the op is here for its gradient, which is a gather.
    column, where = routing.weights.reshape(-1, 1), inv.reshape(-1, 1)
    weights = token_gather(column, slots, where, num_valid, implementation="xla")[:, 0]
    return PFT(
        slots=slots,
        token_ids=slots // k,
        expert_ids=expert_ids,
        combine_weights=weights,
        tokens_per_expert=jnp.diff(bins, prepend=jnp.int32(0)),
        bins=bins,
        num_valid=num_valid,
        inv=inv.reshape(tokens, k),
    )


def pft_gather(x: Float[Array, "s h"], pft: PFT, *, implementation: Implementation = None) -> Float[Array, "b h"]:
    """Row i is the token of slot i of the buffer; what lies past `num_valid` is undefined and takes no gradient.

    Args:
        x: tokens.
        pft: the buffer.
        implementation: of `pallas_kernels.token_gather`.
    """
    return token_gather(x, pft.token_ids, pft.inv, pft.num_valid, implementation=implementation)


def pft_scatter(
    y: Float[Array, "b h"], pft: PFT, weights: Float[Array, "s k"], *, implementation: Implementation = None
) -> Float[Array, "s h"]:
    """Each token's sum of its slots' rows times their weights, in float32; dropped slots add nothing.

    The gradients are gathers, too: a row's is its weight times its token's, a weight's the dot product of the two.

    Args:
        y: rows of the buffer; those past `num_valid` are not read.
        pft: the buffer.
        weights: of each slot.
        implementation: of `pallas_kernels.token_combine`.
    """
    return token_combine(y, weights, pft.inv, pft.slots, pft.num_valid, implementation=implementation)
