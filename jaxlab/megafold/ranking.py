"""Which prediction is the best, by the network's own confidence (AlphaFold3, supplement, section 5.9). NumPy."""

import itertools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float

CLASH = 1.1  # Å between two atoms of different polymers
_CLASHES, _SHARE = 100, 0.5  # more of them, or of the smaller polymer's atoms, make a structure clash
_PENALTY = 100.0


def tm_scale(tokens: int) -> float:
    """The distance, in Å, at which an error counts half in the TM-score of so many tokens."""
    return 1.24 * (max(tokens, 19) - 15) ** (1 / 3) - 1.8


def predicted_tm(
    term: Float[np.ndarray, "n n"], has_frame: Bool[np.ndarray, " n"], counts: Bool[np.ndarray, "n n"] | None = None
) -> float:
    """The TM-score that the aligned errors promise: of the frame that sees the structure best.

    Args:
      term: mean of 1 / (1 + (error / `tm_scale`)^2) of token j in the frame of token i.
      has_frame: tokens whose frames count.
      counts: pairs that count, for instance those between chains (ipTM); None: all.

    Returns:
      0 to 1; 0 where nothing counts.
    """
    counts = np.ones(term.shape, np.bool_) if counts is None else counts
    number = counts.sum(axis=1)
    seen = np.where(counts, term, 0).sum(axis=1) / np.maximum(number, 1)
    return float(np.where(has_frame & (number > 0), seen, 0).max(initial=0.0))


def has_clash(coords: Float[np.ndarray, "a 3"], features: Mapping[str, np.ndarray]) -> bool:
    """Whether two polymers run into each other: 1.1 Å between over 100 atoms, or over half of the smaller one's.

    Args:
      coords: of the features' atoms.
      features: of one structure, without padding.
    """
    from scipy.spatial import KDTree

    token = features["atom_token"]
    chain = np.where(features["is_ligand"], -1, features["asym_id"])[token]
    atoms = {name: coords[chain == name] for name in np.unique(chain[chain >= 0])}
    for one, other in itertools.combinations(atoms.values(), 2):
        near = KDTree(one).query_ball_tree(KDTree(other), CLASH)
        hit = sum(map(bool, near))
        if max(hit, len({atom for each in near for atom in each})) > min(_CLASHES, _SHARE * min(len(one), len(other))):
            return True
    return False


def ranking_score(ptm: float, iptm: float | None, clash: bool) -> float:
    """0.8 ipTM + 0.2 pTM, or pTM where there is one chain, less 100 for a clash.

    AlphaFold3's half of the disordered fraction is left out: it needs the accessible surface.
    """
    return (ptm if iptm is None else 0.8 * iptm + 0.2 * ptm) - _PENALTY * clash
