"""Distances as bins: of templates, and of the coordinates that the confidence head judges."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BINS = 39
_LOWER = np.linspace(3.25, 50.75, BINS, dtype=np.float32)  # Å; the last has no upper end


def distance_bins(x: Float[Array, "*batch n 3"]) -> Float[Array, "*batch n n 39"]:
    """Which of 39 bins, from 3.25 to 50.75 Å and beyond, holds the distance of two points; below 3.25 Å none does."""
    squares = jnp.sum(jnp.square(x[..., :, None, :] - x[..., None, :, :]), axis=-1)[..., None]
    lower, upper = _LOWER**2, np.append(_LOWER[1:] ** 2, np.float32(np.inf))
    return ((squares > lower) & (squares <= upper)).astype(jnp.float32)
