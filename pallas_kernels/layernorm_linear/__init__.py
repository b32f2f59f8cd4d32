"""LayerNorm followed by a linear map, without the normalised rows ever being stored.

>>> import jax.numpy as jnp
>>> from pallas_kernels.layernorm_linear import layernorm_linear
>>> x = jnp.array([[1.0, 3.0]])
>>> layernorm_linear(x, jnp.ones(2), jnp.zeros(2), jnp.array([[0.0], [2.0]]), eps=0.0).tolist()
[[2.0]]
"""

from pallas_kernels.layernorm_linear.api import layernorm_linear

__all__ = ["layernorm_linear"]
