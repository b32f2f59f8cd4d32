"""The denoiser."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxlab.layers.sharding import constrain
from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.diffusion import precondition
from jaxlab.megafold.modules.atoms import AtomConditioning, AtomDecoder, AtomEmbedder, AtomEncoder
from jaxlab.megafold.modules.conditioned import ConditionedTransition
from jaxlab.megafold.modules.inputs import RelativePositionEncoding
from jaxlab.megafold.modules.pair import Transition
from jaxlab.megafold.modules.pairformer import AttentionPairBias
from jaxlab.megafold.modules.trunk import Trunk
from jaxlab.megafold.modules.weights import Weights, mapped, repeated
from jaxlab.megafold.ops.basic import layer_norm, project
from jaxlab.megafold.sharding import ROWS, spread

_FACTOR = 2  # of the transitions here
_FREQUENCIES = 256


class DiffusionModule(nn.Module):
    """Denoises samples of one structure (AlphaFold3, algorithm 20), preconditioned.

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Array], trunk: Trunk, x: Float[Array, "b t a 3"], sigma: Float[Array, "b t"]
    ) -> Float[Array, "b t a 3"]:
        """The estimate of the truth, Å; zero for padding."""
        config, samples = self.config, x.shape[1]
        s, z = Conditioning(config, name="conditioning")(batch, trunk)
        atoms = AtomEmbedder(config, name="atoms")(batch, trunk.s, z)
        denoiser = Denoiser(config, name="denoiser")
        chunk = config.sample_chunk or samples
        if chunk >= samples or samples % chunk:
            return denoiser(x, sigma, batch, s, z, atoms)
        chunks = tuple(array.reshape(array.shape[0], -1, chunk, *array.shape[2:]) for array in (x, sigma))
        return mapped(denoiser, chunks, batch, s, z, atoms, axis=1, remat=True).reshape(x.shape)


class Conditioning(Weights):
    """What tokens and pairs tell the denoiser whatever the noise (AlphaFold3, algorithm 21).

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Array], trunk: Trunk
    ) -> tuple[Float[Array, "b n c_s"], Float[Array, "b n n c_z"]]:
        """Of tokens, and of pairs."""
        pairs = nn.remat(_PairConditioning) if self.config.remat else _PairConditioning
        z = pairs(self.config, name="pairs")(batch, trunk.z)
        both = jnp.concatenate([trunk.s, trunk.s_inputs], axis=-1)
        w_s, fused = self.linear("w_s", both.shape[-1], self.config.c_s), self.config.kernels.layernorm_linear
        norm = self.norm("ln_s", both.shape[-1])
        return spread("layernorm_linear")(both, *norm, w_s, implementation=fused), z


class _PairConditioning(Weights):
    config: AF3Config

    @nn.compact
    def __call__(self, batch: Mapping[str, Array], z: Float[Array, "b n n c_z"]) -> Float[Array, "b n n c_z"]:
        c_z, kernels = self.config.c_z, self.config.kernels
        both = jnp.concatenate([z, RelativePositionEncoding(self.config, name="positions")(batch)], axis=-1)
        w_z = self.linear("w_z", 2 * c_z, c_z)
        norm, fused = self.norm("ln_z", 2 * c_z), kernels.layernorm_linear
        z = spread("layernorm_linear")(both, *norm, w_z, implementation=fused)
        for name in ("transition_1", "transition_2"):
            z += Transition(_FACTOR, kernels, name=name)(z)
        return z


class Denoiser(Weights):
    """Everything that depends on the noise.

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t a 3"],
        sigma: Float[Array, "b t"],
        batch: Mapping[str, Array],
        s: Float[Array, "b n c_s"],
        z: Float[Array, "b n n c_z"],
        atoms: AtomConditioning,
    ) -> Float[Array, "b t a 3"]:
        """The estimate of the truth."""
        config, dtype = self.config, s.dtype
        token_mask, atom_mask = batch["token_mask"], batch["atom_mask"][:, None, :, None]
        c_skip, c_out, c_in, c_noise = (c[..., None, None] for c in precondition(sigma))
        x = constrain(jnp.where(atom_mask, x.astype(jnp.float32), 0), ROWS)

        waves = layer_norm(_fourier(c_noise[..., 0]), self.norm("ln_noise", _FREQUENCIES))
        noise = project(waves.astype(dtype), self.linear("w_noise", _FREQUENCIES, config.c_s))
        condition = s[:, None] + noise[:, :, None]
        for name in ("transition_1", "transition_2"):
            condition += Transition(_FACTOR, config.kernels, name=name)(condition)

        q = atoms.c[:, None] + project((c_in * x).astype(dtype), self.linear("w_position", 3, config.c_atom))
        a, q = AtomEncoder(config, config.c_token, name="encoder")(batch, q, atoms)
        w_s, ln_s = self.linear("w_s", config.c_s, config.c_token), self.norm("ln_s", config.c_s)
        a += spread("layernorm_linear")(condition, *ln_s, w_s, implementation=config.kernels.layernorm_linear)
        block = TokenBlock(config, name="blocks")
        a = repeated(block, config.token_blocks, a, condition, z, token_mask, remat=config.remat)
        a = layer_norm(a, self.norm("ln_a", config.c_token))
        step = AtomDecoder(config, name="decoder")(batch, a, q, atoms)
        return jnp.where(atom_mask, c_skip * x + c_out * step, 0)


class TokenBlock(nn.Module):
    """A block of the token transformer (AlphaFold3, algorithm 23); T samples share the pairs' bias.

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    @nn.compact
    def __call__(
        self,
        a: Float[Array, "b t n c_token"],
        condition: Float[Array, "b t n c_s"],
        z: Float[Array, "b n n c_z"],
        mask: Bool[Array, "b n"],
    ) -> Float[Array, "b t n c_token"]:
        """The new a."""
        kernels = self.config.kernels
        a += AttentionPairBias(self.config.token_heads, kernels, name="attention")(a, z, mask, condition)
        return a + ConditionedTransition(_FACTOR, kernels, name="transition")(a, condition)


def _fourier(noise: Float[Array, "b t 1"]) -> Float[Array, "b t 256"]:
    """Cosines of random frequencies and phases, drawn once and for all (AlphaFold3, algorithm 22)."""
    frequency, phase = np.random.default_rng(0).standard_normal((2, _FREQUENCIES)).astype(np.float32)
    return jnp.cos(2 * jnp.pi * (noise * frequency + phase))
