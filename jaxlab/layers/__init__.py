"""The pieces networks are made of: norms, rotary positions, linear maps, attention, gated MLPs.

Flax linen modules whose parameters carry logical axis names (`jaxlab.core.mesh.DEFAULT_RULES` shards them).

    import jax, jax.numpy as jnp
    from jaxlab.layers import GatedMLP

    mlp = GatedMLP(features=64)
    x = jnp.ones((2, 8, 32))
    y = mlp.apply(mlp.init(jax.random.key(0), x), x)
"""

from jaxlab.layers.attention import SelfAttention
from jaxlab.layers.linear import Linear
from jaxlab.layers.mlp import GatedMLP
from jaxlab.layers.norm import RMSNorm
from jaxlab.layers.rope import apply_rope, rope_frequencies, rope_tables

__all__ = [
    "GatedMLP",
    "Linear",
    "RMSNorm",
    "SelfAttention",
    "apply_rope",
    "rope_frequencies",
    "rope_tables",
]
