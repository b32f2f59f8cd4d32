"""Which experts a token visits, with what weight, and which of those slots stay (X-MoE sections 2.1 and 2.2).

Token t's j-th choice is slot t * k + j. Everything is float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxlab.xmoe.config import MoEConfig, expert_capacity

ArrayLike = Array | np.ndarray

_SIGMOID = ("sigmoid", "sigmoid_scores")


@struct.dataclass
class Routing:
    """The router's decision for S tokens.

    Attributes:
        expert_ids: `[S,k]` int32, by falling score.
        weights: `[S,k]` float32 combine weights; 0 where dropped.
        keep: `[S,k]` bool, the slots that stay.
        aux_loss: load-balancing loss before dropping, unscaled: 1 at perfect balance.
        z_loss: mean squared logsumexp of the logits, unscaled.
        capacity: slots an expert takes of this device; None where nothing is dropped. Static.
    """

    expert_ids: Any
    weights: Any
    keep: Any
    aux_loss: Any
    z_loss: Any
    capacity: int | None = struct.field(pytree_node=False, default=None)


def top_k_gating(
    logits: Float[ArrayLike, "s e"],
    cfg: MoEConfig,
    *,
    train: bool,
    selection_bias: Float[ArrayLike, " e"] | None = None,
) -> Routing:
    """Chooses k experts a token, weighs them, and drops what exceeds the experts' capacity.

    Equal scores go to the lower expert, and at a full expert to the lower slot. NaN logits give NaN weights and losses,
    but experts in range.

    Args:
        logits: router outputs.
        cfg: the layer.
        train: chooses `capacity_factor` over `eval_capacity_factor`.
        selection_bias: added to the sigmoid scores for the choice only ("sigmoid"; DeepSeek-V3, arXiv:2412.19437).

    Raises:
        ValueError: logits are not `[S, num_experts]`; a selection bias of another shape or without "sigmoid".
        TypeError: logits are not floating.
    """
    logits = jnp.asarray(logits)
    experts, k = cfg.num_experts, cfg.top_k
    if logits.ndim != 2 or logits.shape[1] != experts:
        raise ValueError(f"logits must be [S, num_experts={experts}], got shape {logits.shape}")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floating, got {logits.dtype}")
    if selection_bias is not None:
        if cfg.combine_weight not in _SIGMOID:
            raise ValueError(f"selection_bias needs combine_weight='sigmoid', got {cfg.combine_weight!r}")
        selection_bias = jnp.asarray(selection_bias)
        if selection_bias.shape != (experts,):
            raise ValueError(f"selection_bias must have shape {(experts,)}, got {selection_bias.shape}")
    logits = logits.astype(jnp.float32)
    tokens = logits.shape[0]

    if cfg.combine_weight in _SIGMOID:
        scores = jax.nn.sigmoid(logits)
        probs = scores / _at_least_epsilon(jnp.sum(scores, axis=-1, keepdims=True))
    else:
        probs = jax.nn.softmax(logits, axis=-1)
        scores = logits if cfg.combine_weight == "logits" else probs
    # Logits are ordered as their scores are, and keep the order where scores round to equal ones.
    choice = logits if selection_bias is None else scores + selection_bias.astype(jnp.float32)
    expert_ids = jax.lax.top_k(jax.lax.stop_gradient(choice), k)[1]
    picked = _pick(experts, scores, expert_ids)

    capacity, keep = None, jnp.ones((tokens, k), bool)
    if cfg.drop_policy != "none":
        factor = cfg.capacity_factor if train else cfg.eval_capacity_factor
        capacity = expert_capacity(tokens, experts, k, factor, cfg.min_capacity)
        rank_by = jax.lax.stop_gradient(picked) if cfg.drop_policy == "probs" else None
        keep = _ranks(expert_ids, rank_by, experts) < capacity

    weights = jnp.where(keep, picked, 0.0)
    if cfg.combine_weight in ("softmax_renorm", "sigmoid"):
        weights = weights / _at_least_epsilon(jnp.sum(weights, axis=-1, keepdims=True))
    aux_loss = _balance_loss(probs, expert_ids)
    z_loss = jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2) / max(tokens, 1)
    return Routing(expert_ids, weights, keep, aux_loss, z_loss, capacity)


def router_loss(metrics: Any, cfg: MoEConfig) -> Float[Array, ""]:
    """aux_loss_coef * aux_loss + z_loss_coef * z_loss of a layer's metrics: what a training loss adds."""
    return cfg.aux_loss_coef * metrics.aux_loss + cfg.z_loss_coef * metrics.z_loss


def _at_least_epsilon(x: Array) -> Array:
    return jnp.maximum(x, jnp.finfo(x.dtype).eps)


def _balance_loss(probs: Float[Array, "s e"], expert_ids: Int[Array, "s k"]) -> Float[Array, ""]:
    """mean_e(mean_t probs * mean_t mask) * E^2 / k with the mask of all k choices; 0 without tokens."""
    (tokens, experts), k = probs.shape, expert_ids.shape[1]
    chosen = expert_ids.reshape(-1)[:, None] == jnp.arange(experts, dtype=jnp.int32)
    load = jnp.sum(chosen, axis=0, dtype=jnp.float32)
    return jnp.sum(jnp.sum(probs, axis=0) * load) * (experts / k / max(tokens, 1) ** 2)


def _ranks(expert_ids: Int[Array, "s k"], scores: Float[Array, "s k"] | None, experts: int) -> Int[Array, "s k"]:
    """How many slots of the same expert come before each slot: by falling score, or by index where scores is None."""
    slots = expert_ids.size
    flat = expert_ids.reshape(-1)
    index = jnp.arange(slots, dtype=jnp.int32)
    keys = (flat, index) if scores is None else (flat, -scores.reshape(-1), index)
    ordered, *_, order = jax.lax.sort(keys, num_keys=len(keys) - 1, is_stable=True)
    first = jnp.searchsorted(ordered, jnp.arange(experts, dtype=jnp.int32), side="left").astype(jnp.int32)
    ranks = jnp.zeros(slots, jnp.int32).at[order].set(index - first[ordered], unique_indices=True)
    return ranks.reshape(expert_ids.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pick(experts: int, scores: Float[Array, "s e"], expert_ids: Int[Array, "s k"]) -> Float[Array, "s k"]:
    """scores[t, expert_ids[t, j]]; the transpose compares with the expert's index where JAX would scatter."""
    return jnp.take_along_axis(scores, expert_ids, axis=1)


def _pick_forward(experts, scores, expert_ids):
    return _pick(experts, scores, expert_ids), expert_ids


def _pick_backward(experts, expert_ids, grads):
    hit = expert_ids[:, :, None] == jnp.arange(experts, dtype=jnp.int32)
    return jnp.sum(jnp.where(hit, grads[:, :, None], 0.0), axis=1), None


_pick.defvjp(_pick_forward, _pick_backward)
