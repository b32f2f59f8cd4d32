"""Files of scenes: round trips, twins of one scene in several formats, real files, damaged and hostile ones."""

import gzip
import io
import json
import struct
import zipfile

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxlab.flexgaussian.formats import load_scene, save_scene
from jaxlab.flexgaussian.harmonics import FLIP_YZ, higher_basis
from jaxlab.flexgaussian.scene import ATTRIBUTES, GaussianScene, SceneFormatError, checked
from tests.flexgaussian.scenes import random_scene, real
from tests.oracles import gaussians as oracle


def same(a, b):
    for name in ATTRIBUTES:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.mark.parametrize("degree", range(4))
def test_ply_keeps_every_bit(tmp_path, degree):
    scene = random_scene(degree=degree)
    save_scene(tmp_path / "a.ply", scene)
    same(load_scene(tmp_path / "a.ply"), scene)
    header, _, body = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")
    assert len(body) == 40 * 4 * (17 + 3 * ((degree + 1) ** 2 - 1))
    assert header.count(b"f_rest_") == 3 * ((degree + 1) ** 2 - 1)
    assert not list(tmp_path.glob(".*"))


def test_ply_in_any_order_with_other_properties(tmp_path):
    scene = random_scene(degree=1)
    names = ["rot_3", "x", "extra", "y", "z", "opacity", "f_dc_2", "f_dc_0", "f_dc_1", "scale_2", "scale_0", "scale_1"]
    names += ["rot_0", "rot_1", "rot_2", *(f"f_rest_{i}" for i in (8, 0, 1, 2, 3, 4, 5, 6, 7))]
    values = {f"f_rest_{i}": scene.shN[:, i % 3, i // 3] for i in range(9)}  # red's three, then green's, then blue's
    values |= {f"rot_{i}": scene.quats[:, i] for i in range(4)} | {
        f"scale_{i}": scene.log_scales[:, i] for i in range(3)
    }
    values |= {f"f_dc_{i}": scene.sh0[:, i] for i in range(3)} | dict(zip("xyz", scene.means.T))
    values |= {"opacity": scene.opacity_logit, "extra": np.arange(40)}
    for order, kind in (("little", "<f4"), ("big", ">f8")):
        dtype = np.dtype([(name, "u1" if name == "extra" else kind) for name in names])
        rows = np.zeros(40, dtype)
        for name in names:
            rows[name] = values[name]
        lines = ["ply", f"format binary_{order}_endian 1.0", "comment none", "element camera 2", "property uchar id"]
        number = "float" if kind == "<f4" else "double"
        lines += ["element vertex 40", *(f"property {'uchar' if n == 'extra' else number} {n}" for n in names)]
        (tmp_path / "a.ply").write_bytes("\r\n".join([*lines, "end_header", ""]).encode() + b"\1\2" + rows.tobytes())
        same(load_scene(tmp_path / "a.ply"), scene)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((b"property float opacity\n", b"property float opacty\n"), "no property 'opacity'"),
        ((b"property float f_rest_8\n", b"property float skip\n"), "3 x 0, 3, 8 or 15 properties, got 8"),
        ((b"element vertex 40", b"element vertex 41"), "need .* bytes, the file ends at byte"),
        ((b"element vertex 40", b"element vertex 99999999999"), "need .* bytes, the file ends at byte"),
        ((b"element vertex 40", b"element vertex -4"), "line that is not understood"),
        ((b"element vertex", b"element point "), "no element 'vertex'"),
        ((b"binary_little_endian", b"ascii"), "binary_little_endian or binary_big_endian, got ascii"),
        ((b"format binary_little_endian 1.0\n", b""), "no format line"),
        ((b"property float x\n", b"property list uchar int x\n"), "line that is not understood"),
        ((b"property float y\n", b"property float x\n"), "twice"),
        ((b"end_header\n", b""), "PLY header"),
    ],
)
def test_damaged_ply(tmp_path, change, message, unchecked):
    path = tmp_path / "a.ply"
    save_scene(path, random_scene(degree=1))
    path.write_bytes(path.read_bytes().replace(*change))
    with pytest.raises(ValueError, match=message):
        load_scene(path)


def test_numbers_that_cannot_be(tmp_path, unchecked):
    path = tmp_path / "a.ply"
    scene = random_scene(degree=0)
    means = scene.means.copy()
    means[[3, 7], 1] = np.nan, np.inf
    bad = scene.replace(means=means)
    with pytest.raises(ValueError, match=r"scene.means: .* 2 NaN or infinite ones, the first at \(3, 1\)"):
        save_scene(path, bad)
    assert not path.exists()
    with pytest.warns(UserWarning, match="dropped 2 Gaussians"):
        assert checked(bad, sanitize=True).num_gaussians == 38
    with pytest.raises(ValueError, match="all 40 Gaussians"):
        checked(bad.replace(means=np.full_like(means, np.nan)), sanitize=True)
    with pytest.warns(UserWarning, match="1 quaternions of length zero"):
        fixed = checked(scene.replace(quats=np.where(np.arange(40)[:, None] == 5, 0, scene.quats)))
    assert fixed.quats[5].tolist() == [1, 0, 0, 0]
    for name, value, message in [
        ("means", scene.means[:0], "at least one Gaussian"),
        ("quats", scene.quats[:, :3], r"scene.quats: expected shape \(40, 4\), got \(40, 3\)"),
        ("shN", np.zeros((40, 4, 3)), "0, 3, 8 or 15 coefficients a colour .* got 4"),
        ("shN", np.zeros((40, 9)), r"scene.shN: expected shape \(40, K, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            checked(scene.replace(**{name: value}))
    for name in ("a.txt", "a.sog", "a.compressed.ply"):
        with pytest.raises(ValueError, match=r"path: expected a name that ends in .ply, .splat, .spz"):
            save_scene(tmp_path / name, scene)


def test_spz_within_its_steps(tmp_path):
    scene = random_scene(degree=3)
    save_scene(tmp_path / "a.spz", scene)
    read = load_scene(tmp_path / "a.spz")
    assert np.abs(read.means - scene.means).max() <= 0.5 / 4096
    assert np.abs(read.log_scales - scene.log_scales).max() <= 0.5 / 16 + 1e-6
    assert np.abs(read.sh0 - np.clip(scene.sh0, -0.5 / 0.15, 0.5 / 0.15)).max() <= 0.51 / (0.15 * 255)
    step = np.where(np.arange(15) < 3, 8, 16)[:, None] / 128
    assert (np.abs(read.shN - np.clip(scene.shN, -1, 127 / 128)) <= step / 2 + 1 / 256 + 1e-6).all()
    sigmoid = [1 / (1 + np.exp(-s.opacity_logit)) for s in (read, scene)]
    assert np.abs(sigmoid[0] - sigmoid[1]).max() <= 0.51 / 255
    unit = [s.quats / np.linalg.norm(s.quats, axis=1, keepdims=True) for s in (read, scene)]
    assert np.abs(np.sum(unit[0] * unit[1], axis=1)).min() > 1 - 1e-5
    save_scene(tmp_path / "b.spz", scene)
    assert (tmp_path / "a.spz").read_bytes() == (tmp_path / "b.spz").read_bytes()
    with pytest.raises(ValueError, match="coordinates below 2048, got one of 5000"):
        save_scene(tmp_path / "c.spz", scene.replace(means=scene.means * 0 + 5000))


def test_half_a_turn_about_x_shows_the_same_colours():
    rng = np.random.default_rng(1)
    directions = rng.standard_normal((20, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    turned = directions * [1, -1, -1]
    here = np.stack([oracle.basis(d) for d in directions])
    there = np.stack([oracle.basis(d) for d in turned])
    np.testing.assert_allclose(there * FLIP_YZ, here, atol=1e-12)
    np.testing.assert_allclose(higher_basis(np.float32(directions), 3), here, atol=2e-6)


def test_splat_warns_of_lost_harmonics(tmp_path):
    scene = random_scene(degree=1)
    with pytest.warns(UserWarning, match="degree 1 to 1 are lost"):
        save_scene(tmp_path / "a.splat", scene)
    read = load_scene(tmp_path / "a.splat")
    np.testing.assert_array_equal(read.means, scene.means)
    np.testing.assert_allclose(read.log_scales, scene.log_scales, atol=1e-5)
    assert read.degree == 0
    save_scene(tmp_path / "b.splat", scene.replace(shN=np.zeros((40, 0, 3), np.float32)))
    assert (tmp_path / "b.splat").read_bytes() == (tmp_path / "a.splat").read_bytes()
    (tmp_path / "b.splat").write_bytes((tmp_path / "a.splat").read_bytes()[:-3])
    with pytest.raises(SceneFormatError, match="inside of the one at byte 1248"):
        load_scene(tmp_path / "b.splat")


def test_twins_of_one_scene():
    """Four Gaussians written by another tool as .splat and as .spz 3 and 4."""
    splat, *others = (load_scene(real(f"fixtures/minimal{end}")) for end in (".splat", "-v3.spz", "-v4.spz"))
    same(*others)
    np.testing.assert_allclose(others[0].means, splat.means, atol=1e-6)
    np.testing.assert_allclose(others[0].sh0, splat.sh0, atol=0.02)
    np.testing.assert_allclose(others[0].opacity_logit, splat.opacity_logit)
    np.testing.assert_allclose(others[0].log_scales, splat.log_scales, atol=1 / 16)
    same(load_scene(real("fixtures/minimal-raw.spz")), load_scene(real("fixtures/minimal-v2.spz")))
    assert load_scene(real("fixtures/minimal-v2.spz")).quats[0] == pytest.approx([1, 0, 0, 0], abs=0.01)


def test_real_scenes():
    levels = [load_scene(real(f"playbot_lod{n}.sog")) for n in (3, 6)]
    assert [(s.num_gaussians, s.degree) for s in levels] == [(31000, 2), (1873, 2)]
    # Levels of detail of one robot: the same box, colours and opacities on average.
    for name, tolerance in (("means", 0.2), ("sh0", 0.3)):
        a, b = (np.quantile(getattr(s, name), [0.05, 0.5, 0.95], axis=0) for s in levels)
        np.testing.assert_allclose(a, b, atol=tolerance)
    for scene in levels:
        np.testing.assert_allclose(np.linalg.norm(scene.quats, axis=1), 1, atol=1e-5)
    biker = load_scene(real("biker.compressed.ply"))
    assert (biker.num_gaussians, biker.degree) == (152746, 0)
    np.testing.assert_allclose(biker.means[0], [-0.1045368, -2.3878982, -0.360811], rtol=1e-6)
    np.testing.assert_allclose(biker.quats[0], [0.46103638, -0.06290001, 0.8848552, 0.0228099], rtol=1e-6)
    np.testing.assert_allclose(biker.log_scales[0], [-6.068917, -4.206543, -7.050748], rtol=1e-6)


def _spz(version=3, count=4, degree=0, extra=0):
    sizes = [6 if version == 1 else 9, 1, 3, 3, 3 if version < 3 else 4, 3 * ((degree + 1) ** 2 - 1)]
    return struct.pack("<4sIIBBBB", b"NGSP", version, count, degree, 12, 0, 0) + bytes(4 * sum(sizes) + extra)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_spz(version=9), "version 9 is not known"),
        (gzip.compress(_spz(version=9), mtime=0), "version 9 is not known"),
        (_spz(degree=7), "degree 7"),
        (_spz(count=5), r"5 Gaussians need 116 bytes, the data ends at byte 96"),
        (gzip.compress(_spz(count=4_000_000_000), mtime=0), "cannot hold the 4000000000 Gaussians"),
        (gzip.compress(_spz(), mtime=0)[:24], "need .* the data ends|magic"),
        (gzip.compress(_spz(), mtime=0)[:-20] + bytes(20), "damaged gzip|need .* the data ends"),
        (b"\x1f\x8b\x08rubbish, rubbish", "damaged gzip"),
        (b"NGSP\4\0\0\0", "header"),
        (b"rubbish", "got a file that starts with"),
        (b"", "got a file that starts with"),
    ],
)
def test_damaged_spz(tmp_path, content, message, unchecked):
    (tmp_path / "a.spz").write_bytes(content)
    with pytest.raises(SceneFormatError, match=message):
        load_scene(tmp_path / "a.spz")


def test_spz_of_the_first_version(tmp_path):
    halves = np.float16([[1, 2, 3], [4, 5, 6]])
    content = struct.pack("<4sIIBBBB", b"NGSP", 1, 2, 0, 12, 0, 0) + halves.tobytes() + bytes(2 * (1 + 3 + 3 + 3))
    (tmp_path / "a.spz").write_bytes(content)
    np.testing.assert_array_equal(load_scene(tmp_path / "a.spz").means, halves * np.float32([1, -1, -1]))


def test_spz_4_that_lies(tmp_path, unchecked):
    good = real("fixtures/minimal-v4.spz").read_bytes()
    assert load_scene(real("fixtures/minimal-v4.spz")).num_gaussians == 4
    for place, value, message in [
        (8, struct.pack("<I", 4_000_000_000), "expected 36000000000 bytes, told 36"),
        (16, struct.pack("<I", 999), "the table of streams ends at byte"),
        (15, b"\7", "expected 5 streams"),
        (32, struct.pack("<Q", 1 << 40), "expected 36 bytes, told 36 in 1099511627776"),
        (120, b"\0\0\0\0", "is damaged|expected"),
    ]:
        (tmp_path / "a.spz").write_bytes(good[:place] + value + good[place + len(value) :])
        with pytest.raises(SceneFormatError, match=message):
            load_scene(tmp_path / "a.spz")


def _sog(changes=None, members=None):
    with zipfile.ZipFile(real("playbot_lod6.sog")) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    meta = json.loads(files["meta.json"])
    (changes or (lambda meta: None))(meta)
    files["meta.json"] = json.dumps(meta).encode()
    files |= members or {}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            if data is not None:
                archive.writestr(name, data)
    return content.getvalue()


def _png(alpha):
    content = io.BytesIO()
    Image.new("RGBA", (64, 64), (0, 0, 0, alpha)).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    ("changes", "members", "message"),
    [
        (lambda m: m.update(version=1), {}, "expected version 2"),
        (lambda m: m.update(count=10**9), {}, "expected version 2 and a count"),
        (lambda m: m.update(count=10**6), {}, "expected at least 1000000 pixels"),
        (lambda m: m["means"].update(mins=[0, 1]), {}, "three numbers"),
        (lambda m: m["means"].update(mins="abc"), {}, "expected numbers at means.mins"),
        (lambda m: m["scales"].update(codebook=[1.0]), {}, "codebook of 'scales' has 1 entries"),
        (lambda m: m["shN"].update(bands=9), {}, "1 to 3 bands"),
        (lambda m: m["shN"].update(count=2), {}, "of a palette of 2"),
        (lambda m: m["quats"].update(files=[]), {}, "expected file 0 of 'quats'"),
        (lambda m: m.pop("sh0"), {}, "expected file 0 of 'sh0'"),
        (None, {"quats.webp": None}, "no member 'quats.webp'"),
        (None, {"quats.webp": b"RIFF1234WEBPVP8 "}, "damaged image"),
        (None, {"means_l.webp": "means_u.webp"}, "damaged image"),
        (None, {"quats.webp": _png(0)}, "alphas of 252 to 255, got 0"),
        (None, {"meta.json": b"["}, "meta.json"),
        (None, {"meta.json": b"[" * 100_000}, "meta.json"),
        (None, {"meta.json": b"[]"}, "expected an object"),
        (None, {"meta.json": None}, "no member 'meta.json'"),
        (None, {"meta.json": b" " * (5 << 20)}, "more than the 4194304"),
    ],
)
def test_damaged_sog(tmp_path, changes, members, message, unchecked):
    (tmp_path / "a.sog").write_bytes(_sog(changes, members))
    with pytest.raises(SceneFormatError, match=message):
        load_scene(tmp_path / "a.sog")


def test_a_zip_that_is_cut_off(tmp_path, unchecked):
    content = _sog()
    (tmp_path / "a.sog").write_bytes(content)
    same(load_scene(tmp_path / "a.sog"), load_scene(real("playbot_lod6.sog")))
    (tmp_path / "a.sog").write_bytes(content[:-500])
    with pytest.raises(SceneFormatError, match="damaged zip"):
        load_scene(tmp_path / "a.sog")


def test_harmonics_of_a_compressed_ply(tmp_path, unchecked):
    properties = [f"{side}_{name}" for side in ("min", "max") for name in ("x", "y", "z")]
    properties += [f"{side}_scale_{name}" for side in ("min", "max") for name in ("x", "y", "z")]
    lines = ["ply", "format binary_little_endian 1.0", "element chunk 1", *(f"property float {p}" for p in properties)]
    packed = ("position", "rotation", "scale", "color")
    lines += ["element vertex 2", *(f"property uint packed_{p}" for p in packed)]
    lines += ["element sh 2", *(f"property uchar f_rest_{i}" for i in range(9)), "end_header", ""]
    words = np.uint32([[0, 0x20080200, 0, 0x80FF00FF], [0xFFFFFFFF, 0xE0080200, 0xFFFFFFFF, 0x00000080]])
    harmonics = np.uint8([[0, 255, 127, 128, 1, 2, 3, 4, 5], [9] * 9])
    body = np.float32([-1, -2, -3, 1, 2, 3, -8, -8, -8, -4, -4, -4]).tobytes() + words.tobytes() + harmonics.tobytes()
    header = "\n".join(lines).encode()
    (tmp_path / "a.ply").write_bytes(header + body)
    scene = load_scene(tmp_path / "a.ply")
    np.testing.assert_allclose(scene.means, [[-1, -2, -3], [1, 2, 3]])
    np.testing.assert_allclose(scene.log_scales, [[-8] * 3, [-4] * 3])
    np.testing.assert_allclose(scene.quats, [[1, 0, 0, 0], [0, 0, 0, 1]], atol=2e-3)  # the middle of 1023 is no code
    expected = [-4, 4, (127.5 / 256 - 0.5) * 8, (128.5 / 256 - 0.5) * 8]
    np.testing.assert_allclose(scene.shN[0].T.reshape(-1)[:4], expected, atol=1e-6)
    np.testing.assert_allclose(scene.sh0[0] * 0.28209479177387814 + 0.5, [128 / 255, 1, 0], atol=1e-6)
    (tmp_path / "a.ply").write_bytes(header.replace(b"element sh 2", b"element sh 1") + body)
    with pytest.raises(SceneFormatError, match="1 rows of harmonics for 2 vertices"):
        load_scene(tmp_path / "a.ply")
    (tmp_path / "a.ply").write_bytes(header.replace(b"packed_scale", b"packed_size") + body)
    with pytest.raises(SceneFormatError, match="no property 'packed_scale'"):
        load_scene(tmp_path / "a.ply")


_STARTS = [
    b"ply\nformat binary_little_endian 1.0\nelement vertex 1\n",
    b"NGSP\3\0\0\0\1\0\0\0",
    b"PK\3\4",
    b"\x1f\x8b\x08",
    b"",
]


@settings(max_examples=200, deadline=None)
@given(start=st.sampled_from(_STARTS), rest=st.binary(max_size=300), name=st.sampled_from(["a.splat", "a.ply"]))
def test_any_bytes_are_a_scene_or_a_clear_error(tmp_path_factory, start, rest, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(start + rest)
    try:
        scene = load_scene(path)
    except ValueError:
        return
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(scene))


def test_a_scene_is_a_pytree():
    scene = random_scene(degree=2)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, scene)
    assert isinstance(doubled, GaussianScene)
    assert (doubled.num_gaussians, doubled.degree) == (40, 2)
    assert scene.num_bytes == 40 * 4 * (14 + 24)
