"""Pairs of experts as one: the plain mean (the floor), and PuzzleMoE under the baselines' interface."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxlab.puzzlemoe.baselines.common import batches, check_target, tie
from jaxlab.puzzlemoe.compression import compress_experts, unpack_experts
from jaxlab.puzzlemoe.config import PuzzleConfig
from jaxlab.puzzlemoe.layer import MoELayer
from jaxlab.puzzlemoe.merging import ArrayLike, dual_mask_merge, reconstruct
from jaxlab.puzzlemoe.pairing import check_pairs, pair_norms, random_pairs
from jaxlab.puzzlemoe.statistics import ExpertStats


def average(
    layer: MoELayer,
    x: Float[ArrayLike, "b t d"],
    layer_stats: ExpertStats | None,
    target_experts: int,
    *,
    pairs: Integer[ArrayLike, "p 2"] | None = None,
    seed: int = 0,
) -> MoELayer:
    """Both members of a pair become their mean."""
    batches(layer, x)
    pairs = _pairs(layer, target_experts, pairs, seed)
    labels = np.arange(layer.num_experts)
    labels[pairs[:, 1]] = labels[pairs[:, 0]]
    return tie(layer, labels, np.ones(layer.num_experts))


def puzzle(
    layer: MoELayer,
    x: Float[ArrayLike, "b t d"],
    layer_stats: ExpertStats | None,
    target_experts: int,
    *,
    pairs: Integer[ArrayLike, "p 2"] | None = None,
    seed: int = 0,
) -> MoELayer:
    """PuzzleMoE with its default settings, packed and decoded again; without statistics, by magnitude."""
    batches(layer, x)
    pairs = _pairs(layer, target_experts, pairs, seed)
    packed = compress_experts(layer.gate, layer.up, layer.down, layer_stats, pairs, PuzzleConfig())
    weights = zip(unpack_experts(packed), (layer.gate, layer.up, layer.down))
    gate, up, down = (decoded.astype(original.dtype) for decoded, original in weights)
    return dataclasses.replace(layer, gate=gate, up=up, down=down)


def puzzle_unpacked(
    layer: MoELayer,
    x: Float[ArrayLike, "b t d"],
    layer_stats: ExpertStats | None,
    target_experts: int,
    *,
    pairs: Integer[ArrayLike, "p 2"] | None = None,
    seed: int = 0,
) -> MoELayer:
    """What `puzzle` merges, without passing through packed words: shows what packing costs."""
    batches(layer, x)
    cfg = PuzzleConfig()
    pairs = _pairs(layer, target_experts, pairs, seed)
    n_in, n_mid, weak = pair_norms(layer_stats, layer.gate.shape, cfg)

    def merged(w: ArrayLike, norms: ArrayLike) -> Array:
        w = jnp.asarray(w)
        for i, j in pairs:
            n_i, n_j = (None, None) if weak[i] or weak[j] else (norms[i], norms[j])
            pair = dual_mask_merge(w[i], w[j], n_i, n_j, tau=cfg.tau)
            w = w.at[np.array([i, j])].set(jnp.stack([reconstruct(pair, pos) for pos in (0, 1)]).astype(w.dtype))
        return w

    gate, up, down = (merged(w, n) for w, n in ((layer.gate, n_in), (layer.up, n_in), (layer.down, n_mid)))
    return dataclasses.replace(layer, gate=gate, up=up, down=down)


def _pairs(layer: MoELayer, target_experts: int, pairs: ArrayLike | None, seed: int) -> np.ndarray:
    check_target(layer, target_experts)
    total = layer.num_experts
    removed = total - target_experts
    if 2 * removed > total:
        raise ValueError(
            f"pairs leave at least {(total + 1) // 2} of {total} experts, got target_experts={target_experts}"
        )
    if pairs is None:
        return np.asarray(random_pairs(jax.random.key(seed), total, removed / total))
    given = check_pairs(pairs, total)
    if len(given) != removed:
        raise ValueError(f"target_experts={target_experts} of {total} needs {removed} pairs, got {len(given)}")
    return given
