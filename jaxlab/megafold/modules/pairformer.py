"""Tokens that attend with a bias from pairs, and the pairformer."""

from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxlab.megafold.config import AF3Config, Kernels
from jaxlab.megafold.modules.conditioned import AdaptiveGate, AdaptiveLayerNorm
from jaxlab.megafold.modules.pair import PairUpdates, Transition
from jaxlab.megafold.modules.weights import Weights, repeated
from jaxlab.megafold.sharding import spread


class AttentionPairBias(Weights):
    """`ops.attention_pair_bias`; with a conditioning, between adaptive normalisation and adaptive gate.

    Attributes:
      heads: H; a head is C / H wide.
      kernels: implementations.
    """

    heads: int = 16
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(
        self,
        s: Float[Array, "b *t n c"],
        z: Float[Array, "b n n c_z"],
        mask: Bool[Array, "b n"] | None = None,
        condition: Float[Array, "b *t n c_s"] | None = None,
    ) -> Float[Array, "b *t n c"]:
        """The update of s."""
        c, c_z = s.shape[-1], z.shape[-1]
        if condition is not None:
            s = AdaptiveLayerNorm(self.kernels, name="norm")(s, condition)
        update = spread("attention_pair_bias")(
            s,
            z,
            mask,
            ln_s=self.norm("ln_s", c) if condition is None else None,
            ln_z=self.norm("ln_z", c_z),
            w_q=self.linear("w_q", c, c),
            b_q=self.zeros("b_q", c),
            w_k=self.linear("w_k", c, c),
            w_v=self.linear("w_v", c, c),
            w_bias=self.linear("w_bias", c_z, self.heads),
            w_gate=self.zeros("w_gate", c, c),
            w_out=self.zeros("w_out", c, c),
            implementation=self.kernels,
        )
        return update if condition is None else AdaptiveGate(name="gate")(update, condition)


class PairformerBlock(nn.Module):
    """Pairs first, then tokens with the pairs' bias (AlphaFold3, algorithm 17).

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    @nn.compact
    def __call__(
        self, s: Float[Array, "b n c_s"], z: Float[Array, "b n n c_z"], mask: Bool[Array, "b n"]
    ) -> tuple[Float[Array, "b n c_s"], Float[Array, "b n n c_z"]]:
        """The new s and z."""
        c, kernels = self.config, self.config.kernels
        updates = PairUpdates(c.pair_heads, c.pair_head_dim, c.transition_factor, c.pair_dropout, kernels, name="pair")
        z = updates(z, mask[:, :, None] & mask[:, None, :])
        s += AttentionPairBias(c.single_heads, kernels, name="attention")(s, z, mask)
        return s + Transition(c.transition_factor, kernels, name="transition")(s), z


class PairformerStack(nn.Module):
    """Pairformer blocks one after the other.

    Attributes:
      config: sizes and kernels.
      blocks: how many; None is config.pairformer_blocks.
    """

    config: AF3Config
    blocks: int | None = None

    @nn.compact
    def __call__(
        self, s: Float[Array, "b n c_s"], z: Float[Array, "b n n c_z"], mask: Bool[Array, "b n"]
    ) -> tuple[Float[Array, "b n c_s"], Float[Array, "b n n c_z"]]:
        """The new s and z."""
        count = self.config.pairformer_blocks if self.blocks is None else self.blocks
        block = PairformerBlock(self.config, name="blocks")
        s, z = repeated(block, count, (s, z), mask, remat=self.config.remat)
        return s, z
