"""Cameras, and where they see Gaussians."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.flexgaussian.cameras import Camera, cameras_from_colmap, cameras_from_transforms, orbit_cameras
from jaxlab.flexgaussian.formats import load_scene
from jaxlab.flexgaussian.projection import project
from jaxlab.flexgaussian.scene import SceneFormatError
from tests.flexgaussian.scenes import random_scene, real
from tests.oracles import gaussians as oracle


def camera(distance=4.0, **changes):
    view = np.eye(4, dtype=np.float32)
    view[:3, :3] = oracle.rotation([0.9, 0.1, 0.3, -0.2])
    view[2, 3] = distance
    return Camera(**{"viewmat": view, "fx": 50, "fy": 60, "cx": 31, "cy": 25, "width": 64, "height": 48, **changes})


@pytest.mark.parametrize("degree", [0, 3])
@pytest.mark.parametrize("distance", [4.0, 0.5])
def test_projection(degree, distance):
    scene = random_scene(degree=degree)
    got = jax.jit(lambda scene: project(scene, camera(distance)))(scene)
    want = oracle.project(scene, camera(distance))
    culled = want[:, 9] == 0
    assert culled.sum() < 40
    assert culled.any() == (distance < 1)
    np.testing.assert_array_equal(got.radii[culled], 0)
    seen = ~culled
    np.testing.assert_allclose(got.means2d[seen], want[seen, :2], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(got.depths[seen], want[seen, 2], rtol=1e-5)
    np.testing.assert_allclose(got.conics[seen], want[seen, 3:6], rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(got.rgb[seen], want[seen, 6:9], atol=2e-5)
    assert np.abs(np.asarray(got.radii)[seen] - want[seen, 9]).max() <= 1


def test_derivatives_of_what_is_culled_are_finite():
    scene = jax.tree.map(jnp.asarray, random_scene(degree=1))
    behind = scene.replace(means=scene.means.at[:5].set(camera(4.0).center))

    def total(scene):
        got = project(scene, camera(4.0))
        return sum(jnp.sum(jnp.where(got.radii[:, None] > 0, leaf.reshape(40, -1), 0)) for leaf in got[:4])

    gradient = jax.grad(total)(behind)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert not np.any(gradient.means[:5])


def test_orbit_sees_the_scene():
    scene = load_scene(real("playbot_lod6.sog"))
    cameras = orbit_cameras(scene)
    assert len(cameras) == 8
    assert {(c.width, c.height) for c in cameras} == {(256, 192)}
    for one in cameras:
        radii = np.asarray(project(scene, one).radii)
        assert np.mean(radii > 0) > 0.9
        means2d = np.asarray(project(scene, one).means2d)
        middle = means2d[radii > 0].mean(axis=0)
        assert np.abs(middle - [128, 96]).max() < 40
    assert all((a.viewmat == b.viewmat).all() for a, b in zip(cameras, orbit_cameras(scene)))
    np.testing.assert_allclose(
        np.linalg.norm(cameras[0].center - cameras[1].center),
        np.linalg.norm(cameras[4].center - cameras[5].center),
        rtol=1e-3,
    )
    above = orbit_cameras(scene, 2, elevation=60)[0]
    assert above.center[1] < cameras[0].center[1]  # y points down
    for count, options, message in [(0, {}, "count: expected at least 1"), (1, {"elevation": 90}, "elevation")]:
        with pytest.raises(ValueError, match=message):
            orbit_cameras(scene, count, **options)


def test_the_photographs_of_the_fox(unchecked):
    path = real("fox/transforms_original.json")
    real("fox")
    with pytest.warns(UserWarning, match="lens distortion is ignored"):
        cameras = cameras_from_transforms(path)
    assert len(cameras) == 50
    assert cameras[0].name == "0001.jpg"
    assert [c.name for c in cameras] == sorted(c.name for c in cameras)
    small = cameras[0].scaled(270, 480)
    assert (small.fx, small.cx, small.height) == (1375.52 / 4, 554.558 / 4, 480)
    # All look towards one place: the point nearest to all viewing axes lies before every camera.
    axes = np.stack([c.viewmat[2, :3] for c in cameras]).astype(float)
    off = np.eye(3) - axes[:, :, None] * axes[:, None]
    target = np.linalg.solve(off.sum(0), np.einsum("nij,nj->i", off, np.stack([c.center for c in cameras])))
    assert all((c.viewmat @ [*target, 1])[2] > 0 for c in cameras)


def test_transforms_that_are_wrong(tmp_path, unchecked):
    frame = {"file_path": "a.jpg", "transform_matrix": np.eye(4).tolist()}
    good = {"camera_angle_x": 0.9, "w": 64, "h": 48, "frames": [frame]}
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps(good))
    with pytest.raises(SceneFormatError, match="none of its 1 frames has an image"):
        cameras_from_transforms(path)
    (one,) = cameras_from_transforms(path, existing=False)
    assert one.fx == one.fy == pytest.approx(32 / np.tan(0.45))
    assert (one.cx, one.cy) == (32, 24)
    np.testing.assert_array_equal(one.viewmat, np.diag([1, -1, -1, 1]))
    for change in [{"frames": None}, {"w": "x"}, {"frames": [{**frame, "transform_matrix": [1]}]}, {"frames": [{}]}]:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(SceneFormatError, match=r"transforms.json"):
            cameras_from_transforms(path, existing=False)
    path.write_text("[" * 100_000)
    with pytest.raises(SceneFormatError, match="not a transforms"):
        cameras_from_transforms(path)


_POSES = [(1, 0.9, 0.1, 0.2, 0.3, 1.0, 2.0, 3.0, 7, "b.jpg"), (2, 1.0, 0, 0, 0, 0, 0, 4.0, 7, "a.jpg")]


def _write_colmap(folder, binary, model="PINHOLE", parameters=(50.0, 60.0, 31.0, 25.0), points=2):
    folder.mkdir(parents=True)
    if not binary:
        lens = f"7 {model} 64 48 {' '.join(map(str, parameters))}"
        (folder / "cameras.txt").write_text(f"# cameras\n{lens}\n")
        lines = [f"{' '.join(map(str, pose))}\n{'1.0 2.0 -1 ' * points}" for pose in _POSES]
        (folder / "images.txt").write_text("# images\n" + "\n".join(lines) + "\n")
        return
    number = ["SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FISHEYE"].index(model)
    lens = struct.pack(f"<QiiQQ{len(parameters)}d", 1, 7, number, 64, 48, *parameters)
    (folder / "cameras.bin").write_bytes(lens)
    data = struct.pack("<Q", len(_POSES))
    for *numbers, name in _POSES:
        data += struct.pack("<i7di", *numbers) + name.encode() + b"\0" + struct.pack("<Q", points) + bytes(24 * points)
    (folder / "images.bin").write_bytes(data)


@pytest.mark.parametrize("binary", [True, False])
def test_colmap(tmp_path, binary, unchecked):
    _write_colmap(tmp_path / "sparse" / "0", binary)
    cameras = cameras_from_colmap(tmp_path)
    assert [c.name for c in cameras] == ["a.jpg", "b.jpg"]
    np.testing.assert_allclose(cameras[1].viewmat[:3, :3], oracle.rotation([0.9, 0.1, 0.2, 0.3]), atol=1e-6)
    np.testing.assert_allclose(cameras[1].viewmat[:3, 3], [1, 2, 3])
    assert (cameras[0].fx, cameras[0].fy, cameras[0].cx, cameras[0].cy, cameras[0].width) == (50, 60, 31, 25, 64)
    _write_colmap(tmp_path / "radial", binary, "SIMPLE_RADIAL", (50.0, 31.0, 25.0, 0.1))
    with pytest.warns(UserWarning, match="lens distortion is ignored"):
        assert cameras_from_colmap(tmp_path / "radial")[0].fy == 50
    _write_colmap(tmp_path / "fish", binary, "FISHEYE", (50.0, 31.0, 25.0, 0.1))
    with pytest.raises(SceneFormatError, match="only pinhole and radial ones"):
        cameras_from_colmap(tmp_path / "fish")
    name = "images.bin" if binary else "images.txt"
    content = (tmp_path / "radial" / name).read_bytes()
    (tmp_path / "radial" / name).write_bytes(content[:80] if binary else b"1 2 3\n\n")
    with pytest.raises(SceneFormatError, match="damaged COLMAP model"):
        cameras_from_colmap(tmp_path / "radial")
    with pytest.raises(FileNotFoundError, match="no COLMAP model"):
        cameras_from_colmap(tmp_path / "nothing")


def test_cameras_that_cannot_be(unchecked):
    for change, message in [
        ({"viewmat": np.eye(3)}, "viewmat"),
        ({"viewmat": np.full((4, 4), np.nan)}, "viewmat"),
        ({"fx": 0}, "fx and fy above 0"),
        ({"cy": np.inf}, "finite"),
        ({"width": 0}, "width, height: expected at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            camera(**change)
