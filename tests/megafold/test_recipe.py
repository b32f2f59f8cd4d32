"""The recipe at toy size: what it tells, going on after a kill, batches that steps decide, the first evidence."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from benchmarks.evidence import megafold_plans as plans
from jaxlab import core, tour
from jaxlab.core import plan as planning
from jaxlab.megafold import recipe, study
from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.data import FeatureCache
from jaxlab.megafold.feed import Example, Feed, MadeUp
from jaxlab.megafold.network import Network
from jaxlab.megafold.study import Study, StudyConfig, load_weights
from tests.aot import needs_aot
from tests.megafold import toys
from tests.megafold.data_files import af3, assert_same


@pytest.fixture
def config(tmp_path):
    af3("ccd")
    af3("mmcif/721p-assembly1.cif")
    return toys.config(tmp_path / "config")


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.latest
def test_tells_how_near_samples_come(config, tmp_path):
    config = dataclasses.replace(config, folder=str(tmp_path / "work"), stall_steps=1)
    report = recipe.run(config)
    told = report.metrics
    assert told["steps"] == 4
    assert 0 <= told["lddt"] <= 1
    assert told["rmsd_before"] > 5
    assert {"iterations_per_s, cold", "iterations_per_s, cache, read ahead"} < told.keys()
    assert not report.synthetic
    assert report.tables[0][2][0][:2] == ("721p-assembly1", 12)
    report.save(tmp_path / "report")
    assert len(list((tmp_path / "report").glob("plot_*.png"))) == 5
    folder = tmp_path / "work" / "predictions" / "721p-assembly1"
    assert len(list(folder.glob("*.cif"))) == 3
    assert len(core.jsonl.read(tmp_path / "work" / "metrics.jsonl")) == 4


def test_goes_on_after_a_kill_to_the_same_numbers(config, tmp_path):
    whole = Study(config, tmp_path / "whole").train()
    begun = dataclasses.replace(config, steps=2)
    Study(begun, tmp_path / "parts").train()
    resumed = Study(config, tmp_path / "parts").train()
    equal(whole, resumed)
    losses = [[row["loss"] for row in core.jsonl.read(tmp_path / x / "metrics.jsonl")] for x in ("whole", "parts")]
    assert losses[0] == losses[1]
    network, params = load_weights(tmp_path / "parts")
    assert network == config.network.config
    equal(params, whole.ema_params)
    with pytest.raises(ValueError, match=r"seed: .* was trained with 0, got 1"):
        Study(dataclasses.replace(config, seed=1), tmp_path / "parts").train()


@pytest.mark.parametrize(("folder", "error"), [("nothing", FileNotFoundError), ("begun", FileNotFoundError)])
def test_weights_that_are_not_there(config, tmp_path, folder, error):
    (tmp_path / "begun").mkdir()
    core.save_config(config, tmp_path / "begun" / "config.yaml")
    with pytest.raises(error, match=folder):
        load_weights(tmp_path / folder)


def test_mirror_images_are_told_apart():
    rng = np.random.default_rng(0)
    coords = rng.normal(size=(20, 3)).astype(np.float32) * 5
    none = np.zeros(20, bool)
    truth = {"coords": coords, "resolved": ~none, "atom_token": np.arange(20), "is_dna": none, "is_rna": none}
    _, lddts, here, reflected = study._held_to(np.stack([coords, coords * [1, 1, -1]]).astype(np.float32), truth)
    np.testing.assert_allclose(lddts, 1, atol=1e-6)
    np.testing.assert_allclose([here[0], reflected[1]], 0, atol=1e-4)
    assert min(here[1], reflected[0]) > 1


def test_without_data_it_makes_its_own(config, tmp_path, monkeypatch):
    def absent(self):
        raise core.DataUnavailable("nowhere")

    monkeypatch.setattr(Example, "files", absent)
    report = recipe.run(dataclasses.replace(config, steps=1))
    assert report.synthetic
    assert report.notes[0].startswith("Made-up")
    made = MadeUp(config.network.config)
    features = made.features(None)
    assert features["atom_token"].max() + 1 == len(features["restype"])
    assert features["msa"].shape[1] == len(features["restype"])


def test_steps_decide_batches(config, tmp_path):
    examples = (*config.structures, Example("af3/mmcif/721p-assembly1.cif"))
    network, key = config.network.config, jax.random.key(1)
    cache = FeatureCache(tmp_path)
    with Feed(examples, network, key, batch_size=2, cache=cache) as ahead:
        first = list(itertools.islice(ahead, 3))
        position = ahead.state()
        fourth = next(ahead)
        ahead.restore(position)
        assert_same(next(ahead), fourth)
    assert position == {"step": 3}
    cold = Feed(examples, network, key, batch_size=2, ahead=0)
    for step, batch in enumerate(first):
        assert_same(cold.batch(step), batch)
    assert not np.array_equal(first[0]["coords"][1], first[1]["coords"][1])  # another crop
    assert np.array_equal(first[0]["coords"][0], first[1]["coords"][0])
    assert first[0]["token_mask"].sum(axis=1).tolist() == [12, 16]
    with pytest.raises(ValueError, match="expected at most 398"):
        Example("af3/mmcif/721p-assembly1.cif", tokens=((390, 400),)).cropped(
            Example("af3/mmcif/721p-assembly1.cif").features(cache), network, key
        )
    with pytest.raises(ValueError, match="at least one structure"):
        Feed((), network, key)


@pytest.mark.usefixtures("unchecked")
def test_bad_configs(config):
    for change, message in (
        ({"structures": ()}, "structures"),
        ({"steps": 0}, "steps"),
        ({"samples": 0}, "samples"),
        ({"stall_steps": -1}, "stall_steps"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **change)
    with pytest.raises(ValueError, match="ranges"):
        Example("x.cif", tokens=((3, 3),))
    with pytest.raises(FileNotFoundError, match=r"absent\.cif does not exist"):
        Study(dataclasses.replace(config, structures=(Example("absent.cif"),)), "unused")


@pytest.mark.usefixtures("unchecked")
def test_networks_by_name():
    assert Network("small", {"pairformer_blocks": 3}).config.pairformer_blocks == 3
    assert Network("tiny", {"kernels": {"transition": "xla"}}).config.kernels.transition == "xla"
    with pytest.raises(ValueError, match="c_z"):
        Network("tiny", {"c_y": 3})
    with pytest.raises(TypeError, match="c_z"):
        Network("tiny", {"c_z": "wide"})


def test_the_papers_config_is_planned():
    config = core.load_config(recipe.PlanConfig, core.find_config("configs/megafold/paper.yaml"))
    assert config.network.config.pairformer_blocks == 48
    small = {**toys.CHANGES, "token_blocks": 0, "atom_blocks": 0}
    devices = planning.target("cpu", "1x1x2")
    made = recipe.plan(recipe.PlanConfig(network=Network("tiny", small), batch_size=2), devices)
    assert made.bytes["optimizer"] == pytest.approx(3 * made.bytes["parameters"], rel=0.01)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 2"):
        recipe.plan(recipe.PlanConfig(network=Network("tiny", small)), devices)


def test_the_evidence_begins(config, tmp_path, monkeypatch):
    from benchmarks.evidence import megafold as evidence

    names = [item.name for item in evidence.items()]
    assert len(set(names)) == len(names) == 2 * len(evidence.CROPS) + 1
    for name in evidence.CROPS:
        made = evidence._config(name)
        assert made.network.config.c_s == AF3Config.tiny().c_s
        assert made.network.config.max_tokens >= sum(behind - first for first, behind in made.structures[0].tokens)
    monkeypatch.setattr(evidence, "WORK", tmp_path)
    plain = core.to_dict(config)
    values = {name: json.dumps(plain[name]) for name in ("structures", "training", "samples", "sampling_steps")}
    values |= {f"training.{name}": json.dumps(value) for name, value in plain["training"].items()}
    sizes = {"network.changes": json.dumps(toys.CHANGES), "network.changes.max_atoms": toys.CHANGES["max_atoms"]}
    row = evidence._overfit_row("721p", "a loop", **values, **sizes, steps=2, checkpoint_every=1)
    assert row["tokens"] == 12
    assert row["first loss"] > 0
    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    evidence.pages()
    assert (tmp_path / "megafold_721p_structure.png").stat().st_size


@pytest.mark.parametrize("slope", [2e4, 1e5, 4e5])
def test_the_longest_crop_is_the_last_that_fits(slope):
    sizes = {}

    def size(crop):
        sizes[crop] = int(3e9 + slope * crop**2 + 1e6 * crop)
        return sizes[crop]

    crop = plans.longest(size, 7e10, 64, 768)
    assert crop % 64 == 0
    assert len(sizes) <= 5
    assert sizes[crop] <= 7e10 < sizes[crop + 64]


@needs_aot
def test_plans_tell_what_fits(monkeypatch):
    monkeypatch.setattr(plans, "_bytes", lambda crop, way, devices: {"temporaries": 2**30, "total": int(crop * 2**27)})
    row = plans._row(768, "all")
    assert (row["total"], row["fits h100"], row["fits h200"]) == (96, False, True)
    found = plans._longest_row("h100", "all", 1)
    assert (found["longest crop"], found["total"], found["room"]) == (576, 72, 72.81)
    names = [item.name for item in plans.items()]
    assert len(set(names)) == len(names) == 4 * 6 + 2 * 2 + 2


def test_the_laptops_config_is_the_tours():
    assert tour.RECIPES["megafold"] == "jaxlab.megafold.recipe:configs/megafold/laptop.yaml"
    loaded = core.load_config(StudyConfig, core.find_config("configs/megafold/laptop.yaml"))
    assert loaded.network.config.max_tokens == sum(behind - first for first, behind in loaded.structures[0].tokens)
