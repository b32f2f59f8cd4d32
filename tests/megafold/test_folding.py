"""Folding: few sizes, seeds that do not depend on each other, scores by hand, and files that read back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.megafold import folding, ranking
from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.data import read_mmcif
from jaxlab.megafold.feed import Example
from jaxlab.megafold.study import initial_state
from tests.megafold import toys
from tests.megafold.data_files import af3, structure

NAME = "721p-assembly1.cif"


@pytest.fixture(scope="module")
def crop(tmp_path_factory):
    """Six residues and six atoms of a ligand."""
    af3("ccd")
    config = toys.config(tmp_path_factory.mktemp("toy"))
    example = Example(str(af3(f"mmcif/{NAME}")), tokens=((8, 14), (166, 172)))
    return example.cropped(example.features(None), config.network.config, jax.random.key(0))


@pytest.fixture(scope="module")
def folded(crop, tmp_path_factory):
    config = toys.config(tmp_path_factory.mktemp("toy"))
    params = initial_state(config).params
    network = config.network.config
    return (
        folding.fold(params, crop, network, seeds=(3,), samples=2, steps=2),
        folding.fold(params, crop, network, seeds=(1, 3), samples=2, steps=2),
    )


@pytest.mark.latest
def test_a_seed_gives_the_same_whatever_the_others(folded, crop):
    alone, both = folded
    assert [len(alone), len(both)] == [2, 4]
    assert {(each.seed, each.sample) for each in both} == {(1, 0), (1, 1), (3, 0), (3, 1)}
    tokens, atoms = len(crop["restype"]), len(crop["resolved"])
    for each in alone:
        twin = next(other for other in both if (other.seed, other.sample) == (each.seed, each.sample))
        for field in dataclasses.fields(each):
            np.testing.assert_array_equal(getattr(each, field.name), getattr(twin, field.name), err_msg=field.name)
        assert each.coords.shape == (atoms, 3)
        assert each.plddt.shape == (atoms,)
        assert each.pae.shape == each.pde.shape == each.distances.shape == (tokens, tokens)
        assert np.isfinite(each.coords).all()
        assert 0 <= each.plddt.min() <= each.plddt.max() <= 100
    assert not np.array_equal(alone[0].coords, alone[1].coords)
    scores = [each.score for each in both]
    assert scores == sorted(scores, reverse=True)


def test_few_sizes():
    config = AF3Config.tiny()

    def sized(tokens, atoms, bonds=0, rows=1):
        counts = {"restype": tokens, "resolved": atoms, "bonds": bonds, "msa": rows, "template_mask": 0}
        made = folding.bucketed(config, {name: np.zeros(count) for name, count in counts.items()})
        return made.max_tokens, made.max_atoms, made.max_msa_rows, made.max_templates

    assert sized(1, 1) == (16, 256, 1, 1)
    assert sized(65, 513, rows=5) == (96, 768, 8, 1)
    assert sized(10, 90, bonds=70, rows=1000) == (48, 256, 32, 1)
    for tokens in range(1, 3000, 7):
        assert tokens <= sized(tokens, tokens * 8)[0] <= max(16, 1.5 * tokens)
    with pytest.raises(ValueError, match="5120 tokens"):
        sized(5121, 10)


@pytest.mark.parametrize("name", ["seeds", "samples", "steps", "recycles"])
def test_what_cannot_be_folded(name, crop):
    with pytest.raises(ValueError, match=name):
        folding.fold({}, crop, AF3Config.tiny(), **{name: () if name == "seeds" else 0})


def test_tm_scores_by_hand():
    random = np.random.default_rng(0)
    term, frames = random.random((5, 5)), np.array([True, False, True, True, False])
    chain = np.array([0, 0, 1, 1, 2])
    whole = max(np.mean(term[i]) for i in range(5) if frames[i])
    between = max(np.mean([term[i, j] for j in range(5) if chain[i] != chain[j]]) for i in range(5) if frames[i])
    assert ranking.predicted_tm(term, frames) == pytest.approx(whole)
    assert ranking.predicted_tm(term, frames, chain[:, None] != chain) == pytest.approx(between)
    assert ranking.predicted_tm(term, ~frames & frames) == 0
    assert ranking.ranking_score(0.5, None, False) == 0.5
    assert ranking.ranking_score(0.5, 0.25, True) == pytest.approx(0.3 - 100)
    assert ranking.tm_scale(384) == pytest.approx(1.24 * 369 ** (1 / 3) - 1.8)
    assert ranking.tm_scale(3) == ranking.tm_scale(19)


def test_terms_are_those_of_the_mean_error():
    logits = np.full((1, 1, 64), -1e9, np.float32)
    logits[..., 8] = 0  # an error of 4.25 Å
    term = np.asarray(folding._tm_terms(jnp.asarray(logits), ranking.tm_scale(100)))
    assert term == pytest.approx(1 / (1 + (4.25 / ranking.tm_scale(100)) ** 2), rel=1e-6)


def test_clashes():
    apart = np.arange(6, dtype=np.float32)[:, None] * np.array([3.0, 0, 0], np.float32)
    features = {
        "atom_token": np.repeat(np.arange(4), 3),
        "asym_id": np.array([0, 0, 1, 1]),
        "is_ligand": np.zeros(4, np.bool_),
    }

    def clash(shift, **changes):
        return ranking.has_clash(np.concatenate([apart, apart + shift]).astype(np.float32), features | changes)

    assert clash([0, 1.0, 0])
    assert not clash([0, 1.2, 0])
    assert not clash([9.0, 1.0, 0])  # half of the atoms, and no more
    assert clash([6.0, 1.0, 0])
    assert not clash([0, 1.0, 0], is_ligand=np.array([False, False, True, True]))


def test_files_read_back(folded, crop, tmp_path):
    whole, found = structure(NAME), folded[1]
    best = folding.save_predictions(tmp_path, "ras", whole, crop, found)
    assert best.name == "ras.cif"
    read = read_mmcif(best)
    np.testing.assert_allclose(read.coords, found[0].coords, atol=1e-3)
    np.testing.assert_allclose(read.b_factor, found[0].plddt, atol=1e-2)
    assert read.sequence(read.chains[0]) == whole.sequence("A")[8:14]
    told = json.loads((tmp_path / "ranking.json").read_text())
    assert [each["ranking_score"] for each in told] == [each.score for each in found]
    np.testing.assert_array_equal(read_mmcif(tmp_path / told[0]["file"]).coords, read.coords)
    one = json.loads((tmp_path / told[0]["file"]).with_suffix(".json").read_text())
    assert len(one["token_chain"]) == len(one["pae"]) == len(crop["restype"])
    assert len(one["atom_plddt"]) == len(crop["resolved"])
    assert set(one["token_chain"][:6]) == {"A"}


@pytest.mark.usefixtures("unchecked")
def test_atoms_that_are_not_the_features(folded, crop):
    with pytest.raises(ValueError, match="expected 37 atoms"):
        folding.placed(structure(NAME), crop, folded[0][0].coords[1:], folded[0][0].plddt)
