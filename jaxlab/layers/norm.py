"""Root mean square normalisation."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxlab.layers.sharding import named


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, computed in float32 (Zhang and Sennrich, 2019, arXiv:1910.07467).

    Attributes:
        epsilon: added to the mean square.
        axis_name: logical name of the normalised axis, for sharding `scale`.
        param_dtype: dtype in which `scale` is stored.
    """

    epsilon: float = 1e-5
    axis_name: str | None = "embed"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Normalises `x`; the result has the dtype of `x`."""
        init = named(nn.initializers.ones_init(), (self.axis_name,))
        scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(self.param_dtype))
        return _normalised(x, scale, self.epsilon)


# Checkpointed: of the three float32 arrays on the way the backward pass would keep every one, a layer each.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _normalised(x: Float[Array, "*batch d"], scale: Float[Array, " d"], epsilon: float) -> Float[Array, "*batch d"]:
    wide = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * inverse_rms * scale.astype(jnp.float32)).astype(x.dtype)
