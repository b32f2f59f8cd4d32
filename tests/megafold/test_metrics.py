import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.megafold import confidence, losses, metrics
from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.data import synthetic_batch
from jaxlab.megafold.diffusion import random_rotation
from tests.oracles import af3_losses as oracle

RNG = np.random.default_rng(0)
HEADS = {"plddt": 50, "pae": 64, "pde": 64, "resolved": 2}


@pytest.fixture(scope="module")
def structure():
    """Features of one small structure, and a prediction with small and large errors."""
    config = AF3Config.tiny()
    config = AF3Config(**{**vars(config), "max_tokens": 16, "max_atoms": 96})
    features = {name: array[0] for name, array in synthetic_batch(config, jax.random.key(0)).items()}
    atoms = len(features["coords"])
    scale = np.linspace(0, 6, atoms)[:, None]
    pred = (features["coords"] + scale * RNG.normal(size=(atoms, 3))).astype(np.float32)
    return features, pred


@pytest.mark.latest
def test_lddt_against_float64(structure):
    features, pred = structure
    mask, group = features["resolved"], features["atom_token"]
    nucleotide = features["is_dna"][group]
    scores, pairs = jax.jit(metrics.atom_lddt)(
        pred, features["coords"], mask, is_nucleotide=nucleotide, atom_token=group
    )
    want, counts = oracle.lddt(pred, features["coords"], mask, np.where(nucleotide, 30, 15), group)
    np.testing.assert_array_equal(pairs, counts)
    np.testing.assert_allclose(scores, want, atol=1e-6)
    assert want[counts > 0].min() < 0.5
    overall = metrics.lddt(pred, features["coords"], mask, is_nucleotide=nucleotide, atom_token=group)
    np.testing.assert_allclose(overall, (want * counts).sum() / counts.sum(), rtol=1e-5)
    tokens = metrics.token_lddt(
        pred, features["coords"], mask, is_nucleotide=nucleotide, atom_token=group, num_tokens=16
    )
    for token in range(16):
        own = (group == token) & mask
        expected = (want * counts)[own].sum() / max(counts[own].sum(), 1)
        np.testing.assert_allclose(tokens[token], expected, rtol=1e-5)


def test_measures_do_not_see_the_frame(structure):
    features, _ = structure
    coords, mask = features["coords"], features["resolved"]
    moved = coords @ np.asarray(random_rotation(jax.random.key(1))).T + 20
    np.testing.assert_allclose(metrics.rmsd(moved, coords, mask), 0, atol=1e-4)
    assert metrics.lddt(moved, coords, mask) == 1
    shifted = np.where((np.arange(len(mask)) == np.flatnonzero(mask)[0])[:, None], moved + 30, moved)
    weight = mask.astype(float)
    error = ((shifted - oracle.align(coords, shifted, weight)) ** 2).sum(-1)
    np.testing.assert_allclose(metrics.rmsd(shifted, coords, mask), np.sqrt(error[mask].mean()), rtol=1e-4)
    assert metrics.rmsd(coords * [[1, 1, -1]], coords, mask) > 1  # a mirror image is another structure
    assert metrics.lddt(coords, coords, np.zeros_like(mask)) == 0
    assert metrics.rmsd(coords, coords, np.zeros_like(mask)) == 0


def test_expected_values_of_logits():
    sure = np.where(np.eye(50) > 0, 0, -np.inf).astype(np.float32)
    np.testing.assert_allclose(metrics.expected_plddt(sure), np.arange(1, 100, 2), rtol=1e-5)
    np.testing.assert_allclose(metrics.expected_plddt(np.zeros((3, 50))), 50, rtol=1e-5)
    np.testing.assert_allclose(metrics.expected_error(np.zeros((2, 2, 64))), 16, rtol=1e-5)
    np.testing.assert_allclose(metrics.expected_error(np.eye(64)[:3] * 100), [0.25, 0.75, 1.25], rtol=1e-5)


def logits_of(features, scale=1.0):
    atoms, tokens = len(features["atom_mask"]), len(features["token_mask"])
    shapes = {"plddt": (atoms,), "pae": (tokens, tokens), "pde": (tokens, tokens), "resolved": (atoms,)}
    return {name: (scale * RNG.normal(size=(*shapes[name], bins))).astype(np.float32) for name, bins in HEADS.items()}


def test_confidence_losses_against_float64(structure):
    features, pred = structure
    logits = logits_of(features)
    got = jax.jit(losses.confidence_losses)(logits, pred, features)
    want = oracle.confidence(logits, pred, features)
    assert set(got) == set(HEADS)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_confidence_targets_of_a_perfect_structure(structure):
    """Moved as a whole it has no error; the highest bin of lDDT, the lowest of the errors."""
    features, _ = structure
    features = {name: jnp.asarray(value) for name, value in features.items()}
    moved = features["coords"] @ random_rotation(jax.random.key(2)).T - 7
    for targets, best in (
        (confidence.plddt_targets(moved, features, 50), 49),
        (confidence.pae_targets(moved, features, 64), 0),
        (confidence.pde_targets(moved, features, 64), 0),
    ):
        bins, valid = targets
        assert valid.any()
        assert (np.asarray(bins)[np.asarray(valid)] == best).all()


def test_confidence_losses_of_degenerate_structures(structure):
    """Every atom at one point, and nothing resolved: finite, no gradient but the head's."""
    features, pred = structure
    logits = logits_of(features)

    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(logits, pred, features):
        return sum(losses.confidence_losses(logits, pred, features).values())

    nothing = features | {"resolved": np.zeros_like(features["resolved"]), "has_frame": np.zeros(16, bool)}
    for case in (features, nothing):
        of_logits, of_pred = jax.jit(gradients)(logits, np.zeros_like(pred), case)
        assert all(np.isfinite(value).all() for value in of_logits.values())
        assert np.asarray(of_logits["resolved"]).any()
        assert np.asarray(of_logits["pae"]).any() == (case is features)
        assert (np.asarray(of_pred) == 0).all()


@pytest.mark.usefixtures("unchecked")
def test_bad_inputs(structure):
    features, pred = structure
    logits = logits_of(features)
    with pytest.raises(ValueError, match=r"pred: expected shape \(96, 3\), got \(2, 96, 3\)"):
        losses.confidence_losses(logits, np.stack([pred, pred]), features)
    with pytest.raises(ValueError, match=r"logits\['pae'\]: expected a shape that begins with \(16, 16\)"):
        losses.confidence_losses(logits | {"pae": logits["plddt"]}, pred, features)
