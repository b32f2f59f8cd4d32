"""What training minimises: AlphaFold3's losses of a batch, with noise, recycling and dropout drawn from one key."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxlab.core import named_key
from jaxlab.megafold import losses
from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.diffusion import (
    LOSS_WEIGHTINGS,
    edm_loss_weight,
    random_augmentation,
    sample,
    sample_training_sigma,
)
from jaxlab.megafold.geometry import ArrayLike, masked_mean
from jaxlab.megafold.modules import AlphaFold3


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Weights of the losses; defaults are AlphaFold3's first stage (supplement, section 4).

    Attributes:
      diffusion: of the noise-weighted squared error, the bonds and the smooth lDDT together.
      bond: of the bonds among these; 1 in fine-tuning.
      distogram: of the distogram.
      confidence: of the four confidence losses together; 0 leaves the mini-rollout out.
      pae: of the aligned error among these; 1 in the last stage.
      loss_weighting: of the noise levels, as for `edm_loss_weight`.
      rollout_steps: of the mini-rollout that the confidence head is shown.
    """

    diffusion: float = 4.0
    bond: float = 0.0
    distogram: float = 0.03
    confidence: float = 1e-4
    pae: float = 0.0
    loss_weighting: str = "edm"
    rollout_steps: int = 20

    def __post_init__(self):
        for name in ("diffusion", "bond", "distogram", "confidence", "pae"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a value >= 0, got {getattr(self, name)}")
        if self.rollout_steps < 1:
            raise ValueError(f"rollout_steps: expected a value >= 1, got {self.rollout_steps}")
        if self.loss_weighting not in LOSS_WEIGHTINGS:
            raise ValueError(f"loss_weighting: expected one of {LOSS_WEIGHTINGS}, got {self.loss_weighting!r}")


def objective(
    params: PyTree, batch: Mapping[str, ArrayLike], key: Array, *, config: AF3Config, settings: LossSettings
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of a batch, mean over its structures with a resolved atom, and its parts without their weights.

    Each structure is seen in `config.diffusion_samples` random frames, each with a noise level of its own. An atom that
    is not resolved stands at the centre before the noise. The confidence head judges a mini-rollout; no
    gradient passes from it to what it reads.

    Args:
      params: of `AlphaFold3(config)`.
      batch: features, each with a leading axis of B.
      key: of the noise, the frames, the number of passes of the trunk, dropout and the rollout.
      config: of the network.
      settings: weights.

    Returns:
      The loss, and `mse`, `smooth_lddt`, `bond`, `distogram`, `plddt`, `pae`, `pde`, `resolved` (f32).
    """
    model = AlphaFold3(config)
    features = {name: jnp.asarray(value) for name, value in batch.items()}
    atom_mask = features["atom_mask"]
    shape = (atom_mask.shape[0], config.diffusion_samples)

    def draw(purpose: str) -> Array:
        return named_key(key, purpose)

    sigma = sample_training_sigma(draw("sigma"), shape)
    resolved = features["resolved"] & atom_mask
    truth = jnp.broadcast_to(features["coords"][:, None], (*shape, *features["coords"].shape[1:]))
    truth = random_augmentation(draw("frames"), truth, resolved[:, None])
    noisy = truth + sigma[..., None, None] * jax.random.normal(draw("noise"), truth.shape)
    noisy = jnp.where(atom_mask[:, None, :, None], noisy, 0.0)

    recycles = 1 if config.recycles == 1 else jax.random.randint(draw("recycles"), (), 1, config.recycles + 1)
    variables = {"params": params}
    dropout = {"dropout": draw("dropout")}
    trunk = model.apply(variables, features, recycles=recycles, rngs=dropout, method="trunk")
    outputs = {
        "denoised": model.apply(variables, features, trunk, noisy, sigma, method="denoise"),
        "distogram": model.apply(variables, trunk, method="distogram"),
    }
    if settings.confidence > 0:
        frozen_variables, frozen_trunk = jax.lax.stop_gradient((variables, trunk))

        def denoise(x: Array, level: Array) -> Any:
            levels = jnp.full(x.shape[:2], level)
            return model.apply(frozen_variables, features, frozen_trunk, x, levels, method="denoise")

        rollout = (shape[0], 1, *features["coords"].shape[1:])
        rolled = sample(denoise, draw("rollout"), rollout, mask=atom_mask[:, None], num_steps=settings.rollout_steps)
        outputs["rolled"] = rolled[:, 0]
        outputs["confidence"] = model.apply(
            variables, features, frozen_trunk, rolled[:, 0], rngs={"dropout": draw("confidence")}, method="confidence"
        )

    weight = edm_loss_weight(sigma, loss_weighting=settings.loss_weighting)
    parts = jax.vmap(structure_losses)(features, outputs, weight)
    there = jnp.any(resolved, axis=1)
    parts = {name: masked_mean(value, there) for name, value in parts.items()}
    return total_loss(parts, settings), parts


def structure_losses(
    features: Mapping[str, Array], outputs: Mapping[str, PyTree], sample_weight: Float[Array, " t"]
) -> dict[str, Float[Array, ""]]:
    """All losses of one structure, without their weights.

    Args:
      features: of the structure.
      outputs: `denoised` [T, A, 3], `distogram` [N, N, 64]; `rolled` [A, 3] and `confidence`, the head's logits for it,
        or neither.
      sample_weight: of the noise levels.
    """
    resolved = features["resolved"] & features["atom_mask"]
    of_atoms = {name: features[name][features["atom_token"]] for name in ("is_dna", "is_rna", "is_ligand")}
    shared = outputs["denoised"], features["coords"], resolved
    representative = features["representative_atom"]
    parts = {
        "mse": losses.diffusion_mse(*shared, **of_atoms, sample_weight=sample_weight),
        "smooth_lddt": losses.smooth_lddt_loss(*shared, is_nucleotide=of_atoms["is_dna"] | of_atoms["is_rna"]),
        "bond": losses.bond_list_loss(*shared, bonds=features["bonds"], sample_weight=sample_weight),
        "distogram": losses.distogram_loss(
            outputs["distogram"],
            features["coords"][representative],
            resolved[representative] & features["token_mask"],
        ),
    }
    if "confidence" in outputs:
        parts |= losses.confidence_losses(outputs["confidence"], outputs["rolled"], features)
    return parts


def total_loss(parts: Mapping[str, Float[Array, ""]], settings: LossSettings) -> Float[Array, ""]:
    """The weighted sum of the parts; those of the confidence head may be missing."""
    diffusion = parts["mse"] + settings.bond * parts["bond"] + parts["smooth_lddt"]
    total = settings.diffusion * diffusion + settings.distogram * parts["distogram"]
    if "plddt" in parts:
        confidence = parts["plddt"] + parts["pde"] + parts["resolved"] + settings.pae * parts["pae"]
        total += settings.confidence * confidence
    return total
