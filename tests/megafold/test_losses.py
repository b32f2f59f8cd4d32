import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.megafold import losses
from jaxlab.megafold.diffusion import random_rotation
from tests.oracles import af3_losses as oracle

RNG = np.random.default_rng(0)
ATOMS, SAMPLES = 23, 3


@pytest.fixture(scope="module")
def structure():
    """Truth, samples of it, masks and kinds; two atoms lie at the same place."""
    target = (RNG.normal(size=(ATOMS, 3)) * 12).astype(np.float32)
    target[1] = target[0]
    pred = target + RNG.normal(size=(SAMPLES, ATOMS, 3)).astype(np.float32) * np.array([0.3, 2, 8])[:, None, None]
    kind = np.arange(ATOMS) % 4
    return {
        "pred": pred.astype(np.float32),
        "target": target,
        "mask": np.arange(ATOMS) != 5,
        "is_dna": kind == 1,
        "is_rna": kind == 2,
        "is_ligand": kind == 3,
        "bond_mask": np.triu(RNG.random((ATOMS, ATOMS)) < 0.1, 1),
        "sample_weight": np.array([2.0, 0.5, 0.1], np.float32),
    }


def all_losses(pred, target, s):
    """The four losses of coordinates, by name."""
    shared = pred, target, s["mask"]
    bonds = np.argwhere(s["bond_mask"])
    listed = np.concatenate([bonds, np.full((4, 2), -1)]).astype(np.int32)
    return {
        "mse": losses.diffusion_mse(
            *shared, sample_weight=s["sample_weight"], **{k: s[k] for k in ("is_dna", "is_rna", "is_ligand")}
        ),
        "lddt": losses.smooth_lddt_loss(*shared, is_nucleotide=s["is_dna"] | s["is_rna"]),
        "bond": losses.bond_loss(
            *shared, bond_mask=s["bond_mask"] | s["bond_mask"].T, sample_weight=s["sample_weight"]
        ),
        "listed": losses.bond_list_loss(*shared, bonds=listed, sample_weight=s["sample_weight"]),
    }


@pytest.fixture(scope="module")
def compiled(structure):
    """pred, target -> the losses and their gradients; the rest of the structure is constant."""
    constants = {name: value for name, value in structure.items() if name not in ("pred", "target")}
    values = jax.jit(lambda pred, target: all_losses(pred, target, constants))
    gradients = jax.jit(jax.jacrev(lambda pred, target: all_losses(pred, target, constants)))
    return values, gradients


def test_every_loss_against_float64(structure, compiled):
    s = structure
    got = compiled[0](s["pred"], s["target"])
    shared = s["pred"], s["target"], s["mask"]
    bonded = oracle.bond(*shared, s["bond_mask"] | s["bond_mask"].T, s["sample_weight"])
    want = {
        "mse": oracle.diffusion_mse(*shared, s["is_dna"], s["is_rna"], s["is_ligand"], s["sample_weight"]),
        "lddt": oracle.smooth_lddt(*shared, s["is_dna"] | s["is_rna"]),
        "bond": bonded,
        "listed": bonded,
    }
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-5, err_msg=name)


def test_gradients_against_float64(structure, compiled):
    """By central differences of the oracles, the alignment held fixed: it is no part of the gradient."""
    s = structure
    got = compiled[1](s["pred"], s["target"])
    direction = RNG.normal(size=s["pred"].shape)
    weight = (1 + 5 * s["is_dna"] + 5 * s["is_rna"] + 10 * s["is_ligand"]) * s["mask"]
    aligned = np.stack([oracle.align(s["target"], x, weight) for x in s["pred"]])

    def mse(pred):
        per_sample = (weight * ((pred - aligned) ** 2).sum(-1)).sum(-1) / s["mask"].sum() / 3
        return np.mean(s["sample_weight"] * per_sample)

    functions = {
        "mse": mse,
        "lddt": lambda pred: oracle.smooth_lddt(pred, s["target"], s["mask"], s["is_dna"] | s["is_rna"]),
        "bond": lambda pred: oracle.bond(pred, s["target"], s["mask"], s["bond_mask"], s["sample_weight"]),
    }
    pred, step = s["pred"].astype(np.float64), 1e-5
    for name, function in functions.items():
        want = (function(pred + step * direction) - function(pred - step * direction)) / (2 * step)
        np.testing.assert_allclose(np.sum(np.asarray(got[name]) * direction), want, rtol=2e-4, err_msg=name)
    np.testing.assert_allclose(got["listed"], got["bond"], atol=1e-6)
    assert all((np.asarray(g)[:, ~s["mask"]] == 0).all() for g in got.values())


@pytest.mark.latest
def test_the_frame_of_the_truth_does_not_matter(structure, compiled):
    s = structure
    rotation = np.asarray(random_rotation(jax.random.key(3)))
    moved = s["target"] @ rotation.T + np.array([30.0, -5.0, 2.0], np.float32)
    moved[~s["mask"]] = np.nan  # what is not resolved may hold anything
    for name, value in compiled[0](s["pred"], s["target"]).items():
        np.testing.assert_allclose(compiled[0](s["pred"], moved)[name], value, rtol=1e-4, err_msg=name)
    exact = compiled[0](np.stack([moved] * SAMPLES), s["target"])
    for name in ("mse", "bond", "listed"):
        assert exact[name] < 1e-8
    np.testing.assert_allclose(exact["lddt"], 1 - np.mean(1 / (1 + np.exp(-np.array(oracle.THRESHOLDS)))), rtol=1e-5)


def test_alignment_is_horns_and_never_reflects(structure):
    s = structure
    weight = RNG.random(ATOMS).astype(np.float32) * s["mask"]
    got = losses.weighted_rigid_align(s["target"], s["pred"], weight)  # batch axes broadcast
    for t in range(SAMPLES):
        np.testing.assert_allclose(got[t], oracle.align(s["target"], s["pred"][t], weight), atol=1e-4)
    mirrored = s["target"] * np.array([1, 1, -1], np.float32)
    moved = np.asarray(losses.weighted_rigid_align(mirrored, s["target"], weight))
    np.testing.assert_allclose(moved, oracle.align(mirrored, s["target"], weight), atol=1e-3)

    def handed(x):
        return np.linalg.det(x[[2, 3, 4]] - x[6])

    np.testing.assert_allclose(handed(moved), handed(mirrored), rtol=1e-3)
    assert np.abs(moved - s["target"]).max() > 1


def test_alignment_of_degenerate_structures():
    x = (RNG.normal(size=(6, 3)) * 5).astype(np.float32)
    y = (RNG.normal(size=(6, 3)) * 5 + 10).astype(np.float32)
    weight = np.array([0, 2, 1, 0, 0, 0], np.float32)
    shift = (2 * (y[1] - x[1]) + y[2] - x[2]) / 3
    np.testing.assert_allclose(losses.weighted_rigid_align(x, y, weight), x + shift, atol=1e-5)
    np.testing.assert_array_equal(losses.weighted_rigid_align(x, y, np.zeros(6, np.float32)), x)
    line = np.linspace(-3, 3, 6, dtype=np.float32)[:, None]
    ones = np.ones(6, np.float32)
    onto = losses.weighted_rigid_align(line * [[1, 0, 0]], line * [[0, 0.6, 0.8]] + 4, ones)
    np.testing.assert_allclose(onto, line * [[0, 0.6, 0.8]] + 4, atol=1e-5)
    cube = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), np.float32).reshape(3, 8).T  # all singular values equal
    rotation = np.asarray(random_rotation(jax.random.key(5)))
    turned = losses.weighted_rigid_align(cube @ rotation.T, cube, np.ones(8, np.float32))
    np.testing.assert_allclose(turned, cube, atol=1e-5)
    same = losses.weighted_rigid_align(np.zeros((6, 3), np.float32), y, ones)
    np.testing.assert_allclose(same, np.broadcast_to(y.mean(0), (6, 3)), atol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(losses.weighted_rigid_align(x, cube, np.ones(8)) ** 2))(cube)
    np.testing.assert_array_equal(gradient, 0)


def test_degenerate_samples_have_finite_gradients(structure):
    """All atoms at one point, a perfect prediction, nothing resolved, a single atom resolved."""
    s = structure
    nothing, one = np.zeros(ATOMS, bool), np.arange(ATOMS) == 4
    loss = jax.jit(
        jax.value_and_grad(lambda pred, target, mask: sum(all_losses(pred, target, s | {"mask": mask}).values()))
    )
    perfect = np.stack([s["target"]] * SAMPLES)
    for pred, target, mask in (
        (np.zeros_like(s["pred"]), s["target"], s["mask"]),
        (np.zeros_like(s["pred"]), np.zeros_like(s["target"]), s["mask"]),
        (perfect, s["target"], s["mask"]),
        (s["pred"], s["target"], nothing),
        (s["pred"], s["target"], one),
    ):
        value, gradient = loss(pred, target, mask)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        if mask is nothing:
            assert value == 0


def test_blocks_of_rows_change_nothing(structure, monkeypatch):
    s = structure

    def compiled():
        return (
            jax.jit(jax.value_and_grad(lambda pred: sum(all_losses(pred, s["target"], s).values())))
            .lower(s["pred"])
            .compile()
        )

    value, gradient = compiled()(s["pred"])
    monkeypatch.setattr(losses, "_PAIRS_AT_ONCE", 5 * SAMPLES * ATOMS)  # 5 pieces for 23 rows, the last one short
    again, gradient_again = compiled()(s["pred"])
    np.testing.assert_allclose(again, value, rtol=1e-5)
    np.testing.assert_allclose(gradient_again, gradient, atol=1e-5)


def test_a_large_structure_has_no_square_temporaries():
    """Compiled, not run: 48 samples of 7008 atoms, where one [T, A, A] of float32 is 9431 MB."""
    shapes = (
        jax.ShapeDtypeStruct((48, 7008, 3), jnp.float32),
        jax.ShapeDtypeStruct((7008, 3), jnp.float32),
        jax.ShapeDtypeStruct((7008,), jnp.bool_),
    )

    def loss(pred, target, mask):
        return losses.smooth_lddt_loss(pred, target, mask, is_nucleotide=mask)

    memory = jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 200e6


def test_distogram_loss():
    coords = (RNG.normal(size=(9, 3)) * 8).astype(np.float32)
    logits = RNG.normal(size=(9, 9, 64)).astype(np.float32)
    mask = np.arange(9) != 2
    got = losses.distogram_loss(logits, coords, mask)
    np.testing.assert_allclose(got, oracle.distogram(logits, coords, mask), rtol=1e-5)
    np.testing.assert_allclose(losses.distogram_loss(np.zeros_like(logits), coords, mask), np.log(64), rtol=1e-6)
    assert losses.distogram_loss(logits, coords, np.zeros(9, bool)) == 0
    # 2.3125 Å ends the first bin, 21.6875 Å begins the last.
    ends = np.array([[0, 0, 0], [2.3, 0, 0], [24.1, 0, 0]], np.float32)
    sure = np.full((3, 3, 64), -50, np.float32)
    sure[..., 0] = 0
    sure[[0, 2, 1, 2], [2, 0, 2, 1], 0], sure[[0, 2, 1, 2], [2, 0, 2, 1], 63] = -50, 0
    assert losses.distogram_loss(sure, ends, np.ones(3, bool)) < 1e-6


@pytest.mark.usefixtures("unchecked")
def test_bad_inputs(structure):
    s = structure
    shared, kinds = (s["pred"], s["target"], s["mask"]), {k: s[k] for k in ("is_dna", "is_rna", "is_ligand")}
    with pytest.raises(ValueError, match=r"pred: expected shape \[T, A, 3\], got \(23, 3\)"):
        losses.diffusion_mse(s["target"], s["target"], s["mask"], **kinds)
    with pytest.raises(ValueError, match=r"target: expected shape \(23, 3\), got \(3, 23, 3\)"):
        losses.smooth_lddt_loss(s["pred"], s["pred"], s["mask"], is_nucleotide=s["is_dna"])
    with pytest.raises(ValueError, match=r"is_rna: expected shape \(23,\), got \(4,\)"):
        losses.diffusion_mse(*shared, **kinds | {"is_rna": np.zeros(4, bool)})
    with pytest.raises(ValueError, match=r"sample_weight: expected shape \(3,\), got \(23,\)"):
        losses.diffusion_mse(*shared, **kinds, sample_weight=np.ones(23))
    with pytest.raises(ValueError, match=r"bond_mask: expected shape \(23, 23\), got \(23, 3\)"):
        losses.bond_loss(*shared, bond_mask=np.zeros((23, 3), bool))
    with pytest.raises(ValueError, match=r"bonds: expected shape \[E, 2\], got \(3, 3\)"):
        losses.bond_list_loss(*shared, bonds=np.zeros((3, 3), np.int32))
    with pytest.raises(ValueError, match=r"logits, coords: expected \[9, 9, bins\]"):
        losses.distogram_loss(np.zeros((9, 8, 64)), np.zeros((9, 3)), np.ones(9, bool))
    with pytest.raises(ValueError, match=r"x, target: expected \[..., A, 3\]"):
        losses.weighted_rigid_align(s["target"], s["target"][:4], np.ones(ATOMS))
