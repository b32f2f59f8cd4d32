"""AlphaFold3's blocks as Flax linen modules, which own the weights of `jaxlab.megafold.ops` by the same names.

Whatever kernels a configuration names, the parameters are the same. Modules work in the dtype of their inputs; weights
are float32. What ends a residual branch, and every gate, begins with zeros, so that a fresh block is the identity.

    import jax, jax.numpy as jnp
    from jaxlab.megafold.modules import TriangleAttention

    z = jnp.ones((1, 16, 16, 32))
    module = TriangleAttention(heads=2, head_dim=16, node="ending")
    update = module.apply(module.init(jax.random.key(0), z), z)
"""

from jaxlab.megafold.modules.alphafold3 import AlphaFold3, initial_params
from jaxlab.megafold.modules.atoms import AtomTransformer
from jaxlab.megafold.modules.confidence import ConfidenceHead
from jaxlab.megafold.modules.diffusion import DiffusionModule
from jaxlab.megafold.modules.distogram import DistogramHead
from jaxlab.megafold.modules.inputs import InputEmbedder, RelativePositionEncoding
from jaxlab.megafold.modules.msa import MSAModule, OuterProductMean, PairWeightedAveraging
from jaxlab.megafold.modules.pair import Transition, TriangleAttention, TriangleMultiplication
from jaxlab.megafold.modules.pairformer import AttentionPairBias, PairformerBlock, PairformerStack
from jaxlab.megafold.modules.templates import TemplateEmbedder
from jaxlab.megafold.modules.trunk import Trunk

__all__ = [
    "AlphaFold3",
    "AtomTransformer",
    "AttentionPairBias",
    "ConfidenceHead",
    "DiffusionModule",
    "DistogramHead",
    "InputEmbedder",
    "MSAModule",
    "OuterProductMean",
    "PairWeightedAveraging",
    "PairformerBlock",
    "PairformerStack",
    "RelativePositionEncoding",
    "TemplateEmbedder",
    "Transition",
    "TriangleAttention",
    "TriangleMultiplication",
    "Trunk",
    "initial_params",
]
