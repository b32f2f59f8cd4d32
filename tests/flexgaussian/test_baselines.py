"""Other methods, k-means, bits by attribute, refits, and curves of quality by size."""

import contextlib
import dataclasses

import numpy as np
import pytest

from jaxlab.flexgaussian.baselines import BASELINES, baseline
from jaxlab.flexgaussian.bits import allocate, sensitivities
from jaxlab.flexgaussian.cameras import orbit_cameras
from jaxlab.flexgaussian.frontier import Frontier, Point, best, bytes_at
from jaxlab.flexgaussian.importance import blending
from jaxlab.flexgaussian.made_up import striped_ball
from jaxlab.flexgaussian.metrics import psnr
from jaxlab.flexgaussian.palettes import palette
from jaxlab.flexgaussian.pruning import prune
from jaxlab.flexgaussian.rasteriser import render
from jaxlab.flexgaussian.refitting import refit
from tests.flexgaussian.scenes import random_scene

SIZE = {"width": 48, "height": 32}


@pytest.fixture(scope="module")
def ball():
    return striped_ball(400)


@pytest.fixture(scope="module")
def views(ball):
    return orbit_cameras(ball, 4, **SIZE)


def _lloyd(points, centers, iterations):
    """In float64, one point at a time."""
    for step in range(iterations + 1):
        labels = np.array([np.argmin(((centers - point) ** 2).sum(axis=1)) for point in points])
        if step < iterations:
            means = [points[labels == k].mean(axis=0) if (labels == k).any() else c for k, c in enumerate(centers)]
            centers = np.array(means)
    return centers, labels


def test_palette():
    rng = np.random.default_rng(0)
    points = (rng.standard_normal((300, 5)) + 4 * rng.integers(0, 3, (300, 1))).astype(np.float32)
    start = points[np.sort(np.random.default_rng(7).permutation(300)[:6])].astype(float)
    centers, labels = _lloyd(points.astype(float), start, 3)
    vectors, chosen = palette(points, 6, iterations=3, seed=7)
    np.testing.assert_allclose(vectors, centers, atol=1e-4)
    np.testing.assert_array_equal(chosen, labels)
    np.testing.assert_array_equal(palette(points[:4], 9, iterations=1)[1], np.arange(4))
    with pytest.raises(ValueError, match="expected points, vectors and iterations"):
        palette(points, 0)


def test_spz_leaves_out_what_it_cannot_hold():
    scene = random_scene(20, 0)
    means = scene.means.copy()
    means[3, 1], means[7, 2], means[9, 0] = 2048, -2500, np.nextafter(np.float32(2047.9997), np.float32(0))
    read, _ = baseline("spz", scene.replace(means=means))
    assert read.num_gaussians == 18
    assert np.abs(read.means).max() == pytest.approx(2047.9997, abs=3e-4)


def test_baselines_on_the_disk(tmp_path):
    scene = random_scene(200, 2)
    scores = np.arange(200.0)
    sizes = {}
    for name in BASELINES:
        with pytest.warns(UserWarning, match="are lost") if name == "splat" else contextlib.nullcontext():
            back, sizes[name] = baseline(name, scene, scores=scores, prune_rate=0.25, folder=tmp_path)
        files = [path for path in tmp_path.iterdir() if path.name.startswith(name)]
        assert [path.stat().st_size for path in files] == [sizes[name]]
        assert back.num_gaussians == (150 if name in ("opacity", "lightgaussian") else 200)
    assert baseline("palette", scene)[1] == sizes["palette"]
    assert sizes["splat"] == 32 * 200
    for name, message in (("best", "name: expected one of"), ("lightgaussian", "scores: expected")):
        with pytest.raises(ValueError, match=message):
            baseline(name, scene)


def test_what_baselines_lose():
    """Each against the same thing in float64."""
    scene = random_scene(200, 2)
    half, _ = baseline("float16", scene)
    np.testing.assert_array_equal(half.sh0, scene.sh0.astype(np.float16))
    np.testing.assert_array_equal(half.means, scene.means.astype(np.float16))
    back, _ = baseline("uniform8", scene)
    for name in ("log_scales", "sh0", "shN", "opacity_logit"):
        value = getattr(scene, name).astype(float)
        step = (value.max() - value.min()) / 255
        expected = value.min() + step * np.rint((value - value.min()) / step)
        np.testing.assert_allclose(getattr(back, name), expected, atol=1e-5)
    opaque, _ = baseline("opacity", scene, prune_rate=0.5)
    kept = np.sort(scene.opacity_logit)[100:]
    assert np.abs(np.sort(opaque.opacity_logit) - kept).max() <= np.ptp(kept) / 15 + 1e-5
    coloured, _ = baseline("palette", scene)
    means = np.sign(coloured.means) * np.log1p(np.abs(coloured.means.astype(float)))
    wanted = np.sign(scene.means) * np.log1p(np.abs(scene.means.astype(float)))
    assert np.abs(np.sort(means, axis=0) - np.sort(wanted, axis=0)).max() <= 1e-4
    assert len(np.unique(coloured.shN.reshape(200, -1), axis=0)) <= 25


def test_refit_repairs_what_pruning_broke(ball, views):
    shown = [np.asarray(render(ball, camera)) for camera in views]
    pruned, _ = prune(ball, blending(ball, views), 0.5, 0.25)
    fitted = refit(pruned, views, shown, steps=24, rates={"sh0": 0.02, "shN": 0.01})
    before, after = (
        np.mean([psnr(render(scene, camera), image) for camera, image in zip(views, shown)])
        for scene in (pruned, fitted)
    )
    assert after > before + 0.5
    np.testing.assert_array_equal(fitted.opacity_logit, pruned.opacity_logit)
    plain = ~np.any(pruned.shN, axis=(1, 2))
    assert plain.any()
    assert not fitted.shN[plain].any()
    with pytest.raises(ValueError, match="references: expected one a camera"):
        refit(pruned, views, shown[:2], steps=1)
    with pytest.raises(ValueError, match="rates: expected some of"):
        refit(pruned, views, shown, steps=1, rates={"x": 1.0})


def test_bits_go_where_they_pay(ball, views):
    table = sensitivities(ball, views[:1])
    for by_bits in table.values():
        errors = [by_bits[bits][0] for bits in (4, 8, 16)]
        assert errors == sorted(errors, reverse=True)
        assert by_bits[4][1] < by_bits[8][1] < by_bits[16][1]
    chosen = {target: allocate(table, target) for target in (10.0, 30.0, 60.0, 200.0)}
    for target, quant in chosen.items():
        total = sum(table[name][getattr(quant, name)][0] for name in table)
        assert total <= 10 ** (-target / 10)
    assert dataclasses.astuple(chosen[10.0])[:5] == (4,) * 5
    assert dataclasses.astuple(chosen[200.0])[:5] == (16,) * 5


def test_frontier(ball, views):
    frontier = Frontier(ball, views[::2], views[1::2], metrics={"zero": lambda images, references: 0.0})
    assert frontier.base[:2] == (100.0, pytest.approx(1.0))
    points = list(frontier.points(["float16", "lightgaussian"]))
    assert [p.method for p in points] == ["float16"] + 6 * ["lightgaussian"]
    assert all(p.seconds > 0 and p.extra == {"zero": 0.0} for p in points)
    assert points[0].psnr > points[1].psnr > points[-1].psnr
    with pytest.raises(ValueError, match="methods: expected some of"):
        list(frontier.points(["x"]))
    with pytest.raises(ValueError, match="used, judged: expected cameras"):
        Frontier(ball, [], views)


def test_bytes_at_a_quality():
    points = [Point("", "", size, value, 0, 0) for size, value in ((100, 20.0), (400, 40.0), (300, 19.0), (200, 30.0))]
    assert [p.bytes for p in best(points)] == [100, 200, 400]
    assert bytes_at(points, 25.0) == pytest.approx(100 * 2**0.5)
    assert bytes_at(points, 40.0) == pytest.approx(400)
    assert bytes_at(points, 41.0) is None
    assert bytes_at(points, 5.0) == 100
