"""A structure as a file shows it: atoms, and the residues they belong to, seen or not."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxlab.megafold.features import RESTYPES

ONE_LETTER = {
    **dict(zip(RESTYPES[:20], "ARNDCQEGHILKMFPSTWYV")),
    **{name: name for name in ("A", "G", "C", "U")},
    **{f"D{letter}": letter for letter in "AGCT"},
}
WATER = frozenset({"HOH", "DOD", "WAT", "H2O"})
HYDROGEN = frozenset({"H", "D", "T"})

End = tuple[int, str]  # an atom as the ends of bonds are named: residue, name


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """Atoms A in residues R; a residue of a polymer may have none, where the file does not show it.

    Attributes:
      coords: Å.
      atom_name, res_name, chain_id, element: strings; the chain is the author's, elements are upper-case.
      b_factor, occupancy: as the file has them; of a prediction, `b_factor` is the pLDDT.
      residue: which residue an atom belongs to; never falls.
      residue_name, residue_chain: of each residue.
      residue_unit: asymmetric unit: one polymer, one ligand, one ion each.
      residue_number: position in the polymer, from 1; in a ligand of several residues, which of them.
      residue_polymer: whether it is part of a polymer.
      unit_kind: "protein", "dna", "rna" or "ligand" of each unit.
      bonds: covalent bonds that the file lists between two residues.
      component_bonds: bonds inside components, by component, that the file lists.
      resolution: Å; 0 where unknown.
    """

    coords: Float[np.ndarray, "A 3"]
    atom_name: np.ndarray
    res_name: np.ndarray
    chain_id: np.ndarray
    element: np.ndarray
    b_factor: Float[np.ndarray, " A"]
    occupancy: Float[np.ndarray, " A"]
    residue: Int[np.ndarray, " A"]
    residue_name: np.ndarray
    residue_chain: np.ndarray
    residue_unit: Int[np.ndarray, " R"]
    residue_number: Int[np.ndarray, " R"]
    residue_polymer: Bool[np.ndarray, " R"]
    unit_kind: tuple[str, ...]
    bonds: tuple[tuple[End, End], ...] = ()
    component_bonds: Mapping[str, Sequence[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    resolution: float = 0.0

    @property
    def chains(self) -> tuple[str, ...]:
        """The author's chains in the order of the file."""
        return tuple(dict.fromkeys(self.residue_chain.tolist()))

    @functools.cached_property
    def observed(self) -> Bool[np.ndarray, " R"]:
        """The residues that have an atom; all of them, where there is no atom at all."""
        seen = np.zeros(len(self.residue_name), np.bool_)
        seen[self.residue if len(self.residue) else slice(None)] = True
        return seen

    def sequence(self, chain: str, *, unobserved: bool = False) -> str:
        """One letter for every residue of the chain's polymers, X for what is not standard.

        Args:
          chain: the author's name of it.
          unobserved: count also the residues that the file does not show.

        Raises:
          ValueError: no such chain; the known ones are listed.
        """
        residues = self.polymer(chain)
        return self.letters(residues if unobserved else residues[self.observed[residues]])

    def letters(self, residues: np.ndarray) -> str:
        """One letter for each of these residues."""
        return "".join(ONE_LETTER.get(name, "X") for name in self.residue_name[residues].tolist())

    def polymer(self, chain: str) -> np.ndarray:
        """The residues of the chain's polymers, seen or not.

        Raises:
          ValueError: no such chain; the known ones are listed.
        """
        if chain not in self.chains:
            raise ValueError(f"chain: expected one of {list(self.chains)}, got {chain!r}")
        return np.flatnonzero((self.residue_chain == chain) & self.residue_polymer)


def kind_of(names: Sequence[str]) -> str:
    """What a polymer of these residues is: what most of its standard residues are; a protein where none is."""
    counts = {
        "protein": sum(name in RESTYPES[:21] for name in names),
        "rna": sum(name in RESTYPES[21:26] for name in names),
        "dna": sum(name in RESTYPES[26:31] for name in names),
    }
    return max(counts, key=lambda kind: counts[kind])
