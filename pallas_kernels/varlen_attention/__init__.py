"""Attention within runs of rows: windows of images, images of a batch, packed sequences that see both ways.

>>> import jax.numpy as jnp
>>> from pallas_kernels.varlen_attention import varlen_attention
>>> q = jnp.ones((7, 2, 8))  # runs of 4 and 3 rows, 2 heads 8 wide
>>> varlen_attention(q, q, q, jnp.array([0, 4, 7]), max_length=4).shape
(7, 2, 8)
"""

from pallas_kernels.varlen_attention.api import varlen_attention

__all__ = ["varlen_attention"]
