"""From the alignment to the pairs."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxlab.layers.sharding import constrain
from jaxlab.megafold.config import AF3Config, Kernels
from jaxlab.megafold.features import RESTYPES
from jaxlab.megafold.modules.pair import PairUpdates, Transition
from jaxlab.megafold.modules.weights import Weights, drop, repeated
from jaxlab.megafold.ops.basic import project
from jaxlab.megafold.sharding import COLUMNS, spread


class OuterProductMean(Weights):
    """`ops.outer_product_mean`.

    Attributes:
      width: channels of either projection.
      outputs: channels of a pair.
      kernels: implementations.
    """

    width: int
    outputs: int
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(
        self, m: Float[Array, "b s n c_m"], mask: Bool[Array, "b s n"] | None = None
    ) -> Float[Array, "b n n c_z"]:
        """The update of z."""
        c_m = m.shape[-1]
        return spread("outer_product_mean")(
            m,
            mask,
            ln_in=self.norm("ln_in", c_m),
            w_a=self.linear("w_a", c_m, self.width),
            w_b=self.linear("w_b", c_m, self.width),
            w_out=self.zeros("w_out", self.width**2, self.outputs),
            b_out=self.zeros("b_out", self.outputs),
            implementation=self.kernels,
        )


class PairWeightedAveraging(Weights):
    """`ops.pair_weighted_averaging`.

    Attributes:
      heads: H.
      head_dim: D.
      kernels: implementations.
    """

    heads: int = 8
    head_dim: int = 8
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(
        self, m: Float[Array, "b s n c_m"], z: Float[Array, "b n n c_z"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b s n c_m"]:
        """The update of m."""
        c_m, c_z, width = m.shape[-1], z.shape[-1], self.heads * self.head_dim
        return spread("pair_weighted_averaging")(
            m,
            z,
            mask,
            ln_m=self.norm("ln_m", c_m),
            ln_z=self.norm("ln_z", c_z),
            w_bias=self.linear("w_bias", c_z, self.heads),
            w_v=self.linear("w_v", c_m, width),
            w_gate=self.zeros("w_gate", c_m, width),
            w_out=self.zeros("w_out", width, c_m),
            implementation=self.kernels,
        )


class MSABlock(nn.Module):
    """Alignment to pairs, pairs to alignment, pairs.

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    @nn.compact
    def __call__(
        self,
        m: Float[Array, "b s n c_m"],
        z: Float[Array, "b n n c_z"],
        msa_mask: Bool[Array, "b s n"],
        mask: Bool[Array, "b n"],
    ) -> tuple[Float[Array, "b s n c_m"], Float[Array, "b n n c_z"]]:
        """The new m and z."""
        c, kernels = self.config, self.config.kernels
        z += OuterProductMean(c.opm_channels, c.c_z, kernels, name="outer_product_mean")(m, msa_mask)
        averaging = PairWeightedAveraging(c.msa_heads, c.msa_head_dim, kernels, name="averaging")
        m += drop(self, averaging(m, z, mask), c.msa_dropout, 1)
        m += Transition(c.transition_factor, kernels, COLUMNS, name="transition")(m)
        updates = PairUpdates(c.pair_heads, c.pair_head_dim, c.transition_factor, c.pair_dropout, kernels, name="pair")
        return m, updates(z, mask[:, :, None] & mask[:, None, :])


class MSAModule(Weights):
    """Embeds the rows of the batch, all of them, and passes them through the blocks (AlphaFold3, algorithm 8).

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Array], s_inputs: Float[Array, "b n c_inputs"], z: Float[Array, "b n n c_z"]
    ) -> Float[Array, "b n n c_z"]:
        """The new z (all of it, not the update)."""
        if self.config.msa_blocks == 0:
            return z
        kinds, deletion = len(RESTYPES), batch["deletion_value"][..., None]
        features = jnp.concatenate([jax.nn.one_hot(batch["msa"], kinds), deletion > 0, deletion], axis=-1)
        m = project(features.astype(z.dtype), self.linear("w_msa", kinds + 2, self.config.c_m))
        m += project(s_inputs, self.linear("w_inputs", s_inputs.shape[-1], self.config.c_m))[:, None]
        m = constrain(m, COLUMNS)
        shared = batch["msa_mask"], batch["token_mask"]
        block = MSABlock(self.config, name="blocks")
        return repeated(block, self.config.msa_blocks, (m, z), *shared, remat=self.config.remat)[1]
