"""AlphaFold 3's transition: LayerNorm, SwiGLU and the way back, without the hidden layer ever being stored.

>>> import jax.numpy as jnp
>>> from pallas_kernels.transition import transition
>>> x, ones, zeros = jnp.array([[1.0, 3.0]]), jnp.ones(2), jnp.zeros(2)
>>> w_in = jnp.array([[0.0, 0.0], [2.0, 50.0]])  # the value, then the gate
>>> transition(x, ones, zeros, w_in, jnp.array([[1.0, 3.0]]), eps=0.0).tolist()
[[100.0, 300.0]]
"""

from pallas_kernels.transition.api import transition

__all__ = ["transition"]
