"""Turntables, animations, and scenes side by side."""

import numpy as np
import pytest
from PIL import Image

from jaxlab.flexgaussian import metrics, orbit_cameras, render
from jaxlab.flexgaussian.pictures import pixels, save_animation, side_by_side, turntable
from jaxlab.flexgaussian.scene import padded, take
from tests.flexgaussian.scenes import random_scene

SIZE = {"width": 48, "height": 32}


@pytest.fixture(scope="module")
def scene():
    return random_scene(20, degree=0)


@pytest.fixture(scope="module")
def frames(scene):
    return turntable(scene, 4, **SIZE)


def test_a_turntable_is_an_orbit(scene, frames):
    cameras = orbit_cameras(scene, 4, **SIZE)
    assert len(frames) == 4
    for frame, camera in zip(frames, cameras):
        drawn = np.asarray(render(scene, camera, (1, 1, 1)))
        assert (frame.shape, frame.dtype) == ((32, 48, 3), np.uint8)
        assert np.abs(frame / 255 - drawn.clip(0, 1)).max() <= 0.5 / 255 + 1e-6
    np.testing.assert_array_equal(pixels(np.array([[[-0.5, 0.5, 2.0]]])), [[[0, 128, 255]]])


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_an_animation_holds_its_frames(frames, tmp_path, kind):
    path = tmp_path / "new" / f"turn.{kind}"
    save_animation(path, frames, fps=5)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with Image.open(path) as image:
        assert (image.n_frames, image.info["loop"]) == (4, 0)
        for i, frame in enumerate(frames):
            image.seek(i)
            assert metrics.psnr(np.asarray(image.convert("RGB")) / 255, frame / 255) > 25
            assert image.info["duration"] == 200


def test_side_by_side(scene):
    after = padded(take(scene, slice(15)), 20)
    camera = orbit_cameras(scene, 1, **SIZE)[0]
    drawn = side_by_side(scene, after, camera, background=(0, 0, 0), gain=2)
    images = [np.asarray(render(each, camera)).clip(0, 1) for each in (scene, after)]
    shown = [axes.images[0].get_array() for axes in drawn.axes]
    for got, wanted in zip(shown, [*images, np.clip(2 * np.abs(images[0] - images[1]), 0, 1)]):
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    titles = [axes.get_title() for axes in drawn.axes]
    ratio = metrics.psnr(images[1], images[0])
    assert titles == ["original: 20 Gaussians", f"compressed: 20, {ratio:.1f} dB", "2 times the difference"]


def test_pictures_that_cannot_be(scene, frames, tmp_path):
    with pytest.raises(ValueError, match="frames: expected at least 1, got 0"):
        turntable(scene, 0)
    for path, images, fps, match in [
        ("a.png", frames, 12, "ends in .webp or .gif, got 'a.png'"),
        ("a.gif", [], 12, "images: expected at least one, all of one shape, got none"),
        ("a.gif", [frames[0], frames[1][:9]], 12, r"got \[\(9, 48, 3\), \(32, 48, 3\)\]"),
        ("a.gif", frames, 0, "fps"),
    ]:
        with pytest.raises(ValueError, match=match):
            save_animation(tmp_path / path, images, fps=fps)
    assert list(tmp_path.iterdir()) == []
