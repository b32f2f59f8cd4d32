"""Sum of squares and finiteness of a gradient bucket: what a global-norm clip and a loss scaler ask for, in one pass.

>>> import jax.numpy as jnp
>>> from pallas_kernels.grad_stats import grad_stats
>>> sum_sq, finite = grad_stats(jnp.array([3.0, 4.0]))
>>> float(sum_sq), bool(finite)
(25.0, True)
"""

from pallas_kernels.grad_stats.api import grad_stats

__all__ = ["grad_stats"]
