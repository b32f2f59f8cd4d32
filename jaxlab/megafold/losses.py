"""Losses of one structure (AlphaFold3, supplement, sections 3.7 and 4); `vmap` for more. Å, float32.

Of A atoms and T noise samples. Masks are True where the truth is resolved; what they leave out has no influence.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.megafold.confidence import confidence_losses
from jaxlab.megafold.geometry import ArrayLike, distances, masked_mean, sum_over_rows, weighted_rigid_align

__all__ = [
    "bond_list_loss",
    "bond_loss",
    "confidence_losses",
    "diffusion_mse",
    "distogram_loss",
    "smooth_lddt_loss",
    "weighted_rigid_align",
]

_PAIRS_AT_ONCE = 2**22  # pairs of atoms, over all samples, whose distances are alive together
_FIRST_BREAK, _LAST_BREAK = 2.3125, 21.6875


def diffusion_mse(
    pred: Float[ArrayLike, "t a 3"],
    target: Float[ArrayLike, "a 3"],
    mask: Bool[ArrayLike, " a"],
    *,
    is_dna: Bool[ArrayLike, " a"],
    is_rna: Bool[ArrayLike, " a"],
    is_ligand: Bool[ArrayLike, " a"],
    sample_weight: Float[ArrayLike, " t"] | None = None,
) -> Float[Array, ""]:
    """Squared error after the truth is aligned with each sample: a third of its weighted sum over the atoms resolved.

    An atom weighs 1, of DNA or RNA 6, of a ligand 11, in the alignment too.

    Args:
        pred: denoised positions.
        target: the truth, in any frame.
        mask: atoms resolved.
        is_dna: atoms of DNA.
        is_rna: atoms of RNA.
        is_ligand: atoms of neither protein, DNA nor RNA.
        sample_weight: factor of each sample before the mean over them (`diffusion.edm_loss_weight`).

    Raises:
        ValueError: Shapes that do not fit.
    """
    pred, target, mask = _checked(pred, target, mask, is_dna=is_dna, is_rna=is_rna, is_ligand=is_ligand)
    nucleotide, ligand = jnp.asarray(is_dna) | jnp.asarray(is_rna), jnp.asarray(is_ligand)
    weight = jnp.where(mask, 1.0 + 5.0 * nucleotide + 10.0 * ligand, 0.0)
    aligned = weighted_rigid_align(target, pred, weight)
    squared = jnp.sum((pred - aligned) ** 2, axis=-1)
    per_sample = jnp.sum(jnp.where(mask, weight * squared, 0.0), axis=-1) / (3 * jnp.maximum(jnp.sum(mask), 1))
    return _mean_of_samples(per_sample, sample_weight)


def smooth_lddt_loss(
    pred: Float[ArrayLike, "t a 3"],
    target: Float[ArrayLike, "a 3"],
    mask: Bool[ArrayLike, " a"],
    *,
    is_nucleotide: Bool[ArrayLike, " a"],
) -> Float[Array, ""]:
    """1 - lDDT with sigmoids for thresholds, mean over samples (algorithm 27); 0 where there is no pair.

    Pairs (l, m) of two resolved atoms, truly nearer than 15 Å, or than 30 Å where l is of a nucleotide. Distances are
    made for a few rows l at a time, and again in the backward pass: [T, A, A] is never in memory.

    Raises:
        ValueError: Shapes that do not fit.
    """
    pred, target, mask = _checked(pred, target, mask, is_nucleotide=is_nucleotide)
    atoms = jnp.arange(mask.shape[0])
    radius = jnp.where(jnp.asarray(is_nucleotide), 30.0, 15.0)

    def block(atom, keep, radius, true, moved):
        distance = distances(true, target)
        pair = keep[:, None] & mask & (distance < radius[:, None]) & (atom[:, None] != atoms)
        error = jnp.abs(distances(jnp.moveaxis(moved, 1, 0), pred) - distance)
        score = sum(jax.nn.sigmoid(threshold - error) for threshold in (0.5, 1.0, 2.0, 4.0)) / 4
        return jnp.sum(jnp.where(pair, score, 0.0), axis=(1, 2)), jnp.sum(pair)

    rows = _rows(pred)
    scores, pairs = sum_over_rows(block, rows, atoms, mask, radius, target, jnp.moveaxis(pred, 0, 1))
    return jnp.where(pairs > 0, 1 - jnp.mean(scores) / jnp.maximum(pairs, 1), 0.0)


def bond_loss(
    pred: Float[ArrayLike, "t a 3"],
    target: Float[ArrayLike, "a 3"],
    mask: Bool[ArrayLike, " a"],
    *,
    bond_mask: Bool[ArrayLike, "a a"],
    sample_weight: Float[ArrayLike, " t"] | None = None,
) -> Float[Array, ""]:
    """Squared error of bonded distances, mean over the pairs of `bond_mask` whose atoms are both resolved, and samples.

    The truth may lie in any frame; `sample_weight` as for `diffusion_mse`. Without a pair it is 0.

    Raises:
        ValueError: Shapes that do not fit.
    """
    pred, target, mask = _checked(pred, target, mask)
    bond_mask = jnp.asarray(bond_mask)
    if bond_mask.shape != mask.shape * 2:
        raise ValueError(f"bond_mask: expected shape {mask.shape * 2}, got {bond_mask.shape}")

    def block(keep, bonded, true, moved):
        pair = keep[:, None] & mask & bonded
        error = distances(jnp.moveaxis(moved, 1, 0), pred) - distances(true, target)
        return jnp.sum(jnp.where(pair, error**2, 0.0), axis=(1, 2)), jnp.sum(pair)

    squared, pairs = sum_over_rows(block, _rows(pred), mask, bond_mask, target, jnp.moveaxis(pred, 0, 1))
    return _mean_of_samples(squared / jnp.maximum(pairs, 1), sample_weight)


def bond_list_loss(
    pred: Float[ArrayLike, "t a 3"],
    target: Float[ArrayLike, "a 3"],
    mask: Bool[ArrayLike, " a"],
    *,
    bonds: Int[ArrayLike, "e 2"],
    sample_weight: Float[ArrayLike, " t"] | None = None,
) -> Float[Array, ""]:
    """`bond_loss` of a list of bonds, each once, padded with -1: the feature `bonds`. It costs T E, not T A^2.

    Raises:
        ValueError: Shapes that do not fit.
    """
    pred, target, mask = _checked(pred, target, mask)
    bonds = jnp.asarray(bonds)
    if bonds.ndim != 2 or bonds.shape[1] != 2:
        raise ValueError(f"bonds: expected shape [E, 2], got {bonds.shape}")
    first, second = bonds[:, 0], bonds[:, 1]
    pair = (first >= 0) & (second >= 0) & mask[first] & mask[second]
    error = _lengths(pred, first, second) - _lengths(target, first, second)
    squared = jnp.sum(jnp.where(pair, error**2, 0.0), axis=-1)
    return _mean_of_samples(squared / jnp.maximum(jnp.sum(pair), 1), sample_weight)


def distogram_loss(
    logits: Float[ArrayLike, "n n bins"], coords: Float[ArrayLike, "n 3"], mask: Bool[ArrayLike, " n"]
) -> Float[Array, ""]:
    """Cross-entropy of binned distances, mean over the pairs of resolved tokens, a token with itself among them.

    Args:
        logits: 64 bins between 63 breaks, evenly from 2.3125 to 21.6875 Å.
        coords: representative atoms.
        mask: tokens whose representative atom is resolved.

    Raises:
        ValueError: Shapes that do not fit.
    """
    logits, coords, mask = jnp.asarray(logits), jnp.asarray(coords, jnp.float32), jnp.asarray(mask)
    tokens = mask.shape[0]
    if logits.ndim != 3 or logits.shape[:2] != (tokens, tokens) or coords.shape != (tokens, 3):
        raise ValueError(
            f"logits, coords: expected [{tokens}, {tokens}, bins] and [{tokens}, 3] beside a mask of {tokens}, "
            f"got {logits.shape} and {coords.shape}"
        )
    breaks = jnp.linspace(_FIRST_BREAK, _LAST_BREAK, logits.shape[-1] - 1)
    bins = jnp.searchsorted(breaks, distances(coords, coords))
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    entropy = -jnp.take_along_axis(log_probs, bins[..., None], axis=-1)[..., 0]
    return masked_mean(entropy, mask[:, None] & mask)


def _checked(pred: ArrayLike, target: ArrayLike, mask: ArrayLike, **kinds: ArrayLike) -> tuple[Array, Array, Array]:
    """The three as arrays, positions in float32; no gradient for the truth."""
    pred, target = jnp.asarray(pred, jnp.float32), jax.lax.stop_gradient(jnp.asarray(target, jnp.float32))
    mask = jnp.asarray(mask)
    if pred.ndim != 3 or pred.shape[-1] != 3:
        raise ValueError(f"pred: expected shape [T, A, 3], got {pred.shape}")
    if target.shape != pred.shape[1:]:
        raise ValueError(f"target: expected shape {pred.shape[1:]}, got {target.shape}")
    for name, value in {"mask": mask, **kinds}.items():
        if value.shape != pred.shape[1:2]:
            raise ValueError(f"{name}: expected shape {pred.shape[1:2]}, got {value.shape}")
    # Values of masked atoms are multiplied by 0 at places, which does not silence infinities and NaN.
    return jnp.where(mask[:, None], pred, 0.0), jnp.where(mask[:, None], target, 0.0), mask


def _rows(pred: Array) -> int:
    return _PAIRS_AT_ONCE // max(pred.shape[0] * pred.shape[1], 1)


def _lengths(coords: Float[Array, "*t a 3"], first: Int[Array, " e"], second: Int[Array, " e"]) -> Array:
    """Distances of listed pairs, [*t, E]."""
    step = coords[..., first, :] - coords[..., second, :]
    return distances(step[..., None, :], jnp.zeros_like(step[..., None, :]))[..., 0, 0]


def _mean_of_samples(loss: Float[Array, " t"], weight: ArrayLike | None) -> Float[Array, ""]:
    if weight is None:
        return jnp.mean(loss)
    weight = jnp.asarray(weight, jnp.float32)
    if weight.shape != loss.shape:
        raise ValueError(f"sample_weight: expected shape {loss.shape}, got {weight.shape}")
    return jnp.mean(weight * loss)
