"""Structures of relatives, as a bias of the pairs."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxlab.layers.sharding import constrain
from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.features import RESTYPES
from jaxlab.megafold.modules.distances import BINS, distance_bins
from jaxlab.megafold.modules.pair import PairUpdates
from jaxlab.megafold.modules.weights import Weights, mapped, repeated
from jaxlab.megafold.ops.basic import layer_norm, project
from jaxlab.megafold.sharding import ROWS, spread

_FEATURES = ("mask", "restype", "pos", "pos_mask", "frame", "frame_mask")


class TemplateEmbedder(Weights):
    """The mean of what each template makes of the pairs (AlphaFold3, algorithm 16), one template at a time.

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    @nn.compact
    def __call__(self, batch: Mapping[str, Array], z: Float[Array, "b n n c_z"]) -> Float[Array, "b n n c_z"]:
        """The update of z; without templates it is 0."""
        c = self.config
        if c.template_blocks == 0:
            return jnp.zeros_like(z)
        w_z = self.linear("w_z", c.c_z, c.c_template)
        norm, fused = self.norm("ln_z", c.c_z), c.kernels.layernorm_linear
        query = spread("layernorm_linear")(z, *norm, w_z, implementation=fused)
        templates = tuple(batch[f"template_{name}"] for name in _FEATURES)
        shared = query, batch["asym_id"], batch["token_mask"]
        start = jnp.zeros(query.shape, jnp.float32)
        total = mapped(_Template(c, name="template"), templates, *shared, axis=1, remat=c.remat, start=start)
        count = jnp.maximum(jnp.sum(batch["template_mask"], axis=1), 1)
        mean = (total / count[:, None, None, None]).astype(z.dtype)
        return project(jax.nn.relu(mean), self.zeros("w_out", c.c_template, c.c_z))


class _Template(Weights):
    """One template; its geometry counts only inside a chain."""

    config: AF3Config

    @nn.compact
    def __call__(
        self,
        used: Bool[Array, " b"],
        restype: Int[Array, "b n"],
        pos: Float[Array, "b n 3"],
        pos_mask: Bool[Array, "b n"],
        frame: Float[Array, "b n 3 3"],
        frame_mask: Bool[Array, "b n"],
        query: Float[Array, "b n n c"],
        asym_id: Int[Array, "b n"],
        mask: Bool[Array, "b n"],
    ) -> Float[Array, "b n n c"]:
        c, kinds = self.config.c_template, len(RESTYPES)
        chain = asym_id[:, :, None] == asym_id[:, None, :]
        near, seen = (chain & x[:, :, None] & x[:, None, :] for x in (pos_mask, frame_mask))
        geometry = jnp.concatenate(
            [
                distance_bins(pos) * near[..., None],
                near[..., None],
                directions(frame) * seen[..., None],
                seen[..., None],
            ],
            axis=-1,
        )
        z = query + project(constrain(geometry.astype(query.dtype), ROWS), self.linear("w_geometry", BINS + 5, c))
        residues = jax.nn.one_hot(restype, kinds, dtype=query.dtype)
        z += project(residues, self.linear("w_row", kinds, c))[:, :, None]
        z += project(residues, self.linear("w_column", kinds, c))[:, None, :]
        heads = self.config.pair_heads
        # AlphaFold3's code gives a template's head its share of the channels, not the pairformer's width.
        block = PairUpdates(heads, c // heads, 2, self.config.pair_dropout, self.config.kernels, name="blocks")
        pair_mask = mask[:, :, None] & mask[:, None, :]
        z = repeated(block, self.config.template_blocks, z, pair_mask, remat=self.config.remat)
        return layer_norm(z, self.norm("ln_out", c)) * used[:, None, None, None]


def directions(frame: Float[Array, "b n 3 3"]) -> Float[Array, "b n n 3"]:
    """Unit vectors from CA of i to CA of j, in the axes that N, CA and C of i span; 0 from a point to itself."""

    def unit(x: Array) -> Array:
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)

    n, ca, c = jnp.moveaxis(frame, -2, 0)
    first = unit(c - ca)
    second = unit(n - ca - first * jnp.sum(first * (n - ca), axis=-1, keepdims=True))
    axes = jnp.stack([first, second, jnp.cross(first, second)], axis=-2)
    apart = unit(ca[:, None, :] - ca[:, :, None])
    return jnp.einsum("bixc,bijc->bijx", axes, apart, precision=jax.lax.Precision.HIGHEST)
