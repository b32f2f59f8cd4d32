"""Distances of tokens, from the pairs alone."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxlab.layers.sharding import constrain
from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.modules.weights import Weights
from jaxlab.megafold.ops.basic import project
from jaxlab.megafold.sharding import ROWS

BINS = 64


class DistogramHead(Weights):
    """Logits of the distance between representative atoms (AlphaFold3, section 4.4).

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    @nn.compact
    def __call__(self, z: Float[Array, "b n n c_z"]) -> Float[Array, "b n n 64"]:
        """Symmetric, float32."""
        half = project(z, self.zeros("w", self.config.c_z, BINS)).astype(jnp.float32)
        return constrain(half + constrain(jnp.swapaxes(half, 1, 2), ROWS), ROWS)
