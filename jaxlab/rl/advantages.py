"""Advantages relative to a group: every completion is judged against the others of its prompt."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from jaxlab.rl.config import check_choice

ADVANTAGE_KINDS = ("grpo", "dr_grpo", "rloo")


def _groups(rows: int, group_size: int | None, group_ids: Any) -> tuple[int, Int[Array, " B"]]:
    """How many groups there are at most, and the number of each row's."""
    if group_size is not None and group_ids is None:
        if group_size < 1 or rows % group_size:
            raise ValueError(f"group_size: expected a divisor of the {rows} rewards, got {group_size}")
        return rows // group_size, jnp.arange(rows) // group_size
    if group_ids is not None and group_size is None:
        ids = jnp.asarray(group_ids)
        if ids.shape != (rows,) or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"group_ids: expected {rows} integers, one for each reward, got {ids.dtype} {ids.shape}")
        return rows, jnp.unique(ids, return_inverse=True, size=rows)[1]  # numbered by sorting: ids may be anything
    raise ValueError(f"group_size, group_ids: expected exactly one of them, got {group_size} and {group_ids}")


def compute_advantages(
    rewards: Real[Array | np.ndarray, " B"],
    *,
    group_size: int | None = None,
    group_ids: Int[Array | np.ndarray, " B"] | None = None,
    kind: Literal["grpo", "dr_grpo", "rloo"] = "grpo",
    eps: float = 1e-6,
    ddof: int = 1,
) -> Float[Array, " B"]:
    """Advantage of each sequence over its group, f32 (f64 for f64 rewards).

    `grpo` (arXiv 2402.03300): (r - mean) / (std + eps); `dr_grpo` (arXiv 2503.20783): r - mean; `rloo` (arXiv
    2402.14740): r - mean of the others. Equal rewards give exactly 0. A group of one has mean 0 and standard deviation
    1, as in verl: its reward is its advantage.

    Args:
      rewards: one for each sequence.
      group_size: G, where groups are contiguous.
      group_ids: or the group of each sequence: any integers, in any order, traced or not.
      kind: as above.
      eps: added to the standard deviation (verl, Tunix 1e-6; TRL 1e-4).
      ddof: 1: standard deviation of a sample, as torch's (official); 0: of the population, as NumPy's.

    Raises:
      ValueError: not exactly one of `group_size` and `group_ids`; B not divisible by `group_size`; other shapes than
        [B]; a negative `eps`; a `ddof` other than 0 and 1; an unknown `kind`.
    """
    check_choice("kind", kind, ADVANTAGE_KINDS)
    if not eps >= 0:
        raise ValueError(f"eps: expected a value >= 0, got {eps}")
    if ddof not in (0, 1):
        raise ValueError(f"ddof: expected 0 or 1, got {ddof}")
    rewards = jnp.asarray(rewards)
    if rewards.ndim != 1:
        raise ValueError(f"rewards: expected shape [B], got {rewards.shape}")
    groups, group = _groups(rewards.shape[0], group_size, group_ids)

    def summed(values):
        return jax.ops.segment_sum(values, group, groups)[group]

    rewards = rewards.astype(jnp.promote_types(rewards.dtype, jnp.float32))
    size = summed(jnp.ones_like(rewards))
    alone = size == 1
    # From the smallest reward on, not from 0: the mean of equal rewards is then exact, and nothing is left of them.
    above = rewards - jax.ops.segment_min(rewards, group, groups)[group]
    centred = above - summed(above) / size
    if kind == "rloo":
        advantages = centred * size / jnp.where(alone, 1, size - 1)
    elif kind == "dr_grpo":
        advantages = centred
    else:
        spread = jnp.sqrt(summed(centred**2) / jnp.where(alone, 1, size - ddof))
        advantages = jnp.where(spread == 0, 0, centred / jnp.where(spread == 0, 1, spread + eps))
        rewards = rewards / (1 + eps)
    return jnp.where(alone, rewards, advantages)
