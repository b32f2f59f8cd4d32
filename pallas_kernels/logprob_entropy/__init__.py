"""Log-probabilities of tokens and the entropy of their distributions, without the logits ever being stored.

>>> import jax.numpy as jnp
>>> from pallas_kernels.logprob_entropy import logprob_entropy
>>> made = logprob_entropy(jnp.ones((1, 3)), jnp.zeros((3, 4)), jnp.array([2]))
>>> [round(float(x[0]), 4) for x in made]
[-1.3863, 1.3863, 1.3863]
"""

from pallas_kernels.logprob_entropy.api import LogprobEntropy, logprob_entropy

__all__ = ["LogprobEntropy", "logprob_entropy"]
