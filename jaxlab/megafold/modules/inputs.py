"""Features to the first embeddings of tokens and pairs."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxlab.layers.sharding import constrain
from jaxlab.megafold import ops
from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.features import RESTYPES
from jaxlab.megafold.modules.atoms import AtomEmbedder, AtomEncoder
from jaxlab.megafold.modules.weights import Weights
from jaxlab.megafold.ops.basic import project
from jaxlab.megafold.sharding import ROWS


class RelativePositionEncoding(Weights):
    """`ops.relative_position`, projected.

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    @nn.compact
    def __call__(self, batch: Mapping[str, Array]) -> Float[Array, "b n n c_z"]:
        """Channels of the pairs."""
        names = ("asym_id", "residue_index", "entity_id", "sym_id", "token_index")
        offsets = ops.relative_position(*(batch[name] for name in names)).astype(self.config.dtype)
        return project(constrain(offsets, ROWS), self.linear("w", offsets.shape[-1], self.config.c_z))


class InputEmbedder(Weights):
    """Inputs of the trunk (AlphaFold3, algorithm 2, and algorithm 1, lines 1 to 5).

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Array]
    ) -> tuple[Float[Array, "b n c_inputs"], Float[Array, "b n c_s"], Float[Array, "b n n c_z"]]:
        """s_inputs, and what tokens and pairs begin with."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        atoms = AtomEmbedder(c, name="atoms")(batch)
        summary, _ = AtomEncoder(c, c.c_s, name="encoder")(batch, atoms.c, atoms)
        residues = jax.nn.one_hot(batch["restype"], len(RESTYPES), dtype=dtype)
        known = jnp.concatenate([batch["profile"], batch["deletion_mean"][..., None]], axis=-1).astype(dtype)
        s_inputs = jnp.concatenate([summary, residues, known], axis=-1)
        s = project(s_inputs, self.linear("w_s", c.c_inputs, c.c_s))
        z = project(s_inputs, self.linear("w_row", c.c_inputs, c.c_z))[:, :, None]
        z += project(s_inputs, self.linear("w_column", c.c_inputs, c.c_z))[:, None, :]
        positions = nn.remat(RelativePositionEncoding) if c.remat else RelativePositionEncoding
        z += positions(c, name="positions")(batch)
        bonds = batch["token_bonds"][..., None].astype(dtype)
        return s_inputs, s, constrain(z + bonds * self.linear("w_bonds", 1, c.c_z)[0].astype(dtype), ROWS)
