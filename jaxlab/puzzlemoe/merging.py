"""Two experts in one: a shared magnitude, and for each a mask and a sign (PuzzleMoE, arXiv:2511.04805, section 3).

All of it is elementwise and in float32, so it commutes with any sharding, batching or slicing of the weights. Each
public function is one compiled program, in which nothing of the weights' size is stored in between.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Integer

from jaxlab.puzzlemoe.config import check_tau

ArrayLike = Array | np.ndarray


@struct.dataclass
class MergedPair:
    """Two weight tensors merged position by position; member 0 is i, member 1 is j.

    Attributes:
        mag: `[*shape]` bfloat16, the shared magnitude, never negative.
        mask_i: `[*shape]` bool, whether expert i uses the magnitude; where it does not, its weight is 0.
        mask_j: the same for expert j. At least one of the two is set.
        sign_i: `[*shape]` bool, whether the weight of expert i is negative.
        sign_j: the same for expert j.
    """

    mag: Any
    mask_i: Any
    mask_j: Any
    sign_i: Any
    sign_j: Any


def similarity_mask(
    w_i: Float[ArrayLike, "*shape"], w_j: Float[ArrayLike, "*shape"], tau: float | Float[ArrayLike, ""] = 0.4
) -> Bool[Array, "*shape"]:
    """Where two weights are close enough in magnitude to share their mean: `|a - b| <= tau (a + b)`, ties included.

    Args:
        w_i: weights of one expert, any floating dtype of 16 bits or more; compared in float32.
        w_j: weights of the other.
        tau: 0 lets only equal magnitudes share, 1 all.

    Raises:
        ValueError: the shapes differ, or tau is outside [0, 1].
        TypeError: weights of integers or of 8 bits.
    """
    _check(w_i, w_j, tau)
    return _similar(w_i, w_j, _single(tau))


def dual_mask_merge(
    w_i: Float[ArrayLike, "*shape"],
    w_j: Float[ArrayLike, "*shape"],
    n_i: Float[ArrayLike, " k"] | None = None,
    n_j: Float[ArrayLike, " k"] | None = None,
    *,
    tau: float | Float[ArrayLike, ""] = 0.4,
    axis: int = -2,
) -> MergedPair:
    """Merges the weights of two experts (arXiv:2511.04805, section 3.2).

    Similar magnitudes become their mean, used by both; elsewhere the more salient one stays, used by its owner alone,
    and the other expert's weight becomes 0. Saliency is the magnitude times the norm of the input channel.

    Args:
        w_i: weights of expert i, any floating dtype of 16 bits or more; the merge is in float32.
        w_j: weights of expert j.
        n_i: norms of expert i's input channels, see `expert_norms`; None = ones.
        n_j: the same for expert j.
        tau: see `similarity_mask`.
        axis: input axis of the weights: -2 in this library, -1 in Hugging Face's files.

    Raises:
        ValueError: the shapes differ, a norm does not fit the axis, concrete norms are negative or not finite, or tau
            is outside [0, 1].
        TypeError: weights of integers or of 8 bits.
    """
    _check(w_i, w_j, tau)
    return _merge(w_i, w_j, *(_column(*norm, w_i, axis) for norm in (("n_i", n_i), ("n_j", n_j))), _single(tau))


@jax.jit
def _merge(w_i: Array, w_j: Array, scale_i: Array | None, scale_j: Array | None, tau: Array) -> MergedPair:
    a, b = _magnitudes(w_i, w_j)
    similar = _similar(w_i, w_j, tau)
    first = (a if scale_i is None else a * scale_i) >= (b if scale_j is None else b * scale_j)  # a tie goes to i
    mag = jnp.where(similar, (a + b) / 2, jnp.where(first, a, b))
    return MergedPair(mag.astype(jnp.bfloat16), first | similar, ~first | similar, w_i < 0, w_j < 0)


def reconstruct(pair: MergedPair, pos: int | Integer[ArrayLike, "*n"]) -> Float[Array, "*shape"]:
    """The weights of one member of a pair, bfloat16.

    Args:
        pair: of `dual_mask_merge`.
        pos: 0 for expert i, 1 for expert j; may be traced.

    Raises:
        ValueError: a concrete `pos` that is neither 0 nor 1.
    """
    check_pos(pos)
    return _reconstruct(pair, pos)


@jax.jit
def _reconstruct(pair: MergedPair, pos: Array) -> Array:
    mask, sign = jnp.where(pos == 0, pair.mask_i, pair.mask_j), jnp.where(pos == 0, pair.sign_i, pair.sign_j)
    used = mask & (pair.mag != 0)  # a zero has no sign, as in packed words
    return jnp.where(used, jnp.where(sign, -pair.mag, pair.mag), jnp.zeros_like(pair.mag))


def check_pos(pos: Any) -> None:
    """Raises ValueError for a concrete position in a pair that is neither 0 nor 1."""
    if not isinstance(pos, jax.core.Tracer) and not np.isin(np.asarray(pos), (0, 1)).all():
        raise ValueError(f"pos must be 0 or 1, got {pos}")


def check_weights(name: str, weights: Any) -> None:
    """Raises TypeError for weights that are integers or have 8 bits: their scales are not known here."""
    dtype = jnp.result_type(weights)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise TypeError(f"{name} must be floating with 16 bits or more (de-quantise it first), got {dtype}")


def _check(w_i: ArrayLike, w_j: ArrayLike, tau: Any) -> None:
    check_weights("w_i", w_i)
    check_weights("w_j", w_j)
    if w_i.shape != w_j.shape:
        raise ValueError(f"w_i and w_j must have one shape, got {w_i.shape} and {w_j.shape}")
    if not isinstance(tau, jax.core.Tracer):
        check_tau(tau)


def _single(tau: Any) -> Array:
    """Tau in float32: against a float64 0.4 every tie (a/b = 7/3) would fall out."""
    return jnp.asarray(tau, jnp.float32)


@jax.jit
def _similar(w_i: Array, w_j: Array, tau: Array) -> Array:
    a, b = _magnitudes(w_i, w_j)
    # As a product there is no 0/0. Not `<=`: where a weight is NaN the mean is too, and `pack_pair` sees it.
    return ~(jnp.abs(a - b) > tau * (a + b))


def _magnitudes(w_i: Array, w_j: Array) -> tuple[Array, Array]:
    return jnp.abs(w_i.astype(jnp.float32)), jnp.abs(w_j.astype(jnp.float32))


def _column(name: str, norm: ArrayLike | None, weights: ArrayLike, axis: int) -> Array | None:
    """A norm in float32, shaped to multiply the weights along their input axis."""
    if norm is None:
        return None
    if not -weights.ndim <= axis < weights.ndim:
        raise ValueError(f"axis {axis} is not one of weights of shape {weights.shape}")
    size = weights.shape[axis]
    if norm.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), axis {axis} of the weights, got {norm.shape}")
    check_norms(name, norm)
    return jnp.asarray(norm, jnp.float32).reshape(-1, *[1] * (weights.ndim - 1 - axis % weights.ndim))


def check_norms(name: str, norms: Any) -> None:
    """Raises ValueError for concrete norms that are negative or not finite."""
    if isinstance(norms, jax.core.Tracer):
        return
    bad = ~(np.isfinite(norms) & (np.asarray(norms) >= 0))
    if bad.any():
        raise ValueError(f"{name} must be finite and not negative, got {bad.sum()} of {bad.size} that are not")
