"""How good a structure is, and how good the network says it is. One structure; `vmap` for more."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.megafold.geometry import ArrayLike, distances, weighted_rigid_align

THRESHOLDS = (0.5, 1.0, 2.0, 4.0)
MAX_ERROR = 32.0

_ROWS = 256


def preserved(pred: Float[Array, "*shape"], true: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Share of lDDT's four thresholds, in Å, that the error of a distance stays below."""
    below = jnp.abs(pred - true)[..., None] < jnp.array(THRESHOLDS)
    return jnp.mean(below, axis=-1, dtype=jnp.float32)


def atom_lddt(
    pred: Float[ArrayLike, "a 3"],
    target: Float[ArrayLike, "a 3"],
    mask: Bool[ArrayLike, " a"],
    *,
    is_nucleotide: Bool[ArrayLike, " a"] | None = None,
    atom_token: Int[ArrayLike, " a"] | None = None,
) -> tuple[Float[Array, " a"], Int[Array, " a"]]:
    """Each atom's lDDT (Mariani et al., 2013), 0 to 1, and the number of its distances; 0 where there are none.

    Args:
        pred: positions, in any frame.
        target: the truth.
        mask: atoms resolved.
        is_nucleotide: atoms whose distances count up to 30 Å; 15 Å for others.
        atom_token: where given, distances inside a token do not count.
    """
    pred, target, mask = jnp.asarray(pred, jnp.float32), jnp.asarray(target, jnp.float32), jnp.asarray(mask)
    atoms = jnp.arange(mask.shape[0])
    groups = atoms if atom_token is None else jnp.asarray(atom_token)
    radius = jnp.where(jnp.zeros_like(mask) if is_nucleotide is None else jnp.asarray(is_nucleotide), 30.0, 15.0)

    def one(row):
        pred_row, target_row, keep, group, reach = row
        true = distances(target_row[None], target)[0]
        pair = keep & mask & (true < reach) & (group != groups)
        hits = jnp.where(pair, preserved(distances(pred_row[None], pred)[0], true), 0.0)
        return jnp.sum(hits), jnp.sum(pair)

    hits, pairs = jax.lax.map(one, (pred, target, mask, groups, radius), batch_size=_ROWS)
    return hits / jnp.maximum(pairs, 1), pairs


def token_lddt(
    pred: Float[ArrayLike, "a 3"],
    target: Float[ArrayLike, "a 3"],
    mask: Bool[ArrayLike, " a"],
    *,
    atom_token: Int[ArrayLike, " a"],
    num_tokens: int,
    is_nucleotide: Bool[ArrayLike, " a"] | None = None,
) -> Float[Array, " n"]:
    """Each token's lDDT: over all distances of its atoms to those of other tokens; 0 where there are none."""
    scores, pairs = atom_lddt(pred, target, mask, is_nucleotide=is_nucleotide, atom_token=atom_token)
    hits = jax.ops.segment_sum(scores * pairs, jnp.asarray(atom_token), num_tokens)
    return hits / jnp.maximum(jax.ops.segment_sum(pairs, jnp.asarray(atom_token), num_tokens), 1)


def lddt(
    pred: Float[ArrayLike, "a 3"],
    target: Float[ArrayLike, "a 3"],
    mask: Bool[ArrayLike, " a"],
    *,
    is_nucleotide: Bool[ArrayLike, " a"] | None = None,
    atom_token: Int[ArrayLike, " a"] | None = None,
) -> Float[Array, ""]:
    """The lDDT over all distances of the structure, 0 to 1; arguments as for `atom_lddt`."""
    scores, pairs = atom_lddt(pred, target, mask, is_nucleotide=is_nucleotide, atom_token=atom_token)
    return jnp.sum(scores * pairs) / jnp.maximum(jnp.sum(pairs), 1)


def rmsd(
    pred: Float[ArrayLike, "a 3"], target: Float[ArrayLike, "a 3"], mask: Bool[ArrayLike, " a"]
) -> Float[Array, ""]:
    """Root mean squared distance of the resolved atoms after the best rigid alignment, Å."""
    pred, mask = jnp.asarray(pred, jnp.float32), jnp.asarray(mask)
    weight = mask.astype(jnp.float32)
    squared = jnp.sum((pred - weighted_rigid_align(target, pred, weight)) ** 2, axis=-1)
    return jnp.sqrt(jnp.sum(jnp.where(mask, squared, 0.0)) / jnp.maximum(jnp.sum(weight), 1.0))


def expected_plddt(logits: Float[ArrayLike, "*shape bins"]) -> Float[Array, "*shape"]:
    """The network's estimate of lDDT, 0 to 100: the mean over even bins of that range."""
    return _expected(logits, 100.0)


def expected_error(logits: Float[ArrayLike, "*shape bins"]) -> Float[Array, "*shape"]:
    """The network's estimate of an error, Å: the mean over even bins from 0 to 32 Å (aligned error, distance error)."""
    return _expected(logits, MAX_ERROR)


def _expected(logits: ArrayLike, top: float) -> Array:
    bins = logits.shape[-1]
    centres = (jnp.arange(bins) + 0.5) * (top / bins)
    return jnp.sum(jax.nn.softmax(jnp.asarray(logits, jnp.float32), axis=-1) * centres, axis=-1)
