"""One pass of the trunk, and what comes out of it."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax import struct
from jaxtyping import Array

from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.modules.msa import MSAModule
from jaxlab.megafold.modules.pairformer import PairformerStack
from jaxlab.megafold.modules.templates import TemplateEmbedder
from jaxlab.megafold.modules.weights import Weights
from jaxlab.megafold.sharding import spread


@struct.dataclass
class Trunk:
    """What the trunk knows of a structure.

    Attributes:
      s_inputs: the input embedding, [B, N, c_inputs].
      s: of tokens, [B, N, c_s].
      z: of pairs, [B, N, N, c_z].
    """

    s_inputs: Any
    s: Any
    z: Any


class TrunkCycle(Weights):
    """Templates, alignment and pairformer once (AlphaFold3, algorithm 1, lines 7 to 13).

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    @nn.compact
    def __call__(self, batch: Mapping[str, Array], start: Trunk, last: Trunk) -> Trunk:
        """From the embedded inputs and what the last pass gave (zeros, at first)."""
        c = self.config
        z = start.z + self._recycled("z", last.z)
        z += TemplateEmbedder(c, name="templates")(batch, z)
        z = MSAModule(c, name="msa")(batch, start.s_inputs, z)
        s = start.s + self._recycled("s", last.s)
        s, z = PairformerStack(c, name="pairformer")(s, z, batch["token_mask"])
        return Trunk(start.s_inputs, s, z)

    def _recycled(self, name: str, x: Array) -> Array:
        c = x.shape[-1]
        norm, w = self.norm(f"ln_{name}", c), self.zeros(f"w_{name}", c, c)
        return spread("layernorm_linear")(x, *norm, w, implementation=self.config.kernels.layernorm_linear)
