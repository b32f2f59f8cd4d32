"""One step of decoding over keys and values that lie in pages, found through a table (PagedAttention).

>>> import jax.numpy as jnp
>>> from pallas_kernels.paged_attention import paged_attention
>>> q, pages = jnp.ones((2, 4, 8)), jnp.ones((2, 5, 16, 8))  # 4 heads over 2, 8 wide; 5 pages of 16 tokens
>>> table, lengths = jnp.array([[1, 3], [4, 0]]), jnp.array([20, 7])
>>> paged_attention(q, pages, pages, table, lengths).shape
(2, 4, 8)
"""

from pallas_kernels.paged_attention.api import paged_attention

__all__ = ["paged_attention"]
