"""Rows times the weights of their group: the matrix product of a mixture of experts.

>>> import jax.numpy as jnp
>>> from pallas_kernels.grouped_matmul import grouped_matmul
>>> lhs, rhs = jnp.ones((5, 4)), jnp.stack([jnp.ones((4, 3)), jnp.full((4, 3), 2.0)])
>>> [float(row[0]) for row in grouped_matmul(lhs, rhs, jnp.array([2, 2]))]
[4.0, 4.0, 8.0, 8.0, 0.0]
"""

from pallas_kernels.grouped_matmul.api import PRODUCTS_NAME, grouped_matmul

__all__ = ["PRODUCTS_NAME", "grouped_matmul"]
