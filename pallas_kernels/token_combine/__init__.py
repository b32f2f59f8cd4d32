"""The weighted sum of a token's expert outputs: the return path of a padding-free mixture of experts.

>>> import jax.numpy as jnp
>>> from pallas_kernels.token_combine import token_combine
>>> y = jnp.array([[2.0], [1.0], [4.0]])  # rows of slots 2, 0 and 1; slot 3 was dropped
>>> weights, inv = jnp.array([[0.5, 0.25], [1.0, 0.0]]), jnp.array([[1, 2], [0, 3]])
>>> [float(row[0]) for row in token_combine(y, weights, inv, jnp.array([2, 0, 1]), jnp.int32(3))]
[1.5, 2.0]
"""

from pallas_kernels.token_combine.api import token_combine

__all__ = ["token_combine"]
