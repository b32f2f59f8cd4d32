"""Groups of experts as one: by outputs (HC-SMoE, arXiv:2410.08589) or router (M-SMoE, arXiv:2310.01334)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Integer

from jaxlab.puzzlemoe.baselines.common import batches, check_target, hits, tie
from jaxlab.puzzlemoe.config import check_name
from jaxlab.puzzlemoe.layer import MoELayer, expert_outputs, router_logits
from jaxlab.puzzlemoe.merging import ArrayLike
from jaxlab.puzzlemoe.statistics import ExpertStats

LINKAGES = ("average", "single", "complete", "ward")


def hc_labels(features: Float[ArrayLike, "n h"], num_groups: int, *, linkage: str = "average") -> Int[np.ndarray, " n"]:
    """Agglomerative clustering by Euclidean distance: the two nearest groups become one until `num_groups` are left.

    Args:
        features: one row an expert; computed in float64.
        num_groups: 1..N.
        linkage: the distance of two groups is the "average", smallest ("single") or largest ("complete") distance of
            their members, or "ward": n_i n_j / (n_i + n_j) times the distance of their means (not squared, as in the
            method's code).

    Returns:
        The group of each row, numbered in the order of their first members.

    Raises:
        ValueError: `num_groups` out of range, unknown linkage, features that are not finite.
    """
    check_name("linkage", linkage, LINKAGES)
    points = np.asarray(features, np.float64)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise ValueError(f"features must be a finite [N, h] array, got shape {points.shape}")
    if not 1 <= num_groups <= len(points):
        raise ValueError(f"num_groups must be in 1..{len(points)}, got {num_groups}")
    groups = [[index] for index in range(len(points))]
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
    far = apart.copy() if linkage != "ward" else apart / 2  # 1 * 1 / (1 + 1)
    np.fill_diagonal(far, np.inf)
    while len(groups) > num_groups:
        a, b = sorted(np.unravel_index(np.argmin(far), far.shape))
        groups[a] += groups.pop(b)
        far = np.delete(np.delete(far, b, axis=0), b, axis=1)
        row = [
            np.inf if i == a else _distance(points, apart, groups[a], group, linkage) for i, group in enumerate(groups)
        ]
        far[a], far[:, a] = row, row
    labels = np.empty(len(points), int)
    for label, group in enumerate(groups):  # a group keeps the place of its first member
        labels[group] = label
    return labels


def _distance(points: np.ndarray, apart: np.ndarray, a: list[int], b: list[int], linkage: str) -> float:
    if linkage == "ward":
        between = np.linalg.norm(points[a].mean(axis=0) - points[b].mean(axis=0))
        return float(len(a) * len(b) / (len(a) + len(b)) * between)
    reduce = {"average": np.mean, "single": np.min, "complete": np.max}[linkage]
    return float(reduce(apart[np.ix_(a, b)]))


def hc_smoe(
    layer: MoELayer,
    x: Float[ArrayLike, "b t d"],
    layer_stats: ExpertStats | None,
    target_experts: int,
    *,
    pairs: Integer[ArrayLike, "p 2"] | None = None,
    seed: int = 0,
) -> MoELayer:
    """Experts with similar mean outputs over all tokens become their mean, weighted by how often they are chosen."""
    check_target(layer, target_experts)
    features = np.zeros((layer.num_experts, layer.router.shape[0]))
    for rows in batches(layer, x):
        for expert in range(layer.num_experts):  # one at a time: the outputs of all do not fit large layers
            own = (layer.gate[expert][None], layer.up[expert][None], layer.down[expert][None])
            features[expert] += np.asarray(jnp.sum(expert_outputs(rows, *own, layer.act)[0], axis=0))
    features /= max(1, x.shape[0] * x.shape[1])
    return tie(layer, hc_labels(features, target_experts), hits(layer, x))


def m_smoe(
    layer: MoELayer,
    x: Float[ArrayLike, "b t d"],
    layer_stats: ExpertStats | None,
    target_experts: int,
    *,
    pairs: Integer[ArrayLike, "p 2"] | None = None,
    seed: int = 0,
) -> MoELayer:
    """The most chosen experts take in the others, each by the largest cosine of router logits over the tokens.

    A group becomes its mean, weighted by how often its members are chosen. Neurons are not permuted: the method's code
    has no alignment for gated experts.
    """
    check_target(layer, target_experts)
    counts = hits(layer, x)
    products = np.zeros((layer.num_experts, layer.num_experts))
    for rows in batches(layer, x):
        logits = np.asarray(router_logits(layer, rows), np.float64)
        products += logits.T @ logits
    length = np.sqrt(np.diag(products))
    similarity = products / np.maximum(np.outer(length, length), np.finfo(np.float64).tiny)
    dominant = np.sort(np.argsort(-counts, kind="stable")[:target_experts])
    labels = dominant[np.argmax(similarity[:, dominant], axis=1)]
    labels[dominant] = dominant
    return tie(layer, labels, counts)
