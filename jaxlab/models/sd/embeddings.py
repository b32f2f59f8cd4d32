"""The time a network is told: sinusoids and a small MLP, in float32."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxlab.layers import Linear


def sinusoids(
    time: Float[Array, " b"], width: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> Float[Array, "b width"]:
    """Sinusoidal embedding of any real times (Ho et al., 2020, arXiv:2006.11239), wavelengths 2 pi to 20000 pi.

    Args:
        time: float32, 0 to 1000 in Stable Diffusion.
        width: of the result, even.
        flip_sin_to_cos: cosines first.
        freq_shift: the last frequency is 1 / 10000 if it is 1, one place further if 0.
    """
    half = width // 2
    exponents = -math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = time.astype(jnp.float32)[:, None] * jnp.exp(exponents)
    waves = (jnp.cos(angles), jnp.sin(angles))
    return jnp.concatenate(waves if flip_sin_to_cos else waves[::-1], axis=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids of a time, then two linear maps with SiLU between.

    Attributes:
        channels: of the sinusoids; the result has four times as many.
        flip_sin_to_cos: see `sinusoids`.
        freq_shift: see `sinusoids`.
    """

    channels: int
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0

    def setup(self):
        """Makes the submodules."""
        width = 4 * self.channels
        policy = {"use_bias": True, "dtype": "float32"}
        self.linear_1 = Linear((width,), ("embed", "mlp"), **policy)
        self.linear_2 = Linear((width,), ("mlp", "embed"), **policy)

    def __call__(self, time: Float[Array, " b"]) -> Float[Array, "b d"]:
        """`[B]` times to `[B, 4 channels]` float32."""
        waves = sinusoids(time, self.channels, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)
        return self.linear_2(jax.nn.silu(self.linear_1(waves)))
