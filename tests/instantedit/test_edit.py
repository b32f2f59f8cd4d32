"""Inversion and regeneration against the official loop in float64, on networks of a few matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.instantedit import PeRFlowSchedule
from jaxlab.instantedit.edit import Knobs, Prompts, decode_program, edit_program, source_program
from jaxlab.instantedit.inversion import Inversion, invert_program
from tests.instantedit import toys
from tests.oracles import instantedit as oracle

SIDE, SCALE, LENGTH = 16, 0.6, 8
KNOBS = {"cfg": 1.3, "dpg": 2.0, "threshold": 0.5}


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(1)
    z0, edges = rng.normal(size=(SIDE, SIDE, 4)), rng.random((8 * SIDE, 8 * SIDE)) < 0.2
    null, source, other = rng.normal(size=(3, toys.WORDS, toys.WIDTH))
    target = source.copy()
    target[3:6] = other[3:6]
    weights = np.zeros(toys.WORDS)
    weights[[3, 5]] = 1
    return {"z0": z0, "edges": edges, "null": null, "source": source, "target": target, "weights": weights}


def single(x):
    return jnp.asarray(x, jnp.float32)[None]


def network(control=True):
    return toys.network(PeRFlowSchedule(), control=control)


def ground_truth(case, control=True):
    hint = np.repeat(case["edges"][..., None], 3, axis=-1).astype(float)
    return oracle.toy(toys.weights(), hint if control else None)


def inverted(case, *, steps=4, mode="exact", control=True):
    edges = case["edges"][None] if control else None
    return invert_program(
        network(control), single(case["z0"]), edges, single(case["null"]), SCALE, num_steps=steps, mode=mode
    )


def prompts(case, **changes):
    states = [single(changes.get(name, case[name])) for name in ("null", "source", "target")]
    return Prompts(*states, single(changes.get("weights", case["weights"])), np.array([LENGTH]))


def knobs(*, masked=False, **changes):
    return Knobs(
        **{name: np.float32(value) for name, value in {**KNOBS, **changes}.items()}, control_scale=SCALE, masked=masked
    )


@pytest.mark.parametrize(
    ("steps", "mode", "control"),
    [(4, "official", True), (4, "exact", False), (6, "exact", True), (6, "official", True)],
)
def test_trajectory(case, steps, mode, control):
    trajectory, _ = inverted(case, steps=steps, mode=mode, control=control)
    want = oracle.invert(ground_truth(case, control), case["z0"], case["null"], steps=steps, scale=SCALE, mode=mode)
    np.testing.assert_allclose(trajectory[:, 0], want, atol=2e-5)


@pytest.mark.latest
@pytest.mark.parametrize("made_before", [True, False])
@pytest.mark.parametrize("compat", ["official", "clean"])
def test_edit(case, compat, made_before):
    net = ground_truth(case)
    trajectory, features = inverted(case, mode="official")
    want = oracle.edit(
        net, oracle.invert(net, case["z0"], case["null"], scale=SCALE), case["null"], case["source"], case["target"],
        case["weights"], LENGTH, **KNOBS, scale=SCALE, compat=compat,
    )  # fmt: skip
    source = None
    if made_before:
        source = source_program(network(), trajectory, features, SCALE, single(case["null"]), single(case["source"]))
    got = edit_program(network(), trajectory, features, prompts(case), knobs(masked=compat == "clean"), source)
    clear = want["margins"] > 1e-4
    assert clear.mean() > 0.98
    np.testing.assert_array_equal(np.where(clear, got.masks[:, 0], False), np.where(clear, want["masks"], False))
    assert 0 < want["masks"][0].mean() < want["masks"][-1].mean() < 1
    np.testing.assert_allclose(got.guided_first[0], want["guided_first"], atol=1e-4)
    np.testing.assert_allclose(got.attention[:, :, 0], want["attention"], atol=1e-5)
    np.testing.assert_allclose(got.steps[:, 0], want["steps"], atol=1e-3)
    np.testing.assert_allclose(got.latents[0], want["latents"], atol=1e-3)


def test_without_a_word_nothing_is_masked(case):
    trajectory, features = inverted(case)
    given = prompts(case, weights=np.zeros(toys.WORDS))
    clean, official = (edit_program(network(), trajectory, features, given, knobs(masked=m)) for m in (True, False))
    assert not clean.masks.any()
    np.testing.assert_array_equal(clean.latents, official.latents)
    assert np.abs(clean.latents[0] - trajectory[0, 0]).max() > 0.1


def test_equal_prompts_give_the_image(case):
    """The update itself gives it, too: the rule for equal prompts is not needed where predictions are equal."""
    trajectory, features = inverted(case)
    same = prompts(case, target=case["source"])
    for masked in (True, False):
        got = edit_program(network(), trajectory, features, same, knobs(masked=masked))
        np.testing.assert_array_equal(got.latents, trajectory[0])
    nearly = prompts(case, target=np.nextafter(np.float32(case["source"]), np.float32(9)))
    got = edit_program(network(), trajectory, features, nearly, knobs())
    np.testing.assert_allclose(got.latents, trajectory[0], atol=2e-4)


@pytest.mark.parametrize(("prediction", "axes"), [("velocity", (1, 2)), ("diff_eps", (1, 2, 3))])
def test_other_predictions_and_projections(case, prediction, axes):
    """What the kernel does not know is done by the formulas: they agree with it where it does."""
    from jaxlab.instantedit import dpg, edit, ili

    schedule = PeRFlowSchedule(prediction_type=prediction)
    rng = np.random.default_rng(2)
    z, z_src, z_inv, *eps = (jnp.asarray(rng.normal(size=(2, 8, 8, 4)), jnp.float32) for _ in range(7))
    mask = jnp.asarray(rng.random((2, 8, 8)) < 0.5)
    got, masked = edit.updated(schedule, schedule.timesteps(8), 3, z, z_src, z_inv, *eps, mask, knobs(), dpg_axes=axes)
    null, src, tgt, cross = eps
    guided = dpg(null, tgt, cross, w_cfg=KNOBS["cfg"], w_dpg=KNOBS["dpg"], axes=axes)
    plain = null + KNOBS["cfg"] * (src - null)
    want = ili(z_inv, schedule.step(guided, 625, 500, z), schedule.step(plain, 625, 500, z_src))
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(masked, jnp.where(mask[..., None], got, z_inv))


def test_an_inversion_knows_its_length(case, tmp_path, unchecked):
    trajectory, features = inverted(case)
    whole = Inversion(trajectory[:, 0], case["edges"], features[0], 4, "exact", SCALE)
    whole.save(tmp_path / "inversion.npz")
    read = Inversion.load(tmp_path / "inversion.npz")
    jax.tree.map(np.testing.assert_array_equal, vars(read), {k: np.asarray(v) for k, v in vars(whole).items()})
    bare = Inversion(trajectory[:, 0], case["edges"], None, 4, "exact", SCALE)
    bare.save(tmp_path / "bare.npz")
    assert Inversion.load(tmp_path / "bare.npz").hint_features is None
    with pytest.raises(ValueError, match=r"trajectory: expected \[6, h, w, C\] for 5 steps, got \(5, 16, 16, 4\)"):
        Inversion(trajectory[:, 0], case["edges"], None, 5, "exact", SCALE)
    with pytest.raises(ValueError, match=r"mode: expected one of .*exact.*official.*, got 'fast'"):
        Inversion(trajectory[:, 0], case["edges"], None, 4, "fast", SCALE)
    np.savez(tmp_path / "other.npz", trajectory=1)
    with pytest.raises(ValueError, match="expected an inversion, it has no control_scale, edges, mode, num_steps"):
        Inversion.load(tmp_path / "other.npz")


def test_latents_without_an_autoencoder_are_pixels():
    z = np.linspace(-1.5, 1.5, 48, dtype=np.float32).reshape(1, 4, 4, 3)
    images = decode_program(network(), z)
    np.testing.assert_array_equal(images, np.rint(np.clip(z / 2 + 0.5, 0, 1) * 255))
