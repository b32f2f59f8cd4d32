"""Attention with an additive pair bias, shared by many rows, whose gradient is needed (EvoAttention of MegaFold).

>>> import jax.numpy as jnp
>>> from pallas_kernels.evo_attention import evo_attention
>>> q = jnp.ones((1, 3, 5, 2, 8))  # 3 rows of 5 residues, 2 heads 8 wide
>>> evo_attention(q, q, q, jnp.ones((1, 3, 1, 1, 5), bool), jnp.zeros((1, 1, 2, 5, 5))).shape
(1, 3, 5, 2, 8)
"""

from pallas_kernels.evo_attention.api import evo_attention

__all__ = ["evo_attention"]
