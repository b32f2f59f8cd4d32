"""The whole network: trunk, diffusion module, distogram and confidence heads."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.features import abstract_batch
from jaxlab.megafold.modules.confidence import ConfidenceHead
from jaxlab.megafold.modules.diffusion import DiffusionModule
from jaxlab.megafold.modules.distogram import DistogramHead
from jaxlab.megafold.modules.inputs import InputEmbedder
from jaxlab.megafold.modules.trunk import Trunk, TrunkCycle
from jaxlab.megafold.modules.weights import DROPOUT


class AlphaFold3(nn.Module):
    """AlphaFold3 (Abramson et al., 2024, algorithm 1), in parts that training, the mini-rollout and sampling each use.

    `batch` is a dict with the keys of `jaxlab.megafold.features.FEATURES`, each with an axis B in front; N tokens, A
    atoms, T noise samples. Activations have `config.dtype`; coordinates, noise levels and logits are float32. Padding
    changes nothing of what is real. Dropout is on where `apply` is given `rngs={"dropout": key}`, and only there;
    the diffusion module has none.

        model = AlphaFold3(config)
        params = initial_params(config, key)  # what model.init(key, batch, x, sigma)["params"] is, sooner

        def forward(model):
            trunk = model.trunk(batch, recycles=recycles)
            denoised = model.denoise(batch, trunk, x, sigma)
            return denoised, model.distogram(trunk)

        model.apply({"params": params}, rngs={"dropout": key}, method=forward)

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    def setup(self):
        """Makes the parts."""
        self.input_embedder = InputEmbedder(self.config)
        self.trunk_cycle = TrunkCycle(self.config)
        self.diffusion_module = DiffusionModule(self.config)
        self.distogram_head = DistogramHead(self.config)
        self.confidence_head = ConfidenceHead(self.config)

    def __call__(
        self,
        batch: Mapping[str, Any],
        x: Float[Array, "b t a 3"],
        sigma: Float[Array, "b t"],
        *,
        recycles: int | Int[Array, ""] = 1,
    ) -> dict[str, Array | Trunk | dict[str, Array]]:
        """Runs every part once; `init` goes this way.

        Args:
          batch: features.
          x: noisy coordinates, as `denoise` takes them.
          sigma: their noise levels.
          recycles: as `trunk` takes it.

        Returns:
          trunk (`Trunk`), denoised [B, T, A, 3], distogram [B, N, N, 64], and confidence (a dict), which judges the
          first denoised sample.
        """
        trunk = self.trunk(batch, recycles=recycles)
        denoised = self.denoise(batch, trunk, x, sigma)
        return {
            "trunk": trunk,
            "denoised": denoised,
            "distogram": self.distogram(trunk),
            "confidence": self.confidence(batch, trunk, denoised[:, 0]),
        }

    def trunk(self, batch: Mapping[str, Array], *, recycles: int | Int[Array, ""]) -> Trunk:
        """Embeds, then passes templates, alignment and pairformer `recycles` times.

        Only the last pass has a gradient; a traced number of passes is one program for all numbers.

        Args:
          batch: features.
          recycles: passes, 1 .. config.recycles in training; a number or a traced scalar. Less than 1 counts as 1.

        Returns:
          Embeddings in `config.dtype`.
        """
        start = Trunk(*self.input_embedder(batch))
        last = Trunk(start.s_inputs, jnp.zeros_like(start.s), jnp.zeros_like(start.z))
        several = not isinstance(recycles, int | np.integer) or recycles > 1
        if several and not self.is_initializing():
            last = self._recycle(batch, start, last, recycles - 1)
        return self.trunk_cycle(batch, start, last)

    def _recycle(self, batch: Mapping[str, Array], start: Trunk, last: Trunk, passes: int | Array) -> Trunk:
        """Passes without gradient."""
        variables, start, last = jax.lax.stop_gradient((self.trunk_cycle.variables, start, last))
        key = self.make_rng(DROPOUT) if self.has_rng(DROPOUT) else None
        cycle = TrunkCycle(self.config, parent=None)

        def once(index: Array, last: Trunk) -> Any:
            rngs = None if key is None else {DROPOUT: jax.random.fold_in(key, index)}
            return cycle.apply(variables, batch, start, last, rngs=rngs)

        return jax.lax.fori_loop(0, passes, once, last)

    def denoise(
        self, batch: Mapping[str, Array], trunk: Trunk, x: Float[Array, "b t a 3"], sigma: Float[Array, "b t"]
    ) -> Float[Array, "b t a 3"]:
        """The denoiser D(x, sigma) of EDM, preconditioned (c_skip, c_out, c_in, c_noise are inside).

        All samples share one pass of the conditioning. With `config.sample_chunk` (if it divides T) that many samples
        are denoised at once, and recomputed in the backward pass.

        Args:
          batch: features.
          trunk: of `trunk`; it takes gradients.
          x: truth plus noise, Å, centred; what padding holds does not matter.
          sigma: noise levels, Å; positive.

        Returns:
          The estimate of the truth, Å, in the frame of x; zero for padding.
        """
        return self.diffusion_module(batch, trunk, x, sigma)

    def distogram(self, trunk: Trunk) -> Float[Array, "b n n 64"]:
        """Logits of the distances between representative atoms, symmetric."""
        return self.distogram_head(trunk.z)

    def confidence(
        self, batch: Mapping[str, Array], trunk: Trunk, x_pred: Float[Array, "b a 3"]
    ) -> dict[str, Float[Array, "..."]]:
        """Judges predicted coordinates; no gradient passes to `trunk` and `x_pred`.

        Args:
          batch: features.
          trunk: of `trunk`.
          x_pred: predicted coordinates, Å, such as the mini-rollout's.

        Returns:
          Logits: plddt [B, A, 50], pae [B, N, N, 64] (row: the token whose frame it is), pde [B, N, N, 64] (symmetric),
          resolved [B, A, 2] (second: resolved).
        """
        return self.confidence_head(batch, trunk, x_pred)


def initial_params(config: AF3Config, key: Array) -> dict[str, Any]:
    """Fresh weights, float32, those of `AlphaFold3(config).init`, which would compile a forward pass for them."""
    samples = jax.ShapeDtypeStruct((1, 1, config.max_atoms, 3), jnp.float32)
    levels = jax.ShapeDtypeStruct((1, 1), jnp.float32)

    def make(key: Array) -> Any:
        return AlphaFold3(config).lazy_init(key, abstract_batch(config), samples, levels)["params"]

    if isinstance(key, jax.core.Tracer):
        return make(key)
    # Run once: what the compiler would spend on making it fast, twice the time, is lost.
    return jax.jit(make, compiler_options={"xla_backend_optimization_level": 0})(key)
