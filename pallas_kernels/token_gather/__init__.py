"""Rows of tokens laid out expert after expert: the dispatch of a padding-free mixture of experts.

>>> import jax.numpy as jnp
>>> from pallas_kernels.token_gather import token_gather
>>> x = jnp.array([[1.0], [2.0]])  # two tokens, one expert each, the second token's expert first
>>> rows = token_gather(x, jnp.array([1, 0]), jnp.array([[1], [0]]), jnp.int32(2))
>>> [float(row[0]) for row in rows]
[2.0, 1.0]
"""

from pallas_kernels.token_gather.api import token_gather

__all__ = ["token_gather"]
