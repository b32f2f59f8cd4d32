"""Features of real structures: counts, chemistry, alignments, templates, and what cannot be featurized."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.data import A3MError, Chain, featurize, from_sequences, read_job, synthetic_batch
from jaxlab.megafold.data.frames import atom_frames, valid_frames
from jaxlab.megafold.features import FEATURES, GAP, RESTYPES, UNKNOWN, abstract_batch
from tests.megafold.data_files import af3, features, ras, structure
from tests.oracles import megafold_data as oracle

pytest.importorskip("gemmi")

# Tokens of each kind (protein, dna, rna, ligand), atoms, unresolved atoms, chains, entities, bonds.
FILES = {
    "721p-assembly1.cif": ((332, 0, 0, 66), 2708, 2, 6, 3, 68),
    "209d-assembly1.cif": ((4, 16, 0, 58), 414, 6, 3, 2, 66),
    "7a4d-assembly1.cif": ((540, 0, 0, 7), 4203, 48, 7, 6, 7),
    "5y2e.cif": ((47, 0, 0, 0), 396, 43, 1, 1, 0),
    "6s61.cif": ((182, 0, 0, 1), 1480, 70, 2, 2, 0),
    "6ydw.cif": ((279, 0, 0, 0), 2266, 491, 1, 1, 0),
    "7rye.cif": ((80, 0, 0, 0), 624, 13, 1, 1, 0),
    "AF-P01112-F1-model_v4.cif.gz": ((189, 0, 0, 0), 1489, 0, 1, 1, 0),
}


MOLECULE = '{"sequences": [{"protein": {"id": "A", "sequence": "M"%s}}'


def assert_valid(made):
    """Types and shapes of FEATURES, and indices that mean something."""
    size = {"N": len(made["restype"]), "A": len(made["resolved"])}
    assert made.keys() == FEATURES.keys()
    for name, feature in FEATURES.items():
        expected = np.int8 if name == "msa" else feature.dtype
        assert made[name].dtype == expected, name
        shape = made[name].shape
        assert len(shape) == len(feature.axes), name
        for have, axis in zip(shape, feature.axes):
            assert have == size.setdefault(axis, have) if isinstance(axis, str) else have == axis, name
    token = made["atom_token"]
    assert (np.diff(token) >= 0).all()
    np.testing.assert_array_equal(np.unique(token), np.arange(size["N"]))
    here = np.arange(size["N"])
    for name in ("center_atom", "representative_atom"):
        np.testing.assert_array_equal(token[made[name]], here)
    for first, second in made["bonds"]:
        assert made["token_bonds"][token[first], token[second]]
        assert made["token_bonds"][token[second], token[first]]
    assert made["token_bonds"].sum() == 2 * len({tuple(sorted(token[pair])) for pair in made["bonds"]})
    np.testing.assert_array_equal(
        sum(made[f"is_{kind}"].astype(int) for kind in ("protein", "dna", "rna", "ligand")), 1
    )
    assert not made["coords"][~made["resolved"]].any()
    np.testing.assert_allclose(made["profile"].sum(axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(made["msa"][0], made["restype"])


@pytest.mark.parametrize("name", FILES)
def test_real_files(name):
    made = features(name)
    kinds, atoms, unresolved, chains, entities, bonds = FILES[name]
    assert_valid(made)
    assert tuple(int(made[f"is_{kind}"].sum()) for kind in ("protein", "dna", "rna", "ligand")) == kinds
    assert len(made["resolved"]) == atoms
    assert (~made["resolved"]).sum() == unresolved
    assert made["asym_id"].max() + 1 == chains
    assert made["entity_id"].max() + 1 == entities
    assert len(made["bonds"]) == bonds
    assert made["has_frame"].sum() <= sum(kinds)
    frames = made["frame_atoms"][made["has_frame"]]
    assert made["resolved"][frames].all()
    protein = made["is_protein"] & made["has_frame"]
    places = made["coords"][made["frame_atoms"][protein]]  # N CA C: two bonds of any protein
    np.testing.assert_allclose(np.linalg.norm(places[:, 0] - places[:, 1], axis=-1), 1.46, atol=0.1)
    np.testing.assert_allclose(np.linalg.norm(places[:, 2] - places[:, 1], axis=-1), 1.52, atol=0.1)
    assert (made["center_atom"][protein] == made["frame_atoms"][protein, 1]).all()
    lengths = np.linalg.norm(made["coords"][made["bonds"][:, 0]] - made["coords"][made["bonds"][:, 1]], axis=-1)
    seen = made["resolved"][made["bonds"]].all(axis=1)
    assert ((lengths[seen] > 1.0) & (lengths[seen] < 2.0)).all()


def test_chemistry():
    made = ras()
    met = slice(0, 8)  # the first residue
    names = ["".join(chr(c + 32) for c in name).strip() for name in made["ref_name"][met]]
    assert names == ["N", "CA", "C", "O", "CB", "CG", "SD", "CE"]
    assert made["ref_element"][met].tolist() == [7, 6, 6, 8, 6, 6, 16, 6]
    assert np.linalg.norm(made["ref_pos"][1] - made["ref_pos"][0]) == pytest.approx(1.47, abs=0.05)
    assert made["restype"][0] == RESTYPES.index("MET")
    lysine = made["atom_token"] == 4
    assert made["ref_charge"][lysine].sum() == 1  # as the record has it
    representative = made["representative_atom"][made["is_protein"]]
    glycine = made["restype"][made["is_protein"]] == RESTYPES.index("GLY")
    names = made["ref_name"][representative]
    assert (names[glycine, :3] == [35, 33, 0]).all()  # CA
    assert (names[~glycine, :3] == [35, 34, 0]).all()  # CB
    ligand = made["is_ligand"]
    magnesium = np.flatnonzero(made["ref_element"] == 12)
    assert len(magnesium) == 2
    assert not made["has_frame"][made["atom_token"][magnesium]].any()
    assert (made["restype"][ligand] == UNKNOWN).all()
    gnp = np.flatnonzero(ligand & (made["sym_id"] == 0) & (made["residue_index"] == 1))
    assert len(gnp) == 33
    unknown = np.isin(made["atom_token"], np.flatnonzero(ligand))
    assert not made["ref_pos"][unknown].any()  # no record here: never the truth in its place
    dna = features("209d-assembly1.cif")
    base = {"DA": "C4", "DG": "C4", "DC": "C2", "DT": "C2"}
    for token in np.flatnonzero(dna["is_dna"]):
        want = base[RESTYPES[dna["restype"][token]]]
        assert dna["ref_name"][dna["representative_atom"][token]].tolist() == [ord(c) - 32 for c in want.ljust(4)]
    chromophore = dna["is_ligand"] & (dna["residue_index"] == 6)
    assert chromophore.sum() == 22
    outside = dna["token_bonds"][chromophore][:, ~chromophore]
    assert outside.sum() == 2  # its two amide bonds into the peptide rings


def test_copies_share_an_entity():
    made = ras()
    protein = made["is_protein"]
    assert (made["entity_id"][protein] == 0).all()
    np.testing.assert_array_equal(made["sym_id"][protein], np.repeat([0, 1], 166))
    np.testing.assert_array_equal(made["residue_index"][protein], np.tile(np.arange(1, 167), 2))
    antibody = features("7a4d-assembly1.cif")
    _, first = np.unique(antibody["asym_id"], return_index=True)
    np.testing.assert_array_equal(antibody["entity_id"][first], [0, 1, 2, 3, 4, 5, 4])
    np.testing.assert_array_equal(antibody["sym_id"][first], [0, 0, 0, 0, 0, 0, 1])


def test_alignment_of_one_entity():
    made = ras()
    _, rows, deletions = oracle.a3m(af3("msa/721p-assembly1A_protein.a3m").read_text())
    assert made["msa"].shape == (15953, 398)
    first, second = (np.flatnonzero(made["is_protein"] & (made["sym_id"] == copy)) for copy in (0, 1))
    code = {letter: place for place, letter in enumerate(oracle.PROTEIN)} | {"-": GAP, "B": 3, "U": 4, "Z": 6}
    for row in (1, 40, 9000, 15952):
        np.testing.assert_array_equal(made["msa"][row, first], [code.get(letter, UNKNOWN) for letter in rows[row]])
        want = [oracle.deletion_value(count) for count in deletions[row]]
        np.testing.assert_allclose(made["deletion_value"][row, first], want, rtol=1e-6)
    for name in ("msa", "msa_mask", "deletion_value"):
        np.testing.assert_array_equal(made[name][:, first], made[name][:, second])
    assert made["msa_mask"][:, first].all()
    assert not made["msa_mask"][1:, made["is_ligand"]].any()
    assert made["msa_mask"][0].all()
    assert (made["msa"][1:, made["is_ligand"]] == GAP).all()
    for column in (0, 61, 165):
        np.testing.assert_allclose(made["profile"][second[column]], oracle.profile(rows, column), atol=1e-5)
    np.testing.assert_allclose(made["deletion_mean"][first], np.mean(deletions, axis=0), rtol=1e-5)
    assert made["profile"][made["is_ligand"], UNKNOWN].all()


def test_alignments_of_several_entities():
    antibody = structure("7a4d-assembly1.cif")
    msas = {"A": af3("msa/7a4d-assembly1A_protein.a3m"), "E": af3("msa/7a4d-assembly1E_protein.a3m")}
    made = featurize(antibody, msas=msas)
    assert_valid(made)
    assert made["msa"].shape[0] == 1 + 12095 + 1
    first, coils = made["asym_id"] == 0, made["entity_id"] == 4
    cap = coils & (made["residue_index"] == 1)
    np.testing.assert_array_equal(made["msa_mask"][1:12096], np.tile(first, (12095, 1)))
    np.testing.assert_array_equal(made["msa_mask"][12096], coils)
    assert (made["msa"][12096, coils & ~cap] == made["restype"][coils & ~cap]).all()
    assert (made["msa"][12096, cap] == GAP).all()  # the cap is not in the alignment: its columns are gaps
    few = featurize(antibody, msas=msas, options={"max_msa_rows": 8})
    assert few["msa"].shape[0] == 8
    np.testing.assert_array_equal(few["msa"][:7], made["msa"][:7])
    np.testing.assert_array_equal(few["msa"][7], made["msa"][12096])  # each alignment has its share
    np.testing.assert_array_equal(few["profile"], made["profile"])  # of the whole alignment all the same
    assert featurize(antibody, msas=msas, options={"max_msa_tokens": 547 * 5})["msa"].shape[0] == 5
    assert featurize(antibody, msas=msas, options={"max_msa_rows": 1})["msa"].shape[0] == 1


@pytest.mark.parametrize("part", ["whole", "shown"])
def test_a_query_may_leave_out_what_is_not_shown(part, tmp_path):
    af3("ccd")
    ferritin = structure("6s61.cif")
    query = ferritin.sequence("M", unobserved=part == "whole")
    (tmp_path / "m.a3m").write_text(f">q\n{query}\n>r\n{query.replace('P', '-')}\n")
    made = featurize(ferritin, msas={"M": tmp_path / "m.a3m"})
    chain = made["asym_id"] == 0
    seen = made["resolved"][made["center_atom"]][chain]
    row = made["msa"][1, chain]
    proline = made["restype"][chain] == RESTYPES.index("PRO")
    counted = ~proline & (seen | (part == "whole"))
    np.testing.assert_array_equal(row[counted], made["restype"][chain][counted])
    assert (row[~counted] == GAP).all()


def test_templates():
    ours = structure("721p-assembly1.cif")
    files = [af3("mmcif/AF-P01112-F1-model_v4.cif.gz"), af3("mmcif/721p-assembly1.cif")]
    made = featurize(ours, templates={"A": files})
    assert_valid(made)
    protein = made["is_protein"]
    assert made["template_mask"].tolist() == [True, True]
    np.testing.assert_array_equal(made["template_restype"][1, protein], made["restype"][protein])
    differs = np.flatnonzero(made["template_restype"][0, protein] != made["restype"][protein])
    np.testing.assert_array_equal(differs, [60, 226])  # Q61L
    first = protein & (made["sym_id"] == 0)
    at = made["representative_atom"][first]
    np.testing.assert_array_equal(made["template_pos"][1, first], made["coords"][at])
    np.testing.assert_array_equal(made["template_frame"][1, first], made["coords"][made["frame_atoms"][first]])
    np.testing.assert_array_equal(made["template_frame_mask"][1, protein], True)
    assert not made["template_pos_mask"][:, ~protein].any()
    assert (made["template_restype"][:, ~protein] == GAP).all()
    assert featurize(ours, templates={"A": files}, options={"max_templates": 1})["template_mask"].shape == (1,)


def test_frames_of_atoms():
    places = np.array([[0, 0, 0], [1, 0, 0], [1, 1.5, 0], [9, 9, 9]], np.float32)
    seen = np.array([True, True, True, False])
    frames = atom_frames(places, seen)
    np.testing.assert_array_equal(frames, [[1, 0, 2], [0, 1, 2], [1, 2, 0], [3, 3, 3]])
    np.testing.assert_array_equal(valid_frames(frames, places, seen), [True, True, True, False])
    line = np.array([[0, 0, 0], [1, 0, 0], [2, 0.1, 0]], np.float32)
    assert not valid_frames(atom_frames(line, seen[:3]), line, seen[:3]).any()
    np.testing.assert_array_equal(atom_frames(places[:2], seen[:2]), [[0, 0, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"msas": {"Z": "1A"}}, r"chain: expected one of \['A', 'B'\], got 'Z'"),
        ({"msas": {"A": "other"}}, "expected the query of .* to be chain 'A', 166 residues, got 118"),
        ({"msas": {"A": "changed"}}, "from residue 2: 'TEYKL.* and 'WEYKL"),
        ({"msas": {"A": "1A", "B": "two"}}, "expected one alignment for chains of one sequence"),
        ({"options": {"max_msa_row": 3}}, "did you mean 'max_msa_rows'"),
        ({"options": {"max_msa_rows": 0}}, r"options\['max_msa_rows'\]: expected at least 1, got 0"),
        ({"templates": {"A": "1A"}}, "expected a list of paths"),
        ({"templates": {"Z": []}}, "expected one of"),
    ],
)
def test_bad_inputs(given, problem, tmp_path):
    af3("ccd")
    sequence = structure("721p-assembly1.cif").sequence("A")
    texts = {"1A": sequence, "two": f"{sequence}\n>r\n{sequence}", "changed": "MW" + sequence[2:], "other": "A" * 118}
    for name, text in texts.items():
        (tmp_path / name).write_text(f">q\n{text}\n")
    if "msas" in given:
        given = {"msas": {chain: tmp_path / name for chain, name in given["msas"].items()}}
    with pytest.raises(ValueError, match=problem):
        featurize(structure("721p-assembly1.cif"), **given)


def test_a_broken_alignment_names_its_file(tmp_path):
    af3("ccd")
    (tmp_path / "broken.a3m").write_text(">q\nMT\n>r\nM\n")
    with pytest.raises(A3MError, match=r"broken.a3m, line 3"):
        featurize(structure("721p-assembly1.cif"), msas={"A": tmp_path / "broken.a3m"})


def test_sequences_alone():
    af3("ccd")
    made = featurize(from_sequences({"A": "MAGX", "B": "MAGX"}))
    assert_valid(made)
    assert [RESTYPES[restype] for restype in made["restype"]] == ["MET", "ALA", "GLY", "UNK"] * 2
    assert not made["resolved"].any()
    assert not made["has_frame"].any()
    assert made["ref_pos"].any()
    np.testing.assert_array_equal(made["entity_id"], 0)
    np.testing.assert_array_equal(made["sym_id"], [0] * 4 + [1] * 4)


def test_jobs(tmp_path):
    af3("ccd")
    fasta = tmp_path / "two.fasta"
    fasta.write_text(">first\nMAG\nAK\n>R|rna\nACGU\n>sp|P01112|RASH_HUMAN\nMK\n>L|ligand\nALA\n")
    job = read_job(fasta)
    assert job.structure.chains == ("A", "R", "C", "L")
    assert job.structure.unit_kind == ("protein", "rna", "protein", "ligand")
    assert [job.structure.sequence(chain) for chain in job.structure.chains] == ["MAGAK", "ACGU", "MK", ""]
    made = featurize(job.structure)
    assert made["is_rna"].sum() == 4
    assert made["is_ligand"].sum() == 6  # with the OXT of the free amino acid
    (tmp_path / "a.a3m").write_text(">q\nMAG\n>r\nM-G\n")
    content = {
        "name": "made up",
        "modelSeeds": [1, 2],
        "sequences": [
            {"protein": {"id": ["A", "B"], "sequence": "MAG", "unpairedMsaPath": "a.a3m"}},
            {"dna": {"id": "D", "sequence": "ACGT", "modifications": [{"modificationType": "N", "basePosition": 2}]}},
            {"ligand": {"id": "L", "ccdCodes": ["GLY"]}},
        ],
        "bondedAtomPairs": [[["A", 2, "CB"], ["L", 1, "N"]]],
        "dialect": "alphafold3",
    }
    path = tmp_path / "job.json"
    path.write_text(json.dumps(content))
    job = read_job(path)
    assert (job.name, job.seeds, job.structure.chains) == ("made up", (1, 2), ("A", "B", "D", "L"))
    assert job.structure.sequence("D") == "AXGT"
    made = featurize(job.structure, msas=job.msas)
    assert_valid(made)
    np.testing.assert_array_equal(made["msa"][1, :6], [RESTYPES.index("MET"), GAP, RESTYPES.index("GLY")] * 2)
    token = made["atom_token"][made["bonds"]]
    assert [1, np.flatnonzero(made["asym_id"] == 3)[0]] in token.tolist()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("MAGK\n", "expected FASTA records"),
        (">a\nMA9\n", "expected letters, got 'MA9'"),
        (">a\n\n", "expected letters, got ''"),
        (">A\nM\n>A\nM\n", "expected a name of its own for each, got 'A'"),
        ("{", "job.txt: "),
        ("{}", "expected an object with a list `sequences`"),
        ('{"sequences": [{"peptide": {}}]}', r"sequences\[0\]: expected one of"),
        ('{"sequences": [{"ligand": {"id": "L", "smiles": "C"}}]}', r"got \['smiles'\]"),
        ('{"sequences": [{"protein": {"id": "A", "sequence": "M", "unpairedMsa": ">q"}}]}', r"got \['unpairedMsa'\]"),
        ('{"sequences": [{"protein": {"sequence": "M"}}]}', "'id'"),
        (MOLECULE % ', "modifications": [{"ptmType": "SEP", "ptmPosition": 2}]' + "]}", "positions 1 .. 1, got 2"),
        (MOLECULE % "" + '], "bondedAtomPairs": [[["A", 1, "C"], ["B", 1, "C"]]]}', "got 1 of 'B'"),
    ],
)
def test_bad_jobs(text, problem, tmp_path):
    path = tmp_path / "job.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem) as raised:
        read_job(path)
    assert "job.txt" in str(raised.value)


def test_what_has_no_known_atoms(tmp_path):
    with pytest.raises(ValueError, match="expected residues with known atoms, got none"):
        featurize(from_sequences([dataclasses.replace(_ligand(), residues=("QQQ",))]))
    with pytest.raises(ValueError, match="chains: expected at least one"):
        from_sequences({})
    with pytest.raises(FileNotFoundError):
        read_job(tmp_path / "none.fasta")


def test_a_folder_of_component_records(tmp_path):
    record = af3("ccd/ALA.cif").read_text().replace("ALA", "QQQ")
    (tmp_path / "QQQ.cif").write_text(record)
    made = featurize(from_sequences([_ligand()]), options={"ccd": tmp_path})
    assert len(made["resolved"]) == 6
    assert made["ref_pos"].any()
    assert len(made["bonds"]) == 5
    (tmp_path / "QQQ.cif").write_text("words")
    with pytest.raises(ValueError, match="expected the record of one component"):
        featurize(from_sequences([_ligand()]), options={"ccd": tmp_path})


def _ligand():
    return Chain("L", "ligand", ("QQQ",))


@pytest.mark.latest
@pytest.mark.parametrize("config", [AF3Config.tiny(), AF3Config.small()], ids=["tiny", "small"])
def test_synthetic_batch(config):
    made, again, other = (synthetic_batch(config, jax.random.key(seed)) for seed in (0, 0, 1))
    for name, shape in abstract_batch(config).items():
        assert made[name].shape == shape.shape
        assert made[name].dtype == shape.dtype
        np.testing.assert_array_equal(made[name], again[name])
    assert (made["coords"] != other["coords"]).any()
    tokens, atoms = int(made["token_mask"].sum()), int(made["atom_mask"].sum())
    one = {name: value[0] for name, value in made.items()}
    assert 0 < tokens < config.max_tokens
    for kind in ("protein", "dna", "ligand"):
        assert one[f"is_{kind}"].any()
    assert one["has_frame"].any()
    assert not one["resolved"][:atoms].all()
    np.testing.assert_array_equal(np.bincount(one["atom_token"][:atoms], minlength=tokens) > 0, True)
    seen = one["bonds"][one["bonds"][:, 0] >= 0]
    np.testing.assert_allclose(np.linalg.norm(np.diff(one["ref_pos"][seen], axis=1), axis=-1), 1.5, atol=1e-4)
    with pytest.raises(ValueError, match="max_tokens >= 16"):
        synthetic_batch(dataclasses.replace(config, max_tokens=8), jax.random.key(0))
