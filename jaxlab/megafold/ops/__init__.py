"""AlphaFold3's operations as pure functions on explicit weights.

Everything has a leading batch axis B. Weights are `[in, out]` and cast to the dtype of the activations when used; a
projection to heads is head-major `[H*D]`; `ln_*` is a pair `(scale, offset)`, or None where the input is normalised
already; masks are boolean, True valid, and None is all valid. Outputs have the dtype of the first argument, softmax and
normalisations are float32. `implementation` is that of every fused kernel inside (None, "reference", "xla", "triton",
"interpret"), or a `Kernels` that says it for each.

    import jax.numpy as jnp
    from jaxlab.megafold import ops

    q = k = v = jnp.ones((1, 100, 4, 32))
    out = ops.local_attention(q, k, v, edge="shift")
"""

from jaxlab.megafold.ops.attention import attention_pair_bias, triangle_attention
from jaxlab.megafold.ops.conditioning import adaptive_layer_norm
from jaxlab.megafold.ops.local_attention import atom_windows, local_attention
from jaxlab.megafold.ops.msa import outer_product_mean, pair_weighted_averaging
from jaxlab.megafold.ops.positions import relative_position

__all__ = [
    "adaptive_layer_norm",
    "atom_windows",
    "attention_pair_bias",
    "local_attention",
    "outer_product_mean",
    "pair_weighted_averaging",
    "relative_position",
    "triangle_attention",
]
