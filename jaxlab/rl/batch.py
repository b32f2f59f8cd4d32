"""What the passes of a step take: a rollout with advantages and old log-probabilities; and what the log says of it."""

from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Float, PyTree

from jaxlab.rl.config import GRPOConfig
from jaxlab.rl.rollout import Rollout


@struct.dataclass
class UpdateBatch:
    """B sequences: rows of arrays, sharded over a mesh's data axes.

    Attributes:
        inputs: for the log-prob function.
        mask: `[B,T]` float32.
        old_logps: `[B,T]` float32, of the policy that drew the tokens.
        advantages: `[B]` float32.
        weights: `[B,T]` float32 factors of the tokens' surrogates, None: 1.
        ref_logps: `[B,T]` float32 of the reference policy, None without one.
    """

    inputs: PyTree
    mask: Any
    old_logps: Any
    advantages: Any
    weights: Any
    ref_logps: Any


def loss_mask(rollout: Rollout, config: GRPOConfig) -> Float[np.ndarray, "B T"]:
    """1 at tokens that count in the loss."""
    kept = ~rollout.truncated[:, None] if config.mask_truncated else True
    return np.asarray(rollout.mask * kept, np.float32)


def shaped_rewards(rollout: Rollout, config: GRPOConfig) -> Float[np.ndarray, " B"]:
    """Rewards, less DAPO's soft penalty (arXiv 2503.14476, equation 13) for completions near the maximum length."""
    if not config.overlong_buffer:
        return rollout.rewards
    free = config.max_completion_length - config.overlong_buffer
    over = (rollout.mask.sum(axis=1) - free) / config.overlong_buffer
    return np.asarray(rollout.rewards - np.clip(over, 0.0, 1.0), np.float32)


def rollout_numbers(
    rollout: Rollout, rewards: Float[np.ndarray, " B"], mask: Float[np.ndarray, "B T"], group_size: int
) -> dict[str, float]:
    """What the log says of a batch: enough to answer why a loss is zero, or a run stands still.

    Args:
        rollout: the batch.
        rewards: shaped.
        mask: of the tokens that count.
        group_size: G.
    """
    groups = rewards.reshape(-1, group_size)
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(groups.std(axis=1).mean()),
        "zero_variance_fraction": float((groups.max(axis=1) == groups.min(axis=1)).mean()),
        "completion_length": float(rollout.mask.sum(axis=1).mean()),
        "truncated_fraction": float(rollout.truncated.mean()),
        "all_masked": float(not mask.any()),
    }
