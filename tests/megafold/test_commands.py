"""The verbs: features of a folder, training, folding with what was trained, timing; and files that are not there."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from jaxlab.cli import app
from jaxlab.megafold import timing
from jaxlab.megafold.data import read_mmcif
from jaxlab.megafold.files import paired
from tests.megafold import toys
from tests.megafold.data_files import af3


def run(*args, code=0):
    result = CliRunner().invoke(app, ["megafold", *map(str, args)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.replace("│", " ").split())


def test_alignments_find_their_structures(tmp_path):
    for name in ("1ab.cif", "1abc.cif.gz", "1abA.a3m", "1ab_B.a3m", "1abcD_protein.a3m", "1abc_rna.a3m", "2xyA.a3m"):
        (tmp_path / name).touch()
    found = {
        path.name: {chain: file.name for chain, file in of.items()} for path, of in paired(tmp_path, tmp_path).items()
    }
    assert found == {
        "1ab.cif": {"A": "1abA.a3m", "B": "1ab_B.a3m"},
        "1abc.cif.gz": {"D": "1abcD_protein.a3m", "rna": "1abc_rna.a3m"},
    }


def test_precomputes_a_folder(tmp_path):
    shutil.copy(af3("mmcif/209d-assembly1.cif"), tmp_path)
    args = ("precompute", tmp_path, "--cache", tmp_path / "cache")
    assert "1 structures, 0 alignments: 0 hits, 1 misses, 0 failed" in run(*args)
    assert "1 hits, 0 misses" in run(*args)
    (tmp_path / "bad.cif").write_text("data_bad\n")
    told = run(*args, code=1)
    assert "bad.cif" in told
    assert "1 hits, 0 misses, 1 failed" in told


@pytest.mark.latest
def test_trains_then_folds(tmp_path):
    af3("ccd")
    af3("mmcif/721p-assembly1.cif")
    toys.config(tmp_path)
    told = run("train", tmp_path / "toy.yaml", "steps=2", "--folder", tmp_path / "run")
    assert "2 steps" in told
    assert "3 steps" in run("train", tmp_path / "toy.yaml", "steps=3", "--folder", tmp_path / "run")
    job = tmp_path / "job.fasta"
    job.write_text(">A\nGAGGVG\n>B|ligand\nGLY\n")
    args = ("fold", job, "--checkpoint", tmp_path / "run", "--folder", tmp_path / "out")
    told = run(*args, "--samples", 2, "--steps", 2, "--seed", 5)
    assert "seed 5, sample 1" in told
    best = read_mmcif(tmp_path / "out" / "job" / "job.cif")
    assert best.sequence("A") == "GAGGVG"
    ranking = json.loads((tmp_path / "out" / "job" / "ranking.json").read_text())
    assert [each["seed"] for each in ranking] == [5, 5]
    assert ranking[0]["iptm"] is not None


def test_times_data_and_kernels(tmp_path, monkeypatch):
    af3("mmcif/721p-assembly1.cif")
    toys.config(tmp_path)
    operations = timing.operations

    def one(config, tokens):
        return {name: value for name, value in operations(config, tokens).items() if name == "layernorm_linear"}

    assert len(operations(toys.config(tmp_path).network.config, 4)) == 4
    monkeypatch.setattr(timing, "operations", one)
    told = run("bench", tmp_path / "toy.yaml", "--tokens", 4, "--steps", 1, "--step-s", 0)
    for word in ("cold", "read ahead", "layernorm_linear", "plain JAX"):
        assert word in told


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("precompute", "nowhere"), "nowhere"),
        (("fold", "absent.fasta", "--checkpoint", "."), "absent.fasta"),
    ],
)
def test_what_is_missing_is_named_in_one_line(args, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = run(*args, code=1)
    assert named in told


def test_a_checkpoint_that_is_none(tmp_path):
    job = tmp_path / "job.fasta"
    job.write_text(">A\nGAGGVG\n")
    assert "config.yaml" in run("fold", job, "--checkpoint", tmp_path, code=1)


def test_bad_usage_ends_with_two(tmp_path):
    toys.config(tmp_path)
    assert "steps" in run("train", tmp_path / "toy.yaml", "stepz=2", code=2)
    assert "fold" in run("fold", tmp_path / "x", code=2)
    for command in ("train", "bench"):
        assert "'absent.yaml' does not exist" in run(command, "absent.yaml", code=2)
    assert not (tmp_path / "out").exists()
