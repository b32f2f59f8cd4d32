"""Pallas kernels: arrays in, arrays out. One folder an op, one public function each.

>>> import jax.numpy as jnp
>>> from pallas_kernels.grouped_matmul import grouped_matmul
>>> grouped_matmul(jnp.ones((5, 4)), jnp.ones((2, 4, 3)), jnp.array([2, 3])).shape
(5, 3)
"""
