"""Rendering under transformations, Gaussians that move, and learning a scene from pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import Checkpointer
from jaxlab.flexgaussian import rasteriser
from jaxlab.flexgaussian.cameras import orbit_cameras
from jaxlab.flexgaussian.fitting import FitConfig, GaussianModel, fit
from jaxlab.flexgaussian.formats import load_scene
from jaxlab.flexgaussian.metrics import psnr
from jaxlab.flexgaussian.photos import load_photographs, straightened
from jaxlab.flexgaussian.projection import view_of
from jaxlab.flexgaussian.rasteriser import render
from jaxlab.flexgaussian.relocation import relocated, shared
from jaxlab.flexgaussian.scene import ATTRIBUTES, UNSEEN_LOGIT, padded
from jaxlab.flexgaussian.starting import initial_scene, scene_extent
from tests.flexgaussian.scenes import random_scene, real
from tests.flexgaussian.test_projection import camera


@pytest.mark.latest
def test_renders_agree(monkeypatch):
    scene, view = random_scene(300, degree=1), camera(3.0)
    plain, aux = render(scene, view, (0.1, 0.5, 0.9), return_aux=True)
    dense, dense_aux = render(scene, view, (0.1, 0.5, 0.9), backend="dense", return_aux=True)
    assert np.abs(plain - dense).max() < 1e-4
    np.testing.assert_array_equal(aux.pixel_counts, dense_aux.pixel_counts)
    np.testing.assert_allclose(plain, jax.jit(lambda s: render(s, view, (0.1, 0.5, 0.9)))(scene), atol=1e-6)
    black = render(scene, view)
    np.testing.assert_allclose(plain - black, aux.transmittance[..., None] * np.float32([0.1, 0.5, 0.9]), atol=1e-6)
    more = padded(scene, 500)
    assert more.num_gaussians == 500
    assert more.opacity_logit[-1] == UNSEEN_LOGIT
    np.testing.assert_array_equal(render(more, view), black)


def test_too_many_pairs_are_never_dropped(monkeypatch):
    scene, view = random_scene(60, degree=0), camera(3.0, width=32, height=16)
    whole, aux = render(scene, view, return_aux=True)

    def squares(scene, backend):
        image, aux = render(scene, view, backend=backend, return_aux=True)
        return jnp.sum(image**2), (image, aux.pixel_counts)

    # The image beside its gradient: compiling is what this test costs.
    traced = jax.jit(jax.grad(squares, has_aux=True), static_argnums=1)
    gradient, _ = traced(scene, "dense")
    monkeypatch.setattr(rasteriser, "first_guess", lambda count: 8)
    again = render(scene, view)
    assert int(rasteriser.rasterize(scene, view_of(view), width=32, height=16).num_pairs) > 8
    np.testing.assert_array_equal(again, whole)
    slopes, (streamed, counts) = traced(scene, "auto")
    np.testing.assert_allclose(streamed, whole, atol=1e-5)
    np.testing.assert_array_equal(counts, aux.pixel_counts)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(slopes)):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * float(jnp.abs(a).max(initial=0)))


def test_renders_that_cannot_be(unchecked):
    with pytest.raises(ValueError, match="backend: expected one of"):
        render(random_scene(), camera(), backend="best")
    with pytest.raises(ValueError, match=r"scene.quats: expected shape \(40, 4\)"):
        render(random_scene().replace(quats=np.zeros((40, 3), np.float32)), camera())
    with pytest.raises(ValueError, match="at least one Gaussian"):
        render(jax.tree.map(lambda leaf: leaf[:0], random_scene()), camera())


def test_copies_look_like_the_one():
    """A line through the middle of a Gaussian: n copies of the new opacity and scale blend to what one did."""
    opacity = np.array([0.02, 0.3, 0.9, 0.99])
    for copies in (1, 2, 3, 10):
        new, factor = shared(jnp.float32(opacity), jnp.full(4, copies))
        if copies == 1:
            np.testing.assert_allclose(new, opacity, rtol=1e-5)
            np.testing.assert_allclose(factor, 1, rtol=1e-5)
        x = np.linspace(-8, 8, 4001)
        for o, n, f in zip(opacity, np.asarray(new, float), np.asarray(factor, float)):
            before = o * np.exp(-(x**2) / 2)
            after = 1 - (1 - n * np.exp(-((x / f) ** 2) / 2)) ** copies
            if n > 0.0051:  # below it the opacity is raised to what is not idle
                assert np.trapezoid(after, x) == pytest.approx(np.trapezoid(before, x), rel=2e-3)
                assert after[2000] == pytest.approx(o, rel=1e-3)


def test_idle_gaussians_move():
    scene = random_scene(50, degree=1)
    logit = np.where(np.arange(50) < 10, -9.0, scene.opacity_logit).astype(np.float32)
    faded = scene.replace(opacity_logit=logit)
    params = {name: jnp.asarray(getattr(faded, name)) for name in ATTRIBUTES}
    moved, changed = relocated(params, jax.random.key(0), 0.005)
    assert changed[:10].all()
    live = jax.nn.sigmoid(moved["opacity_logit"])
    assert (live > 0.004).all()
    for i in range(10):
        twins = np.flatnonzero((np.asarray(moved["means"]) == np.asarray(moved["means"])[i]).all(axis=1))
        assert len(twins) > 1
        assert max(twins) >= 10
    untouched = ~np.asarray(changed)
    for name in params:
        np.testing.assert_array_equal(np.asarray(moved[name])[untouched], np.asarray(params[name])[untouched])
    dead = {**params, "opacity_logit": jnp.full(50, -9.0)}
    same, changed = relocated(dead, jax.random.key(0), 0.005)
    assert not changed.any()
    np.testing.assert_array_equal(same["means"], dead["means"])


def test_starting_points(unchecked):
    cameras = orbit_cameras(random_scene(), 4, 32, 32)
    key = jax.random.key(0)
    some = initial_scene(cameras, None, 200, 2, key)
    assert (some.num_gaussians, some.degree) == (200, 2)
    middle = np.stack([c.center for c in cameras]).mean(axis=0)
    assert np.abs(some.means.mean(axis=0) - middle)[[0, 2]].max() < scene_extent(cameras)
    points = np.random.default_rng(0).standard_normal((30, 3))
    given = initial_scene(cameras, (points, np.full((30, 3), 0.5)), 90, 0, key)
    np.testing.assert_allclose(given.sh0, 0, atol=1e-6)
    nearest = np.linalg.norm(given.means[:, None] - points[None], axis=2).min(axis=1)
    assert nearest.max() < 0.5
    for wrong, message in [
        (np.zeros((0, 3)), "expected finite points"),
        (np.full((3, 3), np.nan), "expected finite points"),
        (np.zeros((3, 2)), "expected finite points"),
        ((np.zeros((3, 3)), np.zeros((2, 3))), "expected colours of shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            initial_scene(cameras, wrong, 10, 0, key)


@pytest.fixture(scope="module")
def pictures():
    scene = load_scene(real("playbot_lod6.sog"))
    cameras = orbit_cameras(scene, 6, 48, 32)
    return [np.clip(np.asarray(render(scene, c)), 0, 1) for c in cameras], cameras, scene.means


SHORT = FitConfig(count=400, degree=1, relocate_every=20)


def test_a_scene_is_learned_and_resumed(pictures, tmp_path):
    images, cameras, points = pictures
    scene, history = fit(images, cameras, points, steps=60, config=SHORT, folder=tmp_path / "a", checkpoint_every=30)
    before = initial_scene(cameras, points, 400, 1, jax.random.key(0))
    start, end = (np.mean([psnr(render(s, c), i) for i, c in zip(images, cameras)]) for s in (before, scene))
    assert end > start + 3
    assert history[-1]["step"] == 60
    assert (tmp_path / "a" / "metrics.jsonl").exists()

    class StopError(Exception):
        pass

    seen = []

    def stopping(self, step, state, extra=None):
        seen.append(step)
        save(self, step, state, extra)
        raise StopError

    save = Checkpointer.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "save", stopping)
        with pytest.raises(StopError):
            fit(images, cameras, points, steps=60, config=SHORT, folder=tmp_path / "b", checkpoint_every=30)
    assert seen == [30]
    resumed, _ = fit(images, cameras, points, steps=60, config=SHORT, folder=tmp_path / "b", checkpoint_every=30)
    for a, b in zip(jax.tree.leaves(scene), jax.tree.leaves(resumed)):
        np.testing.assert_array_equal(a, b)


def test_fits_that_cannot_be(pictures, unchecked):
    images, cameras, points = pictures
    for arguments, message in [
        ((images[:2], cameras), "expected one a camera"),
        (([], []), "at least one"),
        (([images[0][:, :20]] * 6, cameras), r"images\[0\]: expected shape \(32, 48, 3\) for all"),
        (([images[0] * np.nan] * 6, cameras), r"images\[0\]: expected finite numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(*arguments, points, steps=1, config=SHORT)
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        fit(images, cameras, points, steps=0, config=SHORT)
    with pytest.raises(ValueError, match="count, degree"):
        FitConfig(count=0)


def test_the_model_is_a_linen_module():
    model = GaussianModel(5, 2)
    params = model.init(jax.random.key(0), view_of(camera()), width=16, height=16, max_pairs=64)["params"]
    assert params["shN"].shape == (5, 8, 3)
    drawn = model.apply({"params": params}, view_of(camera()), width=16, height=16, max_pairs=64)
    assert drawn.image.shape == (16, 16, 3)


def test_photographs_are_straightened():
    real("fox")
    images, cameras = load_photographs(real("fox/transforms_original.json"), 27, 48)
    assert len(images) == len(cameras) == 50
    assert images[0].shape == (48, 27, 3)
    assert 0 <= images[0].min() < images[0].max() <= 1
    assert (cameras[0].width, cameras[0].height) == (27, 48)


def test_straight_lines_of_a_bent_picture():
    """What a lens with known distortion would take of a straight pattern comes back as the pattern."""
    view = camera(fx=60, fy=60, cx=32, cy=24)
    k1, k2, p1, p2 = lens = [0.12, -0.05, 0.01, -0.008]

    def pattern(x, y):
        return np.stack([np.sin(9 * x), np.sin(9 * y), np.sin(5 * x + 7 * y)], axis=-1)

    u, v = np.meshgrid(np.arange(64) + 0.5, np.arange(48) + 0.5)
    bent = (u - 32) / 60, (v - 24) / 60
    x, y = bent
    for _ in range(50):  # the ray of a bent pixel, by fixed-point iteration
        r = x * x + y * y
        radial = 1 + k1 * r + k2 * r * r
        x = (bent[0] - 2 * p1 * x * y - p2 * (r + 2 * x * x)) / radial
        y = (bent[1] - p1 * (r + 2 * y * y) - 2 * p2 * x * y) / radial
    got = straightened(pattern(x, y).astype(np.float32), view, lens)
    want = pattern((u - 32) / 60, (v - 24) / 60)
    inside = (slice(8, -8), slice(8, -8))
    assert np.abs(got - want)[inside].max() < 0.01
    np.testing.assert_array_equal(straightened(got, view, [0, 0, 0, 0]), got)
