"""Weights pruned by magnitude times activation norm (Wanda, arXiv:2306.11695); experts only."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from jaxlab.puzzlemoe.baselines.common import batches, check_target, statistics
from jaxlab.puzzlemoe.layer import MoELayer
from jaxlab.puzzlemoe.merging import ArrayLike, check_norms, check_weights
from jaxlab.puzzlemoe.statistics import ExpertStats, expert_norms


def wanda_mask(
    weight: Float[ArrayLike, "k out"],
    n: Float[ArrayLike, " k"],
    *,
    sparsity: float = 0.5,
    pattern: tuple[int, int] | None = None,
) -> Bool[Array, "k out"]:
    """Which weights stay, by the score `|weight| * n`.

    Without a pattern each output loses its floor(sparsity * K) lowest inputs; of equal scores, the earlier input.

    Args:
        weight: input axis first.
        n: norm of each input channel.
        sparsity: share of the weights to prune, in [0, 1).
        pattern: (2, 4) keeps the 2 highest of every 4 consecutive inputs instead.

    Raises:
        ValueError: shapes disagree, norms are negative or not finite, sparsity or pattern out of range, or K is not a
            multiple of the pattern's length.
        TypeError: weights of integers or of 8 bits.
    """
    check_weights("weight", weight)
    if weight.ndim != 2 or n.shape != weight.shape[:1]:
        raise ValueError(f"expected weight [K, out] and n [K], got shapes {weight.shape} and {n.shape}")
    check_norms("n", n)
    rows, columns = weight.shape
    score = jnp.abs(jnp.asarray(weight).astype(jnp.float32)) * jnp.asarray(n, jnp.float32)[:, None]
    if pattern is None:
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
        return _rank(score, axis=0) >= int(sparsity * rows)
    kept, length = pattern
    if not 1 <= kept <= length:
        raise ValueError(f"pattern must be (kept, of) with 1 <= kept <= of, got {pattern}")
    if rows % length:
        raise ValueError(f"pattern {pattern} needs an input axis that is a multiple of {length}, got {rows}")
    grouped = score.reshape(rows // length, length, columns)
    return (_rank(grouped, axis=1) >= length - kept).reshape(rows, columns)


def _rank(score: Array, axis: int) -> Array:
    """Place of each score in ascending order; equal ones in the order of the axis."""
    return jnp.argsort(jnp.argsort(score, axis=axis, stable=True), axis=axis)


def wanda(
    layer: MoELayer,
    x: Float[ArrayLike, "b t d"],
    layer_stats: ExpertStats | None,
    target_experts: int,
    *,
    pairs: Integer[ArrayLike, "p 2"] | None = None,
    seed: int = 0,
) -> MoELayer:
    """Prunes the share 1 - target_experts / N of every expert's weights; no expert goes."""
    check_target(layer, target_experts)
    return _prune(layer, x, layer_stats, sparsity=1 - target_experts / layer.num_experts)


def wanda_2_4(
    layer: MoELayer,
    x: Float[ArrayLike, "b t d"],
    layer_stats: ExpertStats | None,
    target_experts: int,
    *,
    pairs: Integer[ArrayLike, "p 2"] | None = None,
    seed: int = 0,
) -> MoELayer:
    """Prunes 2 of every 4 weights along the input axis, whatever `target_experts` is."""
    check_target(layer, target_experts)
    return _prune(layer, x, layer_stats, pattern=(2, 4))


def _prune(layer: MoELayer, x: ArrayLike, layer_stats: ExpertStats | None, **how) -> MoELayer:
    batches(layer, x)
    n_in, n_mid = expert_norms(statistics(layer, x) if layer_stats is None else layer_stats, "calls")

    def pruned(matrix: ArrayLike, norms: Array) -> Array:
        matrix = jnp.asarray(matrix)
        return jnp.stack([jnp.where(wanda_mask(w, n, **how), w, 0) for w, n in zip(matrix, norms)])

    gate, up, down = pruned(layer.gate, n_in), pruned(layer.up, n_in), pruned(layer.down, n_mid)
    return dataclasses.replace(layer, gate=gate, up=up, down=down)
