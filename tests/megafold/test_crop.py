"""Crops and batches: what stays means the same, what is drawn comes from the key, what does not fit says so."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.data import crop, make_batch
from jaxlab.megafold.data.batch import moved
from jaxlab.megafold.features import FEATURES, GAP, abstract_batch
from tests.megafold.data_files import assert_same, features, ras

pytest.importorskip("gemmi")

METHODS = ("contiguous", "spatial", "spatial_interface")


@pytest.mark.parametrize("method", METHODS)
def test_what_stays_means_the_same(method):
    whole = ras()
    kept = crop(whole, jax.random.key(3), max_tokens=80, method=method)
    tokens = kept["token_index"]
    assert len(tokens) == 80
    assert (np.diff(tokens) > 0).all()
    atoms = np.flatnonzero(np.isin(whole["atom_token"], tokens))
    np.testing.assert_array_equal(tokens[kept["atom_token"]], whole["atom_token"][atoms])
    for name, feature in FEATURES.items():
        if feature.axes[:1] == ("N",) and feature.axes[1:] != ("N",) and "atom" not in name and name != "has_frame":
            np.testing.assert_array_equal(kept[name], whole[name][tokens], err_msg=name)
        elif feature.axes[:1] == ("A",) and name != "atom_token":
            np.testing.assert_array_equal(kept[name], whole[name][atoms], err_msg=name)
        elif feature.axes[1:2] == ("N",) and feature.axes[0] != "N":
            np.testing.assert_array_equal(kept[name], whole[name][:, tokens], err_msg=name)
    np.testing.assert_array_equal(kept["token_bonds"], whole["token_bonds"][np.ix_(tokens, tokens)])
    for name in ("center_atom", "representative_atom"):
        np.testing.assert_array_equal(atoms[kept[name]], whole[name][tokens])
    inside = np.isin(whole["frame_atoms"][tokens], atoms).all(axis=1)
    np.testing.assert_array_equal(kept["has_frame"], whole["has_frame"][tokens] & inside)
    np.testing.assert_array_equal(atoms[kept["frame_atoms"]][inside], whole["frame_atoms"][tokens][inside])
    both = np.isin(whole["bonds"], atoms).all(axis=1)
    np.testing.assert_array_equal(atoms[kept["bonds"]], whole["bonds"][both])


def test_contiguous_takes_stretches():
    for seed in range(20):
        kept = crop(ras(), jax.random.key(seed), max_tokens=90, method="contiguous")
        assert len(kept["token_index"]) == 90
        for chain in np.unique(kept["asym_id"]):
            assert (np.diff(kept["token_index"][kept["asym_id"] == chain]) == 1).all()


def test_spatial_takes_the_nearest():
    whole = ras()
    places = whole["coords"][whole["center_atom"]].astype(np.float64)
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1)
    interface = ((distance < 15) & (whole["asym_id"][:, None] != whole["asym_id"])).any(axis=1)
    centers = []
    for seed in range(12):
        for method in ("spatial", "spatial_interface"):
            kept = set(crop(whole, jax.random.key(seed), max_tokens=60, method=method)["token_index"].tolist())
            possible = [i for i in range(len(places)) if set(np.argsort(distance[i], kind="stable")[:60]) == kept]
            assert possible
            if method == "spatial_interface":
                assert interface[possible].any()
            centers.append(possible[0])
    assert len(set(centers)) > 12


@pytest.mark.latest
def test_methods_are_drawn():
    """0.2, 0.4, 0.4: each crop of 150 is one of the three that its key would give."""
    small = features("209d-assembly1.cif")
    counts = dict.fromkeys(METHODS, 0.0)
    for seed in range(150):
        key = jax.random.key(seed)
        drawn = crop(small, key, max_tokens=20)["token_index"].tolist()
        same = [m for m in METHODS if crop(small, key, max_tokens=20, method=m)["token_index"].tolist() == drawn]
        assert same
        for method in same:
            counts[method] += 1 / len(same)
    assert counts["contiguous"] == pytest.approx(30, abs=15)
    assert counts["spatial"] + counts["spatial_interface"] == pytest.approx(120, abs=15)


def test_keys_decide():
    whole = ras()
    sizes = {"max_tokens": 50, "max_msa_rows": 16}
    assert_same(crop(whole, jax.random.key(5), **sizes), crop(whole, jax.random.PRNGKey(5), **sizes))
    other = crop(whole, jax.random.key(6), **sizes)
    assert (other["token_index"] != crop(whole, jax.random.key(5), **sizes)["token_index"]).any()
    before = {name: value.copy() for name, value in whole.items()}
    make_batch([other], AF3Config.tiny(), jax.random.key(0))
    assert_same(whole, before)  # nothing is changed in place


def test_what_fits_stays():
    whole = features("7rye.cif")
    assert_same(crop(whole, jax.random.key(0), max_tokens=80), whole)


def test_atoms_and_rows_are_bounded():
    whole = ras()
    kept = crop(whole, jax.random.key(1), max_tokens=100, max_atoms=300, max_msa_rows=7, method="spatial")
    assert 280 <= len(kept["resolved"]) <= 300
    assert kept["msa"].shape[0] == 7
    np.testing.assert_array_equal(kept["msa"][0], kept["restype"])
    assert kept["deletion_value"].shape == kept["msa_mask"].shape == kept["msa"].shape


def test_nothing_resolved_is_cropped_in_stretches():
    blind = features("5y2e.cif") | {"resolved": np.zeros(396, np.bool_)}
    kept = crop(blind, jax.random.key(0), max_tokens=20, method="spatial_interface")
    assert (np.diff(kept["token_index"]) == 1).all()
    one = crop(features("5y2e.cif"), jax.random.key(0), max_tokens=20, method="spatial_interface")  # one chain
    assert len(one["restype"]) == 20


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
        ({"max_tokens": 4, "max_atoms": 0}, "max_atoms: expected at least 1"),
        ({"max_tokens": 4, "max_msa_rows": 0}, "max_msa_rows: expected at least 1"),
        (
            {"max_tokens": 4, "method": "nearest"},
            "method: expected None or one of .*spatial_interface.*, got 'nearest'",
        ),
    ],
)
def test_bad_crops(given, problem, unchecked):
    with pytest.raises(ValueError, match=problem):
        crop(features("5y2e.cif"), jax.random.key(0), **given)


def test_batch():
    config = AF3Config.tiny()
    kept = [
        crop(whole, jax.random.key(seed), max_tokens=config.max_tokens, max_atoms=config.max_atoms)
        for seed, whole in enumerate((ras(), features("5y2e.cif")))
    ]
    batch = make_batch(kept, config, jax.random.key(9))
    for name, shape in abstract_batch(config, 2).items():
        assert batch[name].shape == shape.shape, name
        assert batch[name].dtype == shape.dtype, name
    for index, one in enumerate(kept):
        tokens, atoms, bonds = len(one["restype"]), len(one["resolved"]), len(one["bonds"])
        assert batch["token_mask"][index].sum() == tokens
        np.testing.assert_array_equal(batch["coords"][index, :atoms], one["coords"])
        assert (batch["bonds"][index, bonds:] == -1).all()
        assert (batch["msa"][index, :, tokens:] == GAP).all()
        np.testing.assert_array_equal(batch["msa"][index, 0, :tokens], one["restype"])
        space, reference, now = one["ref_space"], one["ref_pos"], batch["ref_pos"][index, :atoms]
        for conformer in np.unique(space)[:5]:
            was, moved_to = (x[space == conformer].astype(np.float64) for x in (reference, now))
            distances = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (was, moved_to)]
            np.testing.assert_allclose(*distances, atol=1e-4)
            assert was.any() == moved_to.any()
            assert not was.any() or np.abs(was - moved_to).max() > 1e-2
    rows = batch["msa"][0, :, : len(kept[0]["restype"])]
    known = {row.tobytes() for row in kept[0]["msa"]}
    assert all(row.astype(np.int8).tobytes() in known for row in rows)
    assert_same(batch, make_batch(kept, config, jax.random.key(9)))
    alone = make_batch(kept[:1], config, jax.random.key(9))
    np.testing.assert_array_equal(alone["ref_pos"][0], batch["ref_pos"][0])
    assert (make_batch(kept, config, jax.random.key(8))["msa"] != batch["msa"]).any()


def test_conformers_keep_their_hand():
    """Turned, not mirrored, about their own centre, which moves by a standard normal."""
    random = np.random.default_rng(0)
    shape = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]], np.float32) + 5
    space = np.repeat(np.arange(500), 4)
    there = moved(np.tile(shape, (500, 1)), space, random).reshape(500, 4, 3).astype(np.float64)
    sides = there[:, 1:] - there[:, :1]
    np.testing.assert_allclose(np.linalg.det(sides), 6, rtol=1e-4)
    assert np.abs(there.mean(axis=(0, 1))).max() < 0.2
    np.testing.assert_allclose(np.std(there.mean(axis=1)), 1, atol=0.1)
    axes = sides[:, 0]
    assert np.abs(axes.mean(axis=0)).max() < 0.1
    np.testing.assert_allclose(axes.T @ axes / 500, np.eye(3) / 3, atol=0.08)


def test_bad_batches():
    config = AF3Config.tiny()
    with pytest.raises(ValueError, match="expected at least one structure"):
        make_batch([], config, jax.random.key(0))
    with pytest.raises(ValueError, match=r"features\[0\]: expected at most 64 tokens \(config.max_tokens\), got 80"):
        make_batch([features("7rye.cif")], config, jax.random.key(0))
    small = dataclasses.replace(config, max_atoms=64)
    with pytest.raises(ValueError, match=r"expected at most 64 atoms \(config.max_atoms\), got 396; crop it"):
        make_batch([features("5y2e.cif")], small, jax.random.key(0))
