"""What the baselines share: checks, routing shares, groups of experts as one."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.puzzlemoe.layer import MoELayer, route_rows
from jaxlab.puzzlemoe.merging import ArrayLike
from jaxlab.puzzlemoe.statistics import ExpertStats, expert_stats


def check_target(layer: MoELayer, target_experts: int) -> None:
    """Raises ValueError unless 1 <= target_experts < N."""
    if not 1 <= target_experts < layer.num_experts:
        raise ValueError(f"target_experts must be in 1..{layer.num_experts - 1}, got {target_experts}")


def batches(layer: MoELayer, x: Float[ArrayLike, "b t d"]) -> Iterator[Array]:
    """The calibration batches, `[t, d]` each.

    Raises:
        ValueError: x is not `[B,T,d]` of this layer.
    """
    if x.ndim != 3 or x.shape[-1] != layer.router.shape[0]:
        raise ValueError(f"x must be [B, T, d] with d={layer.router.shape[0]}, got shape {x.shape}")
    return (jnp.asarray(rows) for rows in x)


def hits(layer: MoELayer, x: Float[ArrayLike, "b t d"]) -> Int[np.ndarray, " n"]:
    """How often each expert is among a token's k."""
    counts = np.zeros(layer.num_experts, np.int64)
    for rows in batches(layer, x):
        ids = np.asarray(_routed(layer, rows)[0])
        counts += np.bincount(ids.reshape(-1), minlength=layer.num_experts)
    return counts


_routed = jax.jit(route_rows)


def statistics(layer: MoELayer, x: Float[ArrayLike, "b t d"]) -> ExpertStats:
    """Statistics of the layer on the calibration batches, one call each."""
    per_batch = [
        expert_stats(rows, layer.gate, layer.up, _routed(layer, rows)[0], act=layer.act) for rows in batches(layer, x)
    ]
    if not per_batch:
        raise ValueError(f"x must hold at least one batch, got shape {x.shape}")
    return sum(per_batch[1:], start=per_batch[0])


def tie(layer: MoELayer, labels: Int[np.ndarray, " n"], weights: ArrayLike) -> MoELayer:
    """Every expert becomes the weighted mean of the experts with its label (plain, where their weights are all 0)."""
    names, index = np.unique(labels, return_inverse=True)
    groups = [np.flatnonzero(labels == name) for name in names]
    shares = []
    for members in groups:
        share = np.asarray(weights, np.float64)[members]
        shares.append(share / share.sum() if share.sum() > 0 else np.full(len(members), 1 / len(members)))

    def merged(w: ArrayLike) -> Array:
        w = jnp.asarray(w)
        means = [
            jnp.tensordot(jnp.asarray(share, jnp.float32), w[members].astype(jnp.float32), 1, precision="highest")
            for members, share in zip(groups, shares)
        ]
        return jnp.stack([mean.astype(w.dtype) for mean in means])[index]

    return dataclasses.replace(layer, gate=merged(layer.gate), up=merged(layer.up), down=merged(layer.down))


def keep(layer: MoELayer, experts: Int[ArrayLike, " m"]) -> MoELayer:
    """The layer with these experts alone; the other columns of the router are deleted."""
    chosen = np.asarray(experts)
    gate, up, down = (jnp.asarray(w)[chosen] for w in (layer.gate, layer.up, layer.down))
    router = jnp.asarray(layer.router)[:, chosen]
    top_k = min(layer.top_k, len(chosen))
    return dataclasses.replace(layer, router=router, gate=gate, up=up, down=down, top_k=top_k)
