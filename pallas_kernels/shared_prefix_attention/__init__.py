"""One step of decoding for samples that share a prompt: its keys are read once for all of them.

>>> import jax.numpy as jnp
>>> from pallas_kernels.shared_prefix_attention import shared_prefix_attention
>>> q = jnp.ones((1, 4, 2, 8))  # 4 samples of one prompt, 2 heads 8 wide
>>> prefix, suffix = jnp.ones((1, 5, 2, 8)), jnp.ones((1, 4, 3, 2, 8))
>>> lengths = jnp.array([5]), jnp.array([[1, 2, 3, 0]])
>>> shared_prefix_attention(q, prefix, prefix, lengths[0], suffix, suffix, lengths[1]).shape
(1, 4, 2, 8)
"""

from pallas_kernels.shared_prefix_attention.api import shared_prefix_attention

__all__ = ["shared_prefix_attention"]
