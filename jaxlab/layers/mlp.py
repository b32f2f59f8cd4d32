"""The gated MLP of the decoder families (SwiGLU, Shazeer 2020, arXiv:2002.05202)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxlab.layers.linear import Linear


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)).

    Attributes:
        features: inner width F.
        dtype: compute dtype; None keeps that of x.
        param_dtype: stored dtype.
        out_init_scale: `Linear.init_scale` of `down`.
        use_bias: biases on all three maps.
    """

    features: int
    dtype: str | None = None
    param_dtype: str = "float32"
    out_init_scale: float = 1.0
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"], *, train: bool = False) -> Float[Array, "*batch d"]:
        """Maps `[..., D]` to `[..., D]`; `train` is accepted for the MLP protocol and changes nothing."""
        policy = {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.has_variable("params", "gate_up"):  # joined by `inference.decode_params`
            gate_up = Linear((2 * self.features,), ("embed", "mlp"), name="gate_up", **policy)(x)
            gate, up = jnp.split(gate_up, 2, axis=-1)
        else:
            gate = Linear((self.features,), ("embed", "mlp"), name="gate", **policy)(x)
            up = Linear((self.features,), ("embed", "mlp"), name="up", **policy)(x)
        down = Linear((x.shape[-1],), ("mlp", "embed"), init_scale=self.out_init_scale, name="down", **policy)
        return down(jax.nn.silu(gate) * up)
