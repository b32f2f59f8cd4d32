"""What the confidence head is trained on: the errors of a rolled-out structure, in bins (AlphaFold3, section 4.3)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.megafold.geometry import ArrayLike, distances, in_frames, masked_mean
from jaxlab.megafold.metrics import MAX_ERROR, preserved


def plddt_targets(
    pred: Float[Array, "a 3"], features: Mapping[str, Array], bins: int
) -> tuple[Int[Array, " a"], Bool[Array, " a"]]:
    """Bin of each atom's lDDT against the centre atoms of polymers, and whether it has one.

    A centre atom counts where it is truly nearer than 15 Å, or than 30 Å if it is of a nucleotide.
    """
    resolved, centre = _resolved(features), features["center_atom"]
    nucleotide = features["is_dna"] | features["is_rna"]
    true = distances(features["coords"], features["coords"][centre])
    partner = resolved[centre] & features["token_mask"] & (features["is_protein"] | nucleotide)
    apart = jnp.arange(resolved.shape[0])[:, None] != centre
    pair = resolved[:, None] & partner & apart & (true < jnp.where(nucleotide, 30.0, 15.0))
    hits = jnp.sum(jnp.where(pair, preserved(distances(pred, pred[centre]), true), 0.0), axis=1)
    pairs = jnp.sum(pair, axis=1)
    return _bin(hits / jnp.maximum(pairs, 1), 1.0, bins), pairs > 0


def pae_targets(
    pred: Float[Array, "a 3"], features: Mapping[str, Array], bins: int
) -> tuple[Int[Array, "n n"], Bool[Array, "n n"]]:
    """Bin of the error of token j's centre atom as seen from token i's frame, and whether both exist."""
    centre, frames, coords = features["center_atom"], features["frame_atoms"], features["coords"]
    seen = in_frames(pred, frames, pred[centre]) - in_frames(coords, frames, coords[centre])
    valid = (features["has_frame"] & features["token_mask"])[:, None] & _resolved(features)[centre]
    return _bin(jnp.linalg.norm(seen, axis=-1), MAX_ERROR, bins), valid & features["token_mask"]


def pde_targets(
    pred: Float[Array, "a 3"], features: Mapping[str, Array], bins: int
) -> tuple[Int[Array, "n n"], Bool[Array, "n n"]]:
    """Bin of the error of the distance between two tokens' representative atoms, and whether both are resolved."""
    atom = features["representative_atom"]
    x, y = pred[atom], features["coords"][atom]
    valid = _resolved(features)[atom] & features["token_mask"]
    return _bin(jnp.abs(distances(x, x) - distances(y, y)), MAX_ERROR, bins), valid[:, None] & valid


def confidence_losses(
    logits: Mapping[str, Float[ArrayLike, "..."]], pred: Float[ArrayLike, "a 3"], features: Mapping[str, ArrayLike]
) -> dict[str, Float[Array, ""]]:
    """Cross-entropies of the confidence head on one structure, each a mean over what has a target.

    Args:
        logits: `plddt` `[A,50]`, `pae` `[N,N,64]`, `pde` `[N,N,64]` (errors from 0 to 32 Å), `resolved` `[A,2]`.
        pred: the structure that the head was shown; no gradient passes to it.
        features: of the structure, without a batch axis.

    Returns:
        `plddt`, `pae`, `pde` and `resolved`, the last over all atoms that exist.

    Raises:
        ValueError: Logits or positions of another shape.
    """
    arrays: dict[str, Array] = {name: jnp.asarray(value) for name, value in features.items()}
    pred = jax.lax.stop_gradient(jnp.asarray(pred, jnp.float32))
    atoms, tokens = arrays["atom_mask"].shape, arrays["token_mask"].shape
    if pred.shape != (*atoms, 3):
        raise ValueError(f"pred: expected shape {(*atoms, 3)}, got {pred.shape}")
    for name, shape in (("plddt", atoms), ("pae", tokens * 2), ("pde", tokens * 2), ("resolved", (*atoms, 2))):
        if logits[name].shape[: len(shape)] != shape:
            raise ValueError(f"logits[{name!r}]: expected a shape that begins with {shape}, got {logits[name].shape}")
    targets = {
        "plddt": plddt_targets(pred, arrays, logits["plddt"].shape[-1]),
        "pae": pae_targets(pred, arrays, logits["pae"].shape[-1]),
        "pde": pde_targets(pred, arrays, logits["pde"].shape[-1]),
        "resolved": (arrays["resolved"].astype(jnp.int32), arrays["atom_mask"]),
    }
    return {name: _cross_entropy(logits[name], *target) for name, target in targets.items()}


def _resolved(features: Mapping[str, Array]) -> Bool[Array, " a"]:
    return features["resolved"] & features["atom_mask"]


def _bin(value: Array, top: float, bins: int) -> Array:
    """Index among even bins from 0 to `top`; what lies above is in the last."""
    return jnp.clip(jnp.floor(value * (bins / top)), 0, bins - 1).astype(jnp.int32)


def _cross_entropy(logits: ArrayLike, target: Array, mask: Array) -> Array:
    log_probs = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1)
    return masked_mean(-jnp.take_along_axis(log_probs, target[..., None], axis=-1)[..., 0], mask)
