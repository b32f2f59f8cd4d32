"""Experts removed with their router columns: at random (the floor), or those missed least (NAEE, arXiv:2402.14800)."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from jaxlab.puzzlemoe.baselines.common import batches, check_target, keep
from jaxlab.puzzlemoe.layer import MoELayer, expert_outputs, route_rows
from jaxlab.puzzlemoe.merging import ArrayLike
from jaxlab.puzzlemoe.statistics import ExpertStats

MAX_SUBSETS = 20_000
"""More subsets than this are not enumerated."""

# Subsets whose errors come back to the host at a time.
_CHUNK = 512


def drop(
    layer: MoELayer,
    x: Float[ArrayLike, "b t d"],
    layer_stats: ExpertStats | None,
    target_experts: int,
    *,
    pairs: Integer[ArrayLike, "p 2"] | None = None,
    seed: int = 0,
) -> MoELayer:
    """Keeps `target_experts` experts drawn at random."""
    batches(layer, x)
    check_target(layer, target_experts)
    drawn = jax.random.permutation(jax.random.key(seed), layer.num_experts)[:target_experts]
    return keep(layer, np.sort(drawn))


def naee(
    layer: MoELayer,
    x: Float[ArrayLike, "b t d"],
    layer_stats: ExpertStats | None,
    target_experts: int,
    *,
    pairs: Integer[ArrayLike, "p 2"] | None = None,
    seed: int = 0,
) -> MoELayer:
    """Drops the experts whose absence changes the layer's output least, see `naee_search`."""
    check_target(layer, target_experts)
    _, _, best = naee_search(layer, x, layer.num_experts - target_experts)
    return keep(layer, np.setdiff1d(np.arange(layer.num_experts), best))


def naee_search(
    layer: MoELayer, x: Float[ArrayLike, "b t d"], num_drop: int
) -> tuple[Int[np.ndarray, "c m"], Float[np.ndarray, " c"], Int[np.ndarray, " m"]]:
    """Output error of the layer without each subset of `num_drop` experts (NAEE, arXiv:2402.14800, section 3.2).

    Dropped experts have router logit -inf, before the softmax and top-k. The outputs of all experts on one batch are
    held at a time, `[N,T,d]` float32.

    Args:
        layer: as trained.
        x: calibration batches.
        num_drop: experts to drop, 1..N-1.

    Returns:
        All subsets in lexicographic order; the loss of each, float64: the sum over batches of the Frobenius norm of
        what the output lacks; and the subset with the smallest loss (of equal ones, the first).

    Raises:
        ValueError: `num_drop` out of range, more than `MAX_SUBSETS` subsets, or x is not `[B,T,d]` of this layer.
    """
    total = layer.num_experts
    if not 1 <= num_drop < total:
        raise ValueError(f"num_drop must be in 1..{total - 1}, got {num_drop}")
    count = math.comb(total, num_drop)
    if count > MAX_SUBSETS:
        raise ValueError(
            f"{num_drop} of {total} experts make {count} subsets, more than the {MAX_SUBSETS} tried at most"
        )
    subsets = np.array(list(itertools.combinations(range(total), num_drop)), np.int32)
    dropped = np.zeros((count, total), bool)
    dropped[np.arange(count)[:, None], subsets] = True
    losses = np.zeros(count)
    for rows in batches(layer, x):
        outputs = expert_outputs(rows, layer.gate, layer.up, layer.down, layer.act)
        for start in range(0, count, _CHUNK):
            part = slice(start, start + _CHUNK)
            errors = np.asarray(_squared_errors(layer, rows, outputs, dropped[part]), np.float64)
            losses[part] += np.sqrt(errors.sum(axis=1))
    return subsets, losses, subsets[np.argmin(losses)]


@jax.jit
def _squared_errors(layer: MoELayer, rows: Array, outputs: Array, dropped: Array) -> Float[Array, "c t"]:
    def shares(mask):
        ids, weights = route_rows(layer, rows, mask)
        return jnp.sum(jnp.where(ids[..., None] == jnp.arange(layer.num_experts), weights[..., None], 0.0), axis=1)

    full = shares(jnp.zeros(layer.num_experts, bool))

    def one(mask):
        change = jnp.einsum("tn,ntd->td", shares(mask) - full, outputs, precision="highest")
        return jnp.sum(jnp.square(change), axis=-1)

    return jax.lax.map(one, dropped)
