"""The clipped policy objective, its KL penalty, and how token losses become one number.

Everything is a `Mean`, two sums, until the last moment: a mean of masked means is not the mean, whereas sums of the
pieces of a batch add up. `policy_terms` is what a trainer accumulates, `policy_loss` its value for one batch.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Real

from jaxlab.rl.config import AGGREGATIONS, KL_KINDS, Aggregation, check_choice, check_clip

_EXPONENT = 20.0  # log-ratios are clamped to this before exp (verl)
_K3_BOUND = 10.0  # and the k3 estimate to this

Tokens = Float[Array | np.ndarray, "B T"]
Mask = Real[Array | np.ndarray, "B T"] | Bool[Array | np.ndarray, "B T"]


@struct.dataclass
class Mean:
    """A weighted mean as two scalars that add up over pieces and shards: `total / weight`, 0 where the weight is 0."""

    total: Any
    weight: Any

    @property
    def value(self) -> Float[Array, ""]:
        """The mean."""
        some = self.weight > 0
        return jnp.where(some, self.total / jnp.where(some, self.weight, 1), 0)


def _floats(name: str, values: Any, like: tuple[str, Array] | None = None) -> Array:
    """At least f32, `[B, T]`, of the shape of the array named in `like`."""
    values = jnp.asarray(values)
    if values.ndim != 2:
        raise ValueError(f"{name}: expected shape [B, T], got {values.shape}")
    if like is not None and values.shape != like[1].shape:
        raise ValueError(f"{name}: expected the shape of {like[0]}, {like[1].shape}, got {values.shape}")
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def kl_penalty(logp: Tokens, ref_logp: Tokens, kind: Literal["k1", "k2", "k3"] = "k3") -> Float[Array, "B T"]:
    """Estimates of KL(policy, reference) for each token, from log-probabilities of tokens that the policy drew.

    With d = ref_logp - logp (Schulman, "Approximating KL divergence", 2020): k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1.
    In k3 d is clamped to +-20 and the result to 10, as in verl; TRL clamps neither.

    Raises:
      ValueError: shapes that differ, or an unknown `kind`.
    """
    check_choice("kind", kind, KL_KINDS)
    logp = _floats("logp", logp)
    difference = _floats("ref_logp", ref_logp, ("logp", logp)) - logp
    if kind == "k1":
        return -difference
    if kind == "k2":
        return difference**2 / 2
    difference = jnp.clip(difference, -_EXPONENT, _EXPONENT)
    return jnp.minimum(jnp.expm1(difference) - difference, _K3_BOUND)


def masked_mean(values: Tokens, mask: Mask, mode: Aggregation = "token-mean", *, max_length: int | None = None) -> Mean:
    """`aggregate` as sums, which add up over micro-batches and shards.

    The weight is the number of tokens for `token-mean`, otherwise that of rows with a token.
    """
    check_choice("mode", mode, AGGREGATIONS)
    length = 1
    if mode == "seq-mean-token-sum-norm":
        if max_length is None or max_length < 1:
            raise ValueError(f"max_length: expected at least 1 with {mode!r}, got {max_length}")
        length = max_length
    values = _floats("values", values)
    mask = _floats("mask", mask, ("values", values)).astype(values.dtype)
    values = jnp.where(mask != 0, values, 0) * mask  # NaN * 0 is NaN
    if mode == "token-mean":
        return Mean(jnp.sum(values), jnp.sum(mask))
    rows = jnp.any(mask != 0, axis=1)
    if mode == "seq-mean-token-mean":
        total = jnp.sum(jnp.sum(values, axis=1) / jnp.where(rows, jnp.sum(mask, axis=1), 1))
    else:
        total = jnp.sum(values) / length
    return Mean(total, jnp.sum(rows, dtype=values.dtype))


def aggregate(values: Tokens, mask: Mask, mode: Aggregation, *, max_length: int | None = None) -> Float[Array, ""]:
    """One number from token values: f32 (f64 for f64 values), 0 if everything is masked.

    | mode | |
    | --- | --- |
    | `token-mean` | mean over tokens (DAPO, arXiv 2503.14476) |
    | `seq-mean-token-mean` | mean over sequences of their token means (GRPO, arXiv 2402.03300) |
    | `seq-mean-token-sum-norm` | of their token sums / `max_length` (Dr. GRPO, arXiv 2503.20783) |
    | `seq-mean-token-sum` | of their token sums |

    Means over sequences leave out rows that are masked altogether, as verl does; TRL counts them.

    Args:
      values: one for each token; what is under mask 0 never matters, NaN included.
      mask: 1 (or True) for tokens that count, 0 for others.
      mode: as above.
      max_length: the constant length of `seq-mean-token-sum-norm`.

    Raises:
      ValueError: shapes that differ, an unknown `mode`, or no `max_length` where it is needed.
    """
    return masked_mean(values, mask, mode, max_length=max_length).value


def policy_terms(
    logp: Tokens,
    old_logp: Tokens,
    advantages: Float[Array | np.ndarray, " B"] | Tokens,
    mask: Mask,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
    aggregation: Aggregation = "token-mean",
    max_length: int | None = None,
    ref_logp: Tokens | None = None,
    beta: float = 0.0,
    kl: Literal["k1", "k2", "k3"] = "k3",
    entropy: Tokens | None = None,
    entropy_coef: float = 0.0,
    weights: Tokens | None = None,
) -> tuple[Mean, dict[str, Mean]]:
    """`policy_loss` as sums: those of the pieces of a batch, or of its shards, add up to those of the whole.

    A loss function for `make_pass` may return them as they are, which makes k micro-batches equal to one.

    Takes what `policy_loss` takes; the policy's `entropy` at each token, whose mean is one more metric and which
    `entropy_coef` rewards: `entropy_coef * entropy` is subtracted token by token before aggregation; and `weights`,
    constant factors of the tokens' surrogates (truncated importance sampling), not of KL and entropy.

    Returns:
      The loss, and the metrics as masked token means.
    """
    check_clip(epsilon, epsilon_high, dual_clip)
    check_choice("aggregation", aggregation, AGGREGATIONS)
    if not beta >= 0:
        raise ValueError(f"beta: expected a value >= 0, got {beta}")
    if beta > 0 and ref_logp is None:
        raise ValueError(f"ref_logp: expected log-probabilities of the reference with beta={beta}, got None")
    if entropy_coef and entropy is None:
        raise ValueError(f"entropy: expected an array with entropy_coef={entropy_coef}, got None")
    logp = _floats("logp", logp)
    like = ("logp", logp)
    mask = _floats("mask", mask, like)
    advantages = jnp.asarray(advantages)
    if advantages.shape not in (logp.shape, logp.shape[:1]):
        raise ValueError(f"advantages: expected shape {logp.shape[:1]} or {logp.shape}, got {advantages.shape}")
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], logp.shape)

    def constant(name, values):
        return jax.lax.stop_gradient(there(_floats(name, values, like)))

    def there(values):  # before any arithmetic, so that neither a NaN nor its gradient comes through
        return jnp.where(mask != 0, values, 0)

    logp = there(logp)
    old_logp, advantages = constant("old_logp", old_logp), constant("advantages", advantages)
    log_ratio = logp - old_logp
    ratio = jnp.exp(jnp.clip(log_ratio, -_EXPONENT, _EXPONENT))
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    clipped_low, clipped_high = (advantages < 0) & (ratio < low), (advantages > 0) & (ratio > high)
    # The paper's min(), as a choice: at a tie the gradient is that of the unclipped term, not half of it.
    bounded = jnp.where(clipped_high, high, jnp.where(clipped_low, low, ratio))
    if dual_clip is not None:
        bounded = jnp.where((advantages < 0) & (ratio > dual_clip), dual_clip, bounded)
    values = -bounded * advantages
    if weights is not None:
        values = values * constant("weights", weights)
    metrics = {
        "clip_fraction": clipped_low | clipped_high,
        "clip_fraction_low": clipped_low,
        "clip_fraction_high": clipped_high,
        "approx_kl": -log_ratio,
    }
    if ref_logp is not None:
        metrics["kl"] = kl_penalty(logp, constant("ref_logp", ref_logp), kl)
        values = values + beta * metrics["kl"]
    if entropy is not None:
        metrics["entropy"] = there(_floats("entropy", entropy, like))
        values = values - entropy_coef * metrics["entropy"]
    means = {name: masked_mean(value.astype(values.dtype), mask) for name, value in metrics.items()}
    return masked_mean(values, mask, aggregation, max_length=max_length), jax.lax.stop_gradient(means)


def policy_loss(
    logp: Tokens,
    old_logp: Tokens,
    advantages: Float[Array | np.ndarray, " B"] | Tokens,
    mask: Mask,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
    aggregation: Aggregation = "token-mean",
    max_length: int | None = None,
    ref_logp: Tokens | None = None,
    beta: float = 0.0,
    kl: Literal["k1", "k2", "k3"] = "k3",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The clipped surrogate of PPO (arXiv 1707.06347) on group-relative advantages, with an optional KL penalty.

    A token's loss is -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) with rho = exp(logp - old_logp), the
    exponent clamped to +-20. Gradients flow through `logp` alone. Where rho is 1 and advantages are centred the loss is
    about 0 and its gradient is not: watch reward and gradient norm, not the loss.

    Args:
      logp: log-probabilities of the tokens under the policy.
      old_logp: under the policy that drew them.
      advantages: of each sequence or of each token.
      mask: 1 (or True) for completion tokens, 0 for others. Values under 0 never matter, NaN included.
      epsilon: clip range below 1.
      epsilon_high: and above; None: the same.
      dual_clip: c > 1 bounds the loss by -c A where A < 0 (arXiv 1912.09729; verl: 3); None: no bound.
      aggregation: mode of `aggregate`.
      max_length: for `seq-mean-token-sum-norm`.
      ref_logp: log-probabilities under the reference policy.
      beta: weight of the KL penalty, added token by token before aggregation.
      kl: its kind (`kl_penalty`).

    Returns:
      The loss, f32 (f64 for f64 `logp`; 0 with gradient 0 if everything is masked), and masked token means:
      `clip_fraction` (tokens where the clip is in force), its parts `clip_fraction_low` and `clip_fraction_high`,
      `approx_kl` = mean of old_logp - logp, and `kl` where there is a `ref_logp`.

    Raises:
      ValueError: shapes that differ, `epsilon` outside [0, 1), `dual_clip` not above 1, a negative `beta`, `beta`
        without `ref_logp`, an unknown name, or no `max_length` where it is needed.
    """
    loss, metrics = policy_terms(
        logp,
        old_logp,
        advantages,
        mask,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        dual_clip=dual_clip,
        aggregation=aggregation,
        max_length=max_length,
        ref_logp=ref_logp,
        beta=beta,
        kl=kl,
    )
    return loss.value, {name: mean.value for name, mean in metrics.items()}
