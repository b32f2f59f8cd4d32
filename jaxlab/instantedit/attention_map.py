"""Where the edit may show: a mask from the cross-attention of the words that are edited."""

import math

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jaxlab.instantedit.config import MASK_TEMPERATURE


def mask_threshold(threshold: ArrayLike, alpha_bar: ArrayLike) -> Float[Array, ""]:
    """`max(threshold, 0.15 / sqrt(alpha_bar))`: a mask is smaller while there is more noise."""
    return jnp.maximum(jnp.float32(threshold), MASK_TEMPERATURE / jnp.sqrt(jnp.float32(alpha_bar)))


def map_factor(tokens: int, size: tuple[int, int]) -> int:
    """How many times smaller than the latents, each way, the image is whose pixels attend.

    Raises:
      ValueError: there is no such whole number.
    """
    height, width = size
    factor = math.isqrt(height * width // tokens) if tokens else 0
    if not factor or height % factor or width % factor or height * width != tokens * factor**2:
        raise ValueError(f"probs: {tokens} query tokens are no whole fraction of latents {height}x{width}")
    return factor


def blend_mask(
    probs: Float[Array | np.ndarray, "L T S"],
    word_weights: Float[Array | np.ndarray, " S"],
    target_length: ArrayLike,
    alpha_bar: ArrayLike,
    *,
    threshold: ArrayLike = 0.4,
    size: tuple[int, int] = (64, 64),
) -> Bool[Array, "h w"]:
    """Pixels of the latents whose attention to an edited word is above a part of its maximum.

    The maps are averaged first; then each pixel takes its largest weighted word.

    Args:
      probs: attention of T pixels to S words, means over heads, of L layers and branches.
      word_weights: of `word_weights`.
      target_length: tokens of the target prompt with begin and end, which do not count.
      alpha_bar: cumulated alpha of the step's time.
      threshold: the least part of the maximum; see `mask_threshold`.
      size: (h, w) of the latents; each map is repeated to it.

    Returns:
      All False where no word has weight.

    Raises:
      ValueError: probs or weights of another shape, T is no whole fraction of the size, or a negative threshold on the
        host.
    """
    if np.ndim(probs) != 3:
        raise ValueError(f"probs: expected [L, T, S], got {np.shape(probs)}")
    if np.shape(word_weights) != probs.shape[2:]:
        raise ValueError(f"word_weights: expected one for each of {probs.shape[2]} words, got {np.shape(word_weights)}")
    if isinstance(threshold, int | float | np.floating) and not threshold >= 0:
        raise ValueError(f"threshold: expected a number of at least 0, got {threshold}")
    factor = map_factor(probs.shape[1], size)
    place = jnp.arange(probs.shape[2])
    kept = (place >= 1) & (place < jnp.asarray(target_length) - 1)
    words = jnp.mean(jnp.asarray(probs, jnp.float32), axis=0) * jnp.where(kept, word_weights, 0)
    strength = jnp.max(words, axis=-1).reshape(size[0] // factor, size[1] // factor)
    peak = jnp.max(strength)
    mask = strength / jnp.where(peak > 0, peak, 1) > mask_threshold(threshold, alpha_bar)
    return jnp.repeat(jnp.repeat(mask & (peak > 0), factor, axis=0), factor, axis=1)
