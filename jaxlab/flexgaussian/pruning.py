"""Attribute-discriminative pruning (ADP, section 3.1 of the paper): whole Gaussians, then harmonics of others."""

import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.flexgaussian.scene import GaussianScene, checked, take

_TOLERANCE = 1e-9


def prune(
    scene: GaussianScene, scores: Float[Array | np.ndarray, " n"], prune_rate: float, sh_rate: float
) -> tuple[GaussianScene, Int[np.ndarray, " m"]]:
    """Drops the Gaussians of the lowest scores, and the higher harmonics of the next lowest.

    Ties go by the order of the scene.

    Args:
      scene: N Gaussians.
      scores: importance, not below 0, [N].
      prune_rate: the share that goes whole: floor(N prune_rate) Gaussians.
      sh_rate: the share whose higher harmonics become exact zeros: those of rank below floor(N (prune_rate + sh_rate)).

    Returns:
      The scene that is left, in its order, and the rows of the old one it has kept, rising.

    Raises:
      ValueError: rates out of range or together above 1; scores of another length, negative or not finite.
    """
    scene = checked(scene)
    count = scene.num_gaussians
    dropped, plain = counts(count, prune_rate, sh_rate)
    scores = np.asarray(scores)
    if scores.shape != (count,):
        raise ValueError(f"scores: expected shape ({count},), got {scores.shape}")
    wrong = np.flatnonzero(~(np.isfinite(scores) & (scores >= 0)))
    if len(wrong):
        raise ValueError(f"scores: expected finite numbers not below 0, got {scores[wrong[0]]} at {wrong[0]}")
    order = np.argsort(scores, kind="stable")
    harmonics = np.array(scene.shN)
    harmonics[order[dropped:plain]] = 0
    kept = np.sort(order[dropped:])
    return take(scene.replace(shN=harmonics), kept), kept


def counts(n: int, prune_rate: float, sh_rate: float) -> tuple[int, int]:
    """The ranks at which Gaussians begin to be kept, and to keep their harmonics.

    Raises:
      ValueError: 0 <= prune_rate < 1, 0 <= sh_rate and prune_rate + sh_rate <= 1 do not all hold.
    """
    if not 0 <= prune_rate < 1:
        raise ValueError(f"prune_rate: expected from 0 to below 1, got {prune_rate}")
    if not sh_rate >= 0 or prune_rate + sh_rate > 1 + _TOLERANCE:
        raise ValueError(f"sh_rate: expected from 0 to 1 - prune_rate = {1 - prune_rate:g}, got {sh_rate}")
    return int(n * prune_rate), min(int(n * (prune_rate + sh_rate)), n)
