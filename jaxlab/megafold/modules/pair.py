"""Updates of the pair representation."""

from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxlab.megafold.config import Kernels
from jaxlab.megafold.modules.weights import Weights, drop
from jaxlab.megafold.sharding import Names, spread


class TriangleMultiplication(Weights):
    """`triangle_multiplication` with hidden channels as many as z's.

    Attributes:
      direction: "outgoing" or "incoming".
      kernels: implementations.
    """

    direction: str = "outgoing"
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, z: Float[Array, "b n n c"], mask: Bool[Array, "b n n"] | None = None) -> Float[Array, "b n n c"]:
        """The update of z."""
        c = z.shape[-1]
        return spread("triangle_multiplication")(
            z,
            mask,
            ln_in=self.norm("ln_in", c),
            w_proj=self.linear("w_proj", c, 2 * c),
            w_gate=self.zeros("w_gate", c, 2 * c),
            ln_out=self.norm("ln_out", c),
            w_out=self.zeros("w_out", c, c),
            w_out_gate=self.zeros("w_out_gate", c, c),
            direction=self.direction,
            implementation=self.kernels.triangle_multiplication,
        )


class TriangleAttention(Weights):
    """`ops.triangle_attention`.

    Attributes:
      heads: H.
      head_dim: D.
      node: "starting" or "ending".
      kernels: implementations.
    """

    heads: int = 4
    head_dim: int = 32
    node: str = "starting"
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, z: Float[Array, "b n n c"], mask: Bool[Array, "b n n"] | None = None) -> Float[Array, "b n n c"]:
        """The update of z."""
        c, width = z.shape[-1], self.heads * self.head_dim
        return spread("triangle_attention")(
            z,
            mask,
            ln_in=self.norm("ln_in", c),
            w_q=self.linear("w_q", c, width),
            w_k=self.linear("w_k", c, width),
            w_v=self.linear("w_v", c, width),
            w_bias=self.linear("w_bias", c, self.heads),
            w_gate=self.zeros("w_gate", c, width),
            w_out=self.zeros("w_out", width, c),
            node=self.node,
            implementation=self.kernels,
        )


class Transition(Weights):
    """`transition` (SwiGLU).

    Attributes:
      factor: hidden over outer width.
      kernels: implementations.
      lead: how x lies over a mesh, as `sharding.spread` takes it.
    """

    factor: int = 4
    kernels: Kernels = Kernels()
    lead: Names | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        """The update of x."""
        c, hidden = x.shape[-1], self.factor * x.shape[-1]
        scale, offset = self.scale("scale", c), self.zeros("offset", c)
        w_in, w_out = self.linear("w_in", c, 2 * hidden, relu=True), self.zeros("w_out", hidden, c)
        return spread("transition", self.lead)(x, scale, offset, w_in, w_out, implementation=self.kernels.transition)


class PairUpdates(nn.Module):
    """Triangle multiplications, triangle attentions, transition, each added, with dropout by row (ending: by column).

    Attributes:
      heads: of the attentions.
      head_dim: of the attentions.
      factor: of the transition.
      dropout: rate.
      kernels: implementations.
    """

    heads: int
    head_dim: int
    factor: int
    dropout: float
    kernels: Kernels

    @nn.compact
    def __call__(self, z: Float[Array, "b n n c"], mask: Bool[Array, "b n n"]) -> Float[Array, "b n n c"]:
        """The new z."""
        attention = {"heads": self.heads, "head_dim": self.head_dim, "kernels": self.kernels}
        outgoing = TriangleMultiplication("outgoing", self.kernels, name="outgoing")
        z += drop(self, outgoing(z, mask), self.dropout, 1)
        incoming = TriangleMultiplication("incoming", self.kernels, name="incoming")
        z += drop(self, incoming(z, mask), self.dropout, 1)
        starting = TriangleAttention(node="starting", name="starting", **attention)
        z += drop(self, starting(z, mask), self.dropout, 1)
        ending = TriangleAttention(node="ending", name="ending", **attention)
        z += drop(self, ending(z, mask), self.dropout, 2)
        return z + Transition(self.factor, self.kernels, name="transition")(z)
