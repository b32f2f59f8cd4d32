"""How far predicted coordinates can be trusted."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxlab.layers.sharding import constrain
from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.modules.distances import BINS, distance_bins
from jaxlab.megafold.modules.pairformer import PairformerStack
from jaxlab.megafold.modules.trunk import Trunk
from jaxlab.megafold.modules.weights import Weights
from jaxlab.megafold.ops.basic import project
from jaxlab.megafold.sharding import ROWS, spread

_OUTPUTS = {"plddt": 50, "pae": 64, "pde": 64, "resolved": 2}
_TOKEN_ATOMS = 24  # of the largest standard residue, a nucleotide with its 5' phosphate


class ConfidenceHead(Weights):
    """Pairformer blocks over the trunk's embeddings and predicted distances (AlphaFold3, algorithm 31).

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Array], trunk: Trunk, x_pred: Float[Array, "b a 3"]
    ) -> dict[str, Float[Array, "..."]]:
        """Float32 logits: plddt [B, A, 50], pae and pde [B, N, N, 64], resolved [B, A, 2]."""
        c, dtype = self.config, trunk.z.dtype
        trunk, x_pred = jax.lax.stop_gradient((trunk, x_pred))
        centres = jnp.take_along_axis(x_pred, batch["representative_atom"][..., None], axis=1, mode="clip")
        z = trunk.z + project(trunk.s_inputs, self.linear("w_row", c.c_inputs, c.c_z))[:, :, None]
        z += project(trunk.s_inputs, self.linear("w_column", c.c_inputs, c.c_z))[:, None, :]
        z += project(constrain(distance_bins(centres).astype(dtype), ROWS), self.linear("w_distance", BINS, c.c_z))
        stack = PairformerStack(c, c.confidence_blocks, name="pairformer")
        s, z = stack(trunk.s, z, batch["token_mask"])

        def logits(name: str, x: Array, outputs: int) -> Array:
            channels = x.shape[-1]
            w, fused = self.zeros(f"w_{name}", channels, outputs), c.kernels.layernorm_linear
            norm = self.norm(f"ln_{name}", channels)
            return spread("layernorm_linear")(x, *norm, w, implementation=fused).astype(jnp.float32)

        out = {name: logits(name, z, _OUTPUTS[name]) for name in ("pae", "pde")}
        out["pde"] += constrain(jnp.swapaxes(out["pde"], 1, 2), ROWS)
        place = place_in_token(batch["atom_token"])
        token = batch["atom_token"]
        for name in ("plddt", "resolved"):
            # An atom has the weights of its place in the token.
            each = logits(name, s, _TOKEN_ATOMS * _OUTPUTS[name]).reshape(*s.shape[:2], _TOKEN_ATOMS, -1)
            out[name] = each[jnp.arange(each.shape[0])[:, None], token, place]
        return out


def place_in_token(atom_token: Int[Array, "b a"]) -> Int[Array, "b a"]:
    """0, 1, 2, ... along the atoms of each token, which lie side by side; 23 from the 24th on."""
    places = jnp.arange(atom_token.shape[1])
    begins = jnp.pad(atom_token[:, 1:] != atom_token[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
    return jnp.minimum(places - first, _TOKEN_ATOMS - 1)
