"""The public statistics: checks and choice of implementation."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import Implementation, check_names, dispatch, implementations
from pallas_kernels.grad_stats import reference, triton, xla

AnyArray = Array | np.ndarray
_OP = "grad_stats"
_TABLE = implementations(reference.stats, xla.stats, triton.stats)


def grad_stats(
    g: Float[AnyArray, " n"], *, implementation: Implementation = None
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """Sum of the squares of a flat gradient, float32, and whether all of it is finite.

    The order of the sum depends on n alone, so that equal gradients give equal bits. Squares of finite elements beyond
    1.8e19 overflow: the sum is then infinite and `finite` still true.

    Args:
      g: gradients, any floating dtype; squared and summed in float32.
      implementation: None (by platform), "reference", "xla", "triton", or "interpret".

    Raises:
      ValueError: a rank other than 1, an unknown name.
      TypeError: g not floating.
      NotImplementedError: an implementation that cannot run on this platform.
    """
    g = jnp.asarray(g)
    if not jnp.issubdtype(g.dtype, jnp.floating):
        raise TypeError(f"g must be floating, got {g.dtype}")
    if g.ndim != 1:
        raise ValueError(f"g must have rank 1, got shape {g.shape}")
    check_names(_OP, _TABLE, implementation)
    return dispatch(_OP, _TABLE, implementation, g)
