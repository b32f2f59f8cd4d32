"""One Adam or AdamW step on a flat bucket: parameters and moments in place, and their 16-bit copy, in one pass.

>>> import jax.numpy as jnp
>>> from pallas_kernels.fused_adam import fused_adam
>>> p, zeros, g = jnp.ones(4), jnp.zeros(4), jnp.full(4, 2.0)
>>> new_p, new_m, new_v, cast = fused_adam(p, zeros, zeros, g, count=0, lr=0.25, b1=0.5)
>>> float(new_p[0]), float(new_m[0]), cast.dtype
(0.75, 1.0, dtype(bfloat16))
"""

from pallas_kernels.fused_adam.api import check_arrays, check_emit, fused_adam
from pallas_kernels.fused_adam.coefficients import (
    MODES,
    Coefficients,
    check_hyper,
    coefficients,
    rounded,
    runtime_zero,
)

__all__ = [
    "MODES",
    "Coefficients",
    "check_arrays",
    "check_emit",
    "check_hyper",
    "coefficients",
    "fused_adam",
    "rounded",
    "runtime_zero",
]
