"""Attention of all rows to all keys: the places of an image to each other, or to the words of a prompt.

>>> import jax.numpy as jnp
>>> from pallas_kernels.flash_self_attention import flash_self_attention
>>> q = jnp.ones((1, 16, 2, 40))  # 4 x 4 places, 2 heads 40 wide
>>> flash_self_attention(q, q, q).shape
(1, 16, 2, 40)
"""

from pallas_kernels.flash_self_attention.api import flash_self_attention

__all__ = ["flash_self_attention"]
