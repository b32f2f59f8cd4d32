"""Attention to the words of a prompt, and how much of it each word gets: the head means of the probabilities.

>>> import jax.numpy as jnp
>>> from pallas_kernels.attention_with_map import attention_with_map
>>> q, words = jnp.ones((1, 16, 2, 40)), jnp.ones((1, 4, 2, 40))  # 4 x 4 places, 4 words, 2 heads 40 wide
>>> out, probabilities = attention_with_map(q, words, words)
>>> out.shape, probabilities.shape, float(probabilities[0, 0, 0])
((1, 16, 2, 40), (1, 16, 4), 0.25)
"""

from pallas_kernels.attention_with_map.api import attention_with_map

__all__ = ["attention_with_map"]
