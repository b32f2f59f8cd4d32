"""Structures: what the real files hold, against gemmi's own reading; files that are none; and writing them back."""

import gzip

import numpy as np
import pytest

from jaxlab.core.errors import MissingExtra
from jaxlab.megafold.data import MMCIFError, read_mmcif, with_coords, write_mmcif
from tests.megafold.data_files import af3, structure

gemmi = pytest.importorskip("gemmi")

# Atoms, chains, kinds of the units, length of each chain's sequence: what is shown, and with what is not; ångström.
FILES = {
    "721p-assembly1.cif": (2708, "A B", "protein ligand ligand protein ligand ligand", [166, 166], [166, 166], 2.0),
    "209d-assembly1.cif": (408, "A B C", "dna dna protein", [8, 8, 11], [8, 8, 11], 3.0),
    "7a4d-assembly1.cif": (
        *(4155, "A B C D E F", "protein protein protein protein protein ligand protein"),
        *([118, 117, 113, 112, 41, 41], [118, 117, 113, 112, 41, 41], 2.694),
    ),
    "5y2e.cif": (353, "A", "protein", [45], [47], 2.7),
    "6s61.cif": (2760, "M", "protein ligand", [172], [182], 1.84),
    "6ydw.cif": (1775, "Bj", "protein", [217], [279], 4.2),
    "7rye.cif": (612, "J", "protein", [78], [80], 3.9),
    "AF-P01112-F1-model_v4.cif.gz": (1490, "A", "protein", [189], [189], 0.0),
}
RAS = "MTEYKLVVVGAGGVGKSALTIQLIQNHFVDEYDPTIEDSYRKQVVIDGETCLLDILDTAG"
ATOMS = """data_made_up
loop_
_entity.id
_entity.type
1 polymer
2 non-polymer
3 water
loop_
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_alt_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_entity_id
_atom_site.label_seq_id
_atom_site.auth_seq_id
_atom_site.auth_asym_id
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.occupancy
_atom_site.pdbx_PDB_model_num
N  N     . GLY A 1 1 5 X 0.0 0.0 0.0 1.00 1
C  CA    A GLY A 1 1 5 X 1.0 0.0 0.0 0.40 1
C  CA    B GLY A 1 1 5 X 1.1 0.0 0.0 0.60 1
C  C     A GLY A 1 1 5 X 2.0 0.0 0.0 0.40 1
C  C     B GLY A 1 1 5 X 2.1 0.0 0.0 0.60 1
N  N     A ALA A 1 2 6 X 3.0 0.0 0.0 0.50 1
N  N     B SER A 1 2 6 X 3.1 0.0 0.0 0.50 1
MG MG    . MG  B 2 . 9 X 5.0 0.0 0.0 1.00 1
O  O     . HOH C 3 . 9 X 7.0 0.0 0.0 1.00 1
O  O     . HOH C 3 . 10 X 8.0 0.0 0.0 1.00 1
N  N     . GLY A 1 1 5 X 9.0 0.0 0.0 1.00 2
"""


@pytest.mark.parametrize("name", FILES)
def test_real_files(name):
    ours = structure(name)
    atoms, chains, kinds, shown, listed, resolution = FILES[name]
    assert ours.coords.shape == (atoms, 3)
    assert ours.coords.dtype == np.float32
    assert list(ours.chains) == chains.split()
    assert list(ours.unit_kind) == kinds.split()
    assert [len(ours.sequence(chain)) for chain in ours.chains] == shown
    assert [len(ours.sequence(chain, unobserved=True)) for chain in ours.chains] == listed
    assert ours.resolution == pytest.approx(resolution)
    model = gemmi.read_structure(str(af3(f"mmcif/{name}")))[0]
    theirs = {}
    for chain in model:
        for residue in chain:
            for atom in residue:
                key = (chain.name, residue.seqid.num, residue.name, atom.name)
                if key not in theirs or theirs[key].occ < atom.occ:
                    theirs[key] = atom
    assert len(theirs) == atoms
    found = {(c, r, a): x for c, r, a, x in zip(ours.chain_id, ours.res_name, ours.atom_name, ours.coords)}
    for (chain, _, residue, atom), place in list(theirs.items())[-50:]:
        if chain == ours.chains[-1] and residue in ("MG", "GNP", "ZN"):
            np.testing.assert_allclose(found[chain, residue, atom], place.pos.tolist(), atol=1e-3)
    np.testing.assert_allclose(
        np.sort(ours.coords[:, 0]), np.sort([atom.pos.x for atom in theirs.values()]), atol=1e-3, rtol=1e-6
    )


def test_who_is_who():
    ras, antibody = structure("721p-assembly1.cif"), structure("7a4d-assembly1.cif")
    assert ras.sequence("A")[:60] == RAS.replace("AGQ", "AGL")
    assert ras.sequence("A") == ras.sequence("B")
    np.testing.assert_array_equal(ras.residue_name[~ras.residue_polymer], ["MG", "GNP", "MG", "GNP"])
    assert len(set(ras.residue_unit[~ras.residue_polymer])) == 4
    assert antibody.sequence("E") == "XLEEELKQLEEELQAIEEQLAQLQWKAQARKEKLAQLKEKL"  # an acetyl cap, listed
    assert structure("209d-assembly1.cif").sequence("A") == "GAAGCTTC"
    assert structure("209d-assembly1.cif").sequence("C") == "TXPXXXTXPXX"  # the sixth is a chromophore
    ferritin = structure("6s61.cif")
    assert ferritin.chains == ("M",)
    assert "H" in ferritin.element  # hydrogens are kept here
    assert ferritin.sequence("M", unobserved=True).startswith("MTTASPSQ")
    assert ferritin.sequence("M").startswith("PSQ")
    with pytest.raises(ValueError, match=r"chain: expected one of \['M'\], got 'A'"):
        ferritin.sequence("A")


@pytest.mark.latest
def test_alternatives_models_and_waters(tmp_path):
    path = tmp_path / "made_up.cif"
    path.write_text(ATOMS)
    made = read_mmcif(path)
    assert made.atom_name.tolist() == ["N", "CA", "C", "N", "MG", "O", "O"]
    np.testing.assert_allclose(made.coords[:, 0], [0.0, 1.1, 2.1, 3.0, 5.0, 7.0, 8.0])  # of equals the first
    assert made.sequence("X") == "GA"
    assert made.residue_name.tolist() == ["GLY", "ALA", "MG", "HOH", "HOH"]
    assert made.residue_unit.tolist() == [0, 0, 1, 2, 2]
    packed = tmp_path / "without_a_telling_name"
    packed.write_bytes(gzip.compress(ATOMS.encode()))
    np.testing.assert_array_equal(read_mmcif(packed).coords, made.coords)


@pytest.mark.parametrize("name", ["721p-assembly1.cif", "209d-assembly1.cif", "6s61.cif", "7a4d-assembly1.cif"])
def test_written_and_read_back(name, tmp_path):
    ours = structure(name)
    plddt = np.linspace(0, 100, len(ours.residue), dtype=np.float32)
    write_mmcif(ours, tmp_path / "out.cif", coords=ours.coords + 1, b_factor=plddt)
    again = read_mmcif(tmp_path / "out.cif")
    np.testing.assert_allclose(again.coords, ours.coords + 1, atol=6e-4)
    np.testing.assert_allclose(again.b_factor, plddt, atol=6e-3)
    for field in ("atom_name", "res_name", "chain_id", "element", "residue", "residue_name", "residue_number"):
        np.testing.assert_array_equal(getattr(again, field), getattr(ours, field))
    for field in ("residue_unit", "residue_polymer"):
        np.testing.assert_array_equal(getattr(again, field), getattr(ours, field))
    assert again.unit_kind == ours.unit_kind
    assert set(again.bonds) == set(ours.bonds)
    theirs = gemmi.read_structure(str(tmp_path / "out.cif"))
    sites = [site.atom for site in theirs[0].all()]
    assert len(sites) == len(ours.residue)
    assert max(atom.b_iso for atom in sites) == pytest.approx(100)
    assert {chain.name for chain in theirs[0]} == set(ours.chains)


def test_a_prediction_is_written(tmp_path):
    af3("ccd")
    dna = structure("209d-assembly1.cif")
    made = with_coords(dna, np.arange(414 * 3, dtype=np.float32).reshape(414, 3), np.full(414, 70, np.float32))
    write_mmcif(made, tmp_path / "out.cif")
    again = read_mmcif(tmp_path / "out.cif")
    np.testing.assert_array_equal(again.coords, made.coords)
    assert again.sequence("C") == dna.sequence("C")
    with pytest.raises(ValueError, match=r"expected shapes \(414, 3\)"):
        with_coords(dna, np.zeros((3, 3), np.float32), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"expected shapes \(408, 3\)"):
        write_mmcif(dna, tmp_path / "out.cif", coords=np.zeros((3, 3), np.float32))


def dropped(text, start):
    return "\n".join(line for line in text.split("\n") if not line.startswith(start))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not an mmCIF file"),
        (b"just some words", "not an mmCIF file"),
        (b"\x1f\x8bbroken", "not an mmCIF file"),
        (b"data_empty\n_entry.id X\n", "expected atoms"),
        ("\n".join(ATOMS.split("\n")[:1] + ATOMS.split("\n")[7:]).encode(), "expected entities"),
        (ATOMS.replace("_atom_site.Cartn_y", "_atom_site.other").encode(), "expected a column _atom_site.Cartn_y"),
        (ATOMS.replace("0.0 0.0 1.00 1\nC  CA", "0.0 far 1.00 1\nC  CA", 1).encode(), "expected numbers"),
        (ATOMS.replace("0.0 0.0 1.00 1\nC  CA", "0.0 ? 1.00 1\nC  CA", 1).encode(), "expected finite coordinates"),
    ],
)
def test_what_is_no_structure(content, problem, tmp_path):
    path = tmp_path / "bad.cif"
    path.write_bytes(content)
    with pytest.raises(MMCIFError, match=f"bad.cif: {problem}"):
        read_mmcif(path)


def test_a_missing_file_and_a_missing_package(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        read_mmcif(tmp_path / "none.cif")
    path = tmp_path / "made_up.cif"
    path.write_text(ATOMS)
    monkeypatch.setitem(__import__("sys").modules, "gemmi", None)
    with pytest.raises(MissingExtra, match="folding"):
        read_mmcif(path)
