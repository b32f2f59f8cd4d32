"""Codes by segments, pruning, whole scenes in packed form, and their files."""

import dataclasses
import itertools
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.flexgaussian import quantization
from jaxlab.flexgaussian.compressed import CODED, dequantize, quantize
from jaxlab.flexgaussian.config import QuantConfig
from jaxlab.flexgaussian.container import CODECS, from_bytes, load_compressed, save_compressed, to_bytes
from jaxlab.flexgaussian.formats import load_scene
from jaxlab.flexgaussian.morton import morton_order
from jaxlab.flexgaussian.pruning import prune
from jaxlab.flexgaussian.scene import ATTRIBUTES, SceneFormatError, take
from tests.flexgaussian.scenes import random_scene, real
from tests.oracles import gaussians as oracle


@settings(max_examples=300, deadline=None)
@given(n=st.integers(1, 3000), segments=st.integers(1, 1200), bits=st.sampled_from([2, 4, 8]))
def test_bounds(n, segments, bits):
    unit = 8 // bits
    bounds = quantization.segment_bounds(n, segments, bits)
    lengths = np.diff(bounds)
    assert (bounds[0], bounds[-1], len(lengths)) == (0, n, min(segments, -(-n // unit)))
    assert lengths.min() > 0
    assert np.ptp(lengths) <= unit
    assert not np.any(bounds[:-1] % unit)
    official = quantization.segment_bounds(n, segments, bits, rule="official")
    if bits == 8:
        s = min(segments, n)
        assert official.tolist() == [int(v) for v in np.linspace(0, n, s + 1)]
    else:
        length = -(-n // min(segments, n))
        length += -length % unit
        assert official.tolist() == [*range(0, n, length), n]


def test_bounds_that_cannot_be(unchecked):
    for arguments, options, message in [
        ((0, 1, 8), {}, "expected at least 1"),
        ((1, 0, 8), {}, "expected at least 1"),
        ((9, 1, 3), {}, "bits: expected one of"),
        ((9, 1, 8), {"rule": "best"}, "rule: expected one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantization.segment_bounds(*arguments, **options)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_those_of_one_number_at_a_time(bits):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((61, 3)) * [1, 1e-3, 1e6] + [0, 5, -1e6]).astype(np.float32)
    x[8:20, 1] = 0.25
    bounds = quantization.segment_bounds(61, 5, bits)
    codes, minimum, scale = quantization.quantize_matrix(x, bounds, bits)
    for got, want in zip((codes, minimum, scale), oracle.codes(x, bounds, bits)):
        np.testing.assert_array_equal(got, want)
    assert codes.dtype == np.uint8
    back = quantization.dequantize_matrix(codes, minimum, scale, bounds)
    allowed = np.repeat(scale, np.diff(bounds), axis=0) / 2 + np.abs(x) * 1e-6
    assert (np.abs(back - x) <= allowed).all()
    again = quantization.quantize_matrix(back, bounds, bits)[0]
    assert np.abs(again.astype(int) - codes).max() <= 1


def test_a_row_and_none():
    codes, minimum, scale = quantization.quantize_matrix(np.float32([[3, -2]]), np.array([0, 1]), 8)
    assert codes.tolist() == [[0, 0]]
    assert (minimum.tolist(), scale.tolist()) == ([[3, -2]], [[1, 1]])
    codes, minimum, _ = quantization.quantize_matrix(np.zeros((5, 0), np.float32), np.array([0, 2, 5]), 4)
    assert (codes.shape, minimum.shape) == ((5, 0), (2, 0))
    assert quantization.dequantize_matrix(codes, minimum, minimum, np.array([0, 2, 5])).shape == (5, 0)


@pytest.mark.parametrize(("bits", "n"), itertools.product([2, 4, 8], [1, 2, 5, 8]))
def test_packing(bits, n):
    codes = np.random.default_rng(0).integers(0, 2**bits, (n, 3), dtype=np.uint8)
    packed = quantization.pack_codes(codes, bits)
    assert packed.shape == (-(-n * bits // 8), 3)
    for channel in range(3):
        text = "".join(f"{code:0{bits}b}" for code in codes[:, channel]).ljust(8 * len(packed), "0")
        assert [int(text[i : i + 8], 2) for i in range(0, len(text), 8)] == packed[:, channel].tolist()
    np.testing.assert_array_equal(quantization.unpack_codes(packed, bits, n), codes)


def test_matrices_that_do_not_fit(unchecked):
    x, bounds = np.zeros((4, 2), np.float32), np.array([0, 4])
    for wrong in ([0, 3], [1, 4], [0, 2, 2, 4], [0], [0, 4, 2]):
        with pytest.raises(ValueError, match="bounds: expected whole numbers that rise strictly from 0 to 4"):
            quantization.quantize_matrix(x, np.array(wrong), 8)
    with pytest.raises(ValueError, match="bits: expected one of"):
        quantization.quantize_matrix(x, bounds, 5)
    with pytest.raises(ValueError, match="span more than float32 holds"):
        quantization.quantize_matrix(np.float32([[3e38], [-3e38]]), np.array([0, 2]), 8)
    with pytest.raises(ValueError, match="packed: expected 2 rows for 4 codes of 4 bits, got 3"):
        quantization.unpack_codes(np.zeros((3, 2), np.uint8), 4, 4)
    with pytest.raises(ValueError, match=r"minimum, scale: expected shape \(1, 2\)"):
        quantization.dequantize_matrix(np.zeros((4, 2), np.uint8), np.zeros((2, 2)), np.zeros((2, 2)), bounds)


def test_prune():
    scene = random_scene(20, degree=1)
    scores = np.float32([5, 1, 1, 1, 9, 0, 3, 3, 8, 7, 2, 2, 6, 4, 4, 5, 5, 1, 0, 9])
    got, kept = prune(scene, scores, 0.25, 0.3)
    order = sorted(range(20), key=lambda i: (scores[i], i))
    assert kept.tolist() == sorted(order[5:])
    np.testing.assert_array_equal(got.means, scene.means[kept])
    plain = set(order[5:11])
    for row, source in enumerate(kept):
        np.testing.assert_array_equal(got.shN[row], 0 if source in plain else scene.shN[source])
    assert np.any(scene.shN[order[5]])  # the scene given is left alone
    whole, kept = prune(scene, scores, 0, 0)
    assert len(kept) == 20
    np.testing.assert_array_equal(whole.shN, scene.shN)
    assert not np.any(prune(scene, scores, 0.5, 0.5)[0].shN)


def test_prune_by_what_cannot_be(unchecked):
    scene, scores = random_scene(20), np.ones(20)
    for arguments, message in [
        ((scores, 1.0, 0), "prune_rate: expected from 0 to below 1, got 1.0"),
        ((scores, -0.1, 0), "prune_rate"),
        ((scores, float("nan"), 0), "prune_rate"),
        ((scores, 0.5, 0.6), "sh_rate: expected from 0 to 1 - prune_rate = 0.5, got 0.6"),
        ((scores, 0.5, -0.1), "sh_rate"),
        ((scores[1:], 0, 0), r"scores: expected shape \(20,\), got \(19,\)"),
        ((-scores, 0, 0), "scores: expected finite numbers not below 0, got -1.0 at 0"),
        ((scores * np.nan, 0, 0), "scores: expected finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            prune(scene, *arguments)


def _some_plain(degree=3):
    scene = random_scene(37, degree=degree)
    shN = scene.shN.copy()
    shN[::3] = 0
    return scene.replace(shN=shN)


def test_stored_order_and_steps():
    scene = _some_plain()
    compressed = quantize(scene, QuantConfig(segments=2, opacity=8))
    assert (compressed.num_gaussians, compressed.num_sh, compressed.degree) == (37, 24, 3)
    assert compressed.codes["shN"].packed.shape == (12, 45)
    back = dequantize(compressed)
    order = [i for i in range(37) if i % 3] + list(range(0, 37, 3))
    wanted = take(scene, np.array(order))
    np.testing.assert_array_equal(back.means, wanted.means.astype(np.float16).astype(np.float32))
    assert not np.any(back.shN[24:])
    np.testing.assert_allclose(np.linalg.norm(back.quats, axis=1), 1, atol=1e-6)
    unit = wanted.quats / np.linalg.norm(wanted.quats, axis=1, keepdims=True)
    assert np.abs(np.sum(back.quats * unit, axis=1)).min() > 0.9999
    for name, part in (("log_scales", "scale"), ("sh0", "sh0"), ("opacity_logit", "opacity")):
        step = np.repeat(compressed.codes[part].scale, np.diff(compressed.codes[part].bounds), axis=0)
        error = np.abs(getattr(back, name) - getattr(wanted, name)).reshape(37, -1)
        assert (error <= step / 2 + 1e-5).all(), name


@pytest.mark.parametrize("degree", range(4))
def test_sizes_follow_the_law(degree):
    scene = random_scene(4000, degree=degree)
    pruned, _ = prune(scene, np.arange(4000.0), 0.4, 0.5)
    compressed = quantize(pruned, QuantConfig(segments=40))
    report = compressed.size_report()
    higher = 3 * ((degree + 1) ** 2 - 1)
    assert report["codes"] == int(4000 * (16.5 * 0.6 + higher / 2 * 0.1))
    assert report["tables"] == 40 * 8 * (11 + higher)
    assert report["total"] == len(to_bytes(compressed, codec="none"))


def test_bits_of_every_kind():
    scene = _some_plain(degree=1)
    halves = quantize(scene, QuantConfig(16, 16, 16, 16, 16))
    assert halves.size_report()["tables"] == 0
    back = dequantize(halves)
    order = [i for i in range(37) if i % 3] + list(range(0, 37, 3))
    np.testing.assert_array_equal(back.sh0, scene.sh0[order].astype(np.float16))
    errors = []
    for bits in (2, 4, 8, 16):
        coarse = dequantize(quantize(scene, QuantConfig(bits, bits, bits, bits, bits)))
        errors.append(np.abs(coarse.log_scales - scene.log_scales[order]).mean())
        np.testing.assert_allclose(np.linalg.norm(coarse.quats, axis=1), 1, atol=1e-5)
    assert errors == sorted(errors, reverse=True)
    plain = quantize(scene.replace(shN=scene.shN * 0))
    assert plain.num_sh == 0
    np.testing.assert_array_equal(dequantize(plain).shN, np.zeros((37, 3, 3)))


def test_positions_far_away():
    scene = random_scene()
    far = scene.replace(means=scene.means + np.float32([70_000, 0, 0]))
    centred = quantize(far)
    assert centred.positions.dtype == np.float16
    assert np.abs(dequantize(centred).means - far.means).max() < 0.02
    huge = scene.replace(means=scene.means * np.float32(1e6))
    assert (np.abs(dequantize(quantize(huge)).means - huge.means) <= np.ptp(huge.means) / 1024).all()
    fixed = quantize(scene, QuantConfig(position="fixed24"))
    assert fixed.size_report()["codes"] - quantize(scene).size_report()["codes"] == 3 * 40
    extent = np.ptp(scene.means, axis=0)
    assert (np.abs(dequantize(fixed).means - scene.means) <= extent / 2**24 + 1e-6).all()
    assert quantize(scene, QuantConfig(position="auto")).positions.dtype == np.float16
    tiny = scene.replace(log_scales=scene.log_scales - 9)
    assert quantize(tiny, QuantConfig(position="auto")).positions.dtype == np.uint8


def test_morton_order_keeps_neighbours_together():
    scene = random_scene(500)
    order = morton_order(scene.means)
    assert sorted(order) == list(range(500))
    steps = [np.linalg.norm(np.diff(m, axis=0), axis=1).mean() for m in (scene.means, scene.means[order])]
    assert steps[1] < 0.6 * steps[0]
    corners = np.float32(list(itertools.product([0, 1], repeat=3)))[:, ::-1]  # x changes fastest
    assert morton_order(corners).tolist() == list(range(8))
    assert morton_order(np.zeros((3, 3), np.float32)).tolist() == [0, 1, 2]
    level = load_scene(real("playbot_lod6.sog"))
    sizes = [len(to_bytes(quantize(level, QuantConfig(segments=16, order=order)))) for order in ("input", "morton")]
    assert sizes[1] < 1.01 * sizes[0]
    back = dequantize(quantize(level, QuantConfig(order="morton")))
    assert sorted(map(tuple, back.means)) == sorted(map(tuple, level.means.astype(np.float16).astype(np.float32)))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(16, 2, 8, 4, 16, "fixed24", 3, "official", "morton")])
def test_files_keep_every_bit(tmp_path, codec, config):
    compressed = quantize(_some_plain(degree=2), config)
    path = tmp_path / "a.jxg"
    save_compressed(path, compressed, codec=codec)
    read = load_compressed(path)
    for name in ATTRIBUTES:
        np.testing.assert_array_equal(getattr(dequantize(read), name), getattr(dequantize(compressed), name))
    assert (read.config, read.num_sh) == (config, 24)
    assert to_bytes(read, codec=codec) == path.read_bytes()
    assert read.size_report() == compressed.size_report()


def _rewritten(content, change):
    """The file with its header changed and its checksum made right again."""
    magic, version, length, _ = struct.unpack_from("<4sHII", content)
    header = json.loads(content[14 : 14 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<4sHII", magic, version, len(text), zlib.crc32(text)) + text + content[14 + length :]


@pytest.mark.parametrize("codec", CODECS)
def test_damaged_files(codec, unchecked):
    content = to_bytes(quantize(_some_plain(degree=1)), codec=codec)
    for end in (0, 3, 10, 50, len(content) - 1):
        with pytest.raises(SceneFormatError, match=r"damaged|not a file|needs \d+ bytes, the file ends at byte"):
            from_bytes(content[:end], "a.jxg")
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(content), 60):
        broken = bytearray(content)
        broken[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(SceneFormatError):
            from_bytes(bytes(broken), "a.jxg")
    with pytest.raises(SceneFormatError, match="expected the file to end at byte"):
        from_bytes(content + b"more", "a.jxg")
    newer = content[:4] + b"\3\0" + content[6:]
    with pytest.raises(SceneFormatError, match="version 3 is newer than what this library reads"):
        from_bytes(newer, "a.jxg")


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(num_gaussians=10**12),
        lambda h: h.update(num_gaussians=36),
        lambda h: h.update(num_gaussians=-1),
        lambda h: h.update(num_gaussians=3.5),
        lambda h: h.update(num_sh=99),
        lambda h: h.update(degree=9),
        lambda h: h.update(codec="lzma"),
        lambda h: h.update(position="fp8"),
        lambda h: h.update(origin=[1, 2]),
        lambda h: h.update(step=[float("inf")] * 3),
        lambda h: h["config"].update(segments=10**9),
        lambda h: h["config"].update(shN=7),
        lambda h: h["config"].update(other=7),
        lambda h: h.update(streams=[]),
        lambda h: h["streams"].pop(),
        lambda h: h["streams"][0].__setitem__(1, 10**15),
        lambda h: h["streams"][0].__setitem__(1, "x"),
        lambda h: h.pop("config"),
    ],
)
def test_headers_that_lie(change, unchecked):
    content = to_bytes(quantize(_some_plain(degree=1)))
    with pytest.raises(SceneFormatError):
        from_bytes(_rewritten(content, change), "a.jxg")


def test_a_stream_that_unpacks_to_too_much(unchecked):
    compressed = quantize(_some_plain(degree=1))
    content = to_bytes(compressed)
    bomb = zlib.compress(bytes(50_000_000), 9)
    first = json.loads(content[14 : 14 + struct.unpack_from("<I", content, 6)[0]])["streams"][0][1]

    def change(header):
        header["streams"][0][1:] = [len(bomb), zlib.crc32(bomb)]

    swapped = _rewritten(content, change)
    start = 14 + struct.unpack_from("<I", swapped, 6)[0]
    with pytest.raises(SceneFormatError, match=r"stream 'positions' at byte .*: expected 222 bytes, got 223"):
        from_bytes(swapped[:start] + bomb + swapped[start + first :], "a.jxg")


def test_settings_that_cannot_be(tmp_path, unchecked):
    for change, message in [
        ({"shN": 3}, r"shN: expected \(2, 4, 8, 16\) bits, got 3"),
        ({"position": "fp8"}, "position: expected one of"),
        ({"segments": 0}, "segments: expected 'auto' or at least 1"),
        ({"segments": "many"}, "segments"),
        ({"segment_rule": "x"}, "segment_rule"),
        ({"order": "x"}, "order"),
    ]:
        with pytest.raises(ValueError, match=message):
            QuantConfig(**change)
    with pytest.raises(ValueError, match="codec: expected one of"):
        save_compressed(tmp_path / "a.jxg", quantize(random_scene()), codec="lzma")
    assert not list(tmp_path.iterdir())
    assert dataclasses.asdict(QuantConfig()).keys() >= set(CODED)
