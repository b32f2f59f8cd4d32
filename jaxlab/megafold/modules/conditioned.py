"""What a conditioning representation steers: normalisation, and the way back to the residual stream."""

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from jaxlab.megafold.config import Kernels
from jaxlab.megafold.modules.weights import Weights
from jaxlab.megafold.ops.basic import project, swiglu
from jaxlab.megafold.sharding import Names, spread


class AdaptiveLayerNorm(Weights):
    """`ops.adaptive_layer_norm`, at first half of the normalised x.

    Attributes:
      kernels: implementations.
      lead: how x lies over a mesh, as `sharding.spread` takes it.
    """

    kernels: Kernels = Kernels()
    lead: Names | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], s: Float[Array, "*#batch c_s"]) -> Float[Array, "*batch c"]:
        """The normalised x."""
        c, c_s = x.shape[-1], s.shape[-1]
        return spread("adaptive_layer_norm", self.lead)(
            x,
            s,
            scale_s=self.scale("scale_s", c_s),
            w_gamma=self.zeros("w_gamma", c_s, c),
            b_gamma=self.zeros("b_gamma", c),
            w_beta=self.zeros("w_beta", c_s, c),
            implementation=self.kernels,
        )


class AdaptiveGate(Weights):
    """sigmoid(s w + b) * x, with b = -2 at first (AlphaFold3's adaLN-Zero)."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], s: Float[Array, "*#batch c_s"]) -> Float[Array, "*batch c"]:
        """The gated x."""
        c = x.shape[-1]
        b = self.param("b", nn.initializers.constant(-2.0), (c,))
        return jax.nn.sigmoid(project(s, self.zeros("w", s.shape[-1], c), b)) * x


class ConditionedTransition(Weights):
    """SwiGLU between adaptive normalisation and adaptive gate (AlphaFold3, algorithm 25).

    Attributes:
      factor: hidden over outer width.
      kernels: implementations.
      lead: as `AdaptiveLayerNorm`'s.
    """

    factor: int = 2
    kernels: Kernels = Kernels()
    lead: Names | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], s: Float[Array, "*#batch c_s"]) -> Float[Array, "*batch c"]:
        """The update of x."""
        c, hidden = x.shape[-1], self.factor * x.shape[-1]
        w_in, w_out = self.linear("w_in", c, 2 * hidden, relu=True), self.zeros("w_out", hidden, c)
        y = swiglu(AdaptiveLayerNorm(self.kernels, self.lead, name="norm")(x, s), w_in, w_out)
        return AdaptiveGate(name="gate")(y, s)
