"""Whole steps: the entropy coder, cells, ellipsoids in one way of 48, files, and the search over steps."""

import contextlib
import dataclasses
import itertools
import json
import struct
import zlib

import jax
import numpy as np
import pytest

from jaxlab.flexgaussian.cameras import orbit_cameras
from jaxlab.flexgaussian.canonical import canonical, whole_quats
from jaxlab.flexgaussian.compressed import dequantize
from jaxlab.flexgaussian.container import from_bytes, load_compressed, save_compressed, to_bytes
from jaxlab.flexgaussian.importance import blending
from jaxlab.flexgaussian.made_up import striped_ball
from jaxlab.flexgaussian.morton import interleaved, parted
from jaxlab.flexgaussian.octree import decode_cells, encode_cells
from jaxlab.flexgaussian.range_coding import DamagedError, Decoder, Encoder, lanes_for
from jaxlab.flexgaussian.scene import SceneFormatError, take
from jaxlab.flexgaussian.searching import TargetNotMetError
from jaxlab.flexgaussian.step_search import search_steps
from jaxlab.flexgaussian.stepped import CLASSES, StepConfig, quantize_steps
from tests.flexgaussian.scenes import random_scene


@pytest.mark.parametrize("rows", [1, 7, 3000])
def test_numbers_come_back(rows):
    rng = np.random.default_rng(rows)
    numbers = [np.rint(rng.laplace(0, width, rows)).astype(int) for width in (0.2, 3, 60, 1e4)]
    contexts = rng.integers(0, 3, rows)
    encoder = Encoder(lanes_for(rows))
    for values in numbers:
        encoder.whole(values, contexts)
    encoder.symbols(contexts, 3)
    decoder = Decoder(*encoder.finish(), encoder.numbers)
    for values in numbers:
        np.testing.assert_array_equal(decoder.whole(rows, contexts), values)
    np.testing.assert_array_equal(decoder.symbols(rows, 3), contexts)


def test_words_that_are_missing():
    encoder = Encoder(4)
    encoder.whole(np.random.default_rng(0).integers(-9, 9, 300))
    states, words = encoder.finish()
    for decoder in (Decoder(states, words[:-1], encoder.numbers), Decoder(states, words, encoder.numbers[:1])):
        with pytest.raises(DamagedError, match="end too early"):
            decoder.whole(300)


def test_codes_are_as_short_as_their_entropy():
    rows = 50_000
    rng = np.random.default_rng(0)
    values = np.rint(rng.laplace(0, 4, rows)).astype(int)
    encoder = Encoder(lanes_for(rows))
    encoder.whole(values)
    states, words = encoder.finish()
    shares = np.unique(values, return_counts=True)[1] / rows
    entropy = -rows * float(shares @ np.log2(shares)) / 8
    assert entropy < states.nbytes + words.nbytes < 1.1 * entropy


def test_symbols_that_depend_on_the_one_before():
    """A chain that stays where it is costs little, if the one before is told."""
    rng = np.random.default_rng(0)
    chain = np.cumsum(rng.random(20_000) < 0.05) % 2
    sizes = []
    for buckets in (None, np.arange(2)):
        encoder = Encoder(16)
        encoder.symbols(chain, 2, None, buckets)
        states, words = encoder.finish()
        decoder = Decoder(states, words, encoder.numbers)
        np.testing.assert_array_equal(decoder.symbols(len(chain), 2, None, buckets), chain)
        sizes.append(words.nbytes)
    assert sizes[1] < 0.4 * sizes[0]


def test_cells_come_back(unchecked):
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 1 << 9, (400, 3)).astype(np.uint64)
    cells[200:] = cells[rng.integers(0, 200, 200)]
    codes = interleaved(cells)
    np.testing.assert_array_equal(parted(codes), cells)
    assert int(interleaved(np.array([[5, 0, 3]], np.uint64))[0]) == 0b001100101
    encoder = Encoder(4)
    encode_cells(encoder, np.sort(codes), 9)
    parts = *encoder.finish(), encoder.numbers
    np.testing.assert_array_equal(decode_cells(Decoder(*parts), 9, 400), np.sort(codes))
    for wrong in (399, 100):
        with pytest.raises(DamagedError, match="cells"):
            decode_cells(Decoder(*parts), 9, wrong)


def _covariances(log_scales, quats):
    w, x, y, z = (quats / np.linalg.norm(quats, axis=1, keepdims=True)).astype(float).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    axes = np.moveaxis(np.array(rows), -1, 0)
    return np.einsum("nij,nj,nkj->nik", axes, np.exp(2 * log_scales.astype(float)), axes)


def test_one_way_of_48_to_write_an_ellipsoid():
    scene = random_scene(300)
    log_scales, vectors = canonical(scene.log_scales, scene.quats)
    assert (np.diff(log_scales, axis=1) <= 0).all()
    quats = whole_quats(vectors)
    assert quats[:, 0].min() >= 0.5 - 1e-6
    np.testing.assert_allclose(_covariances(log_scales, quats), _covariances(scene.log_scales, scene.quats), atol=1e-5)
    once = random_scene(1)
    ways = set()
    for order in itertools.permutations(range(3)):
        turned = canonical(once.log_scales[:, list(order)], np.float32([[1, 0, 0, 0]]))
        ways.add(tuple(np.round(turned[0][0], 6)))
    assert len(ways) == 1


@pytest.mark.parametrize("degree", [0, 2])
def test_every_number_is_within_half_a_step(degree):
    scene = random_scene(500, degree)
    config = StepConfig(position=1e-3, sh0=0.1, shN=0.1, opacity=0.05)
    importance = np.random.default_rng(0).random(500) ** 4
    stepped = quantize_steps(scene, config, importance)
    assert set(stepped.classes) == set(range(CLASSES))
    contracted = np.arcsinh((scene.means.astype(float) - stepped.center) / stepped.radius)
    grid = np.rint((contracted - stepped.low) / config.position).astype(np.uint64)
    order = np.argsort(interleaved(grid), kind="stable")
    back = dequantize(stepped)
    shaded = np.any(stepped.shN, axis=1)
    order = np.concatenate([order[shaded], order[~shaded]])
    wanted = take(scene, order)
    steps = np.exp2(np.concatenate([stepped.classes[shaded], stepped.classes[~shaded]]))[:, None]
    moved = np.arcsinh((back.means - stepped.center) / stepped.radius) - contracted[order]
    assert np.abs(moved).max() <= 0.5 * config.position + 1e-6
    opacity = [1 / (1 + np.exp(-s.opacity_logit.astype(float)))[:, None] for s in (back, wanted)]
    assert (np.abs(opacity[0] - opacity[1]) <= 0.5 * config.opacity * np.sqrt(steps) + 2e-3).all()
    assert (np.linalg.norm(back.sh0 - wanted.sh0, axis=1) <= 3**0.5 / 2 * config.sh0 * steps[:, 0] + 1e-5).all()
    assert (np.abs(np.sort(back.log_scales)[:, ::-1] - canonical(wanted.log_scales, wanted.quats)[0]) <= 0.12).all()
    if degree:
        error = np.linalg.norm((back.shN - wanted.shN).reshape(500, -1), axis=1)
        assert (error <= 0.67 * config.shN * steps[:, 0] * 24**0.5).all()


def test_files_keep_every_code(tmp_path):
    for scene in (random_scene(300, 3), random_scene(1, 0), striped_ball(5000)):
        stepped = quantize_steps(scene, None, np.ones(scene.num_gaussians))
        path = tmp_path / "a.jxg"
        save_compressed(path, stepped)
        read = load_compressed(path)
        jax.tree.map(np.testing.assert_array_equal, dequantize(read), dequantize(stepped))
        assert to_bytes(read) == path.read_bytes()
        assert (read.num_gaussians, read.num_sh, read.config) == (scene.num_gaussians, stepped.num_sh, stepped.config)


def test_steps_make_smaller_files_where_they_are_longer():
    scene = striped_ball(3000)
    sizes = [len(to_bytes(quantize_steps(scene, StepConfig().times(factor)))) for factor in (1, 2, 4)]
    assert sizes == sorted(sizes, reverse=True)
    some = len(to_bytes(quantize_steps(scene, None, np.where(np.arange(3000) < 1500, 1.0, 0.01))))
    assert some < 0.9 * sizes[0]


def _rewritten(content, change):
    """The file with its header changed and its checksum made right again."""
    magic, version, length, _ = struct.unpack_from("<4sHII", content)
    header = json.loads(content[14 : 14 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<4sHII", magic, version, len(text), zlib.crc32(text)) + text + content[14 + length :]


def test_damaged_files(unchecked):
    content = to_bytes(quantize_steps(random_scene(60, 1)))
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(content), 40):
        broken = bytearray(content)
        broken[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(SceneFormatError):
            from_bytes(bytes(broken), "a.jxg")
    for end in (20, len(content) - 1):
        with pytest.raises(SceneFormatError, match=r"damaged|the file ends at byte"):
            from_bytes(content[:end], "a.jxg")
    for change in (
        lambda h: h.update(num_gaussians=10**12),
        lambda h: h.update(num_gaussians=59),
        lambda h: h.update(degree=2),
        lambda h: h.update(bits=21),
        lambda h: h.update(bits=3),
        lambda h: h.update(lanes=8),
        lambda h: h.update(center=[1.0]),
        lambda h: h.update(radius=float("nan")),
        lambda h: h["config"].update(scale=0),
        lambda h: h["config"].update(other=1),
        lambda h: h["streams"].pop(),
        lambda h: h["streams"][2].__setitem__(1, -5),
        lambda h: h.pop("low"),
    ):
        with pytest.raises(SceneFormatError):
            from_bytes(_rewritten(content, change), "a.jxg")


def test_crafted_words(unchecked):
    """Words that no encoder wrote, with right checksums, give an error or a scene, and nothing else."""
    content = to_bytes(quantize_steps(random_scene(60, 1)))
    length = struct.unpack_from("<I", content, 6)[0]
    entries = json.loads(content[14 : 14 + length])["streams"]
    start = 14 + length + entries[0][1] + entries[1][1]
    rng = np.random.default_rng(0)
    for _ in range(20):
        words = rng.bytes(entries[2][1])
        checksum = zlib.crc32(words)
        crafted = content[:start] + words + content[start + len(words) :]
        with contextlib.suppress(SceneFormatError):
            from_bytes(_rewritten(crafted, lambda h, c=checksum: h["streams"][2].__setitem__(2, c)), "a.jxg")


def test_search_over_steps():
    scene = striped_ball(400)
    cameras = orbit_cameras(scene, 2, 48, 32)
    scores = blending(scene, cameras)
    found = search_steps(scene, cameras, min_psnr=30.0, scores=scores)
    assert found.status == "ok"
    assert found.psnr >= 30
    assert found.bytes == len(to_bytes(found.compressed)) == min(e.bytes for e in found.trace if e.passed)
    assert found.ratio == pytest.approx(400 * 4 * 26 / found.bytes)
    harder = search_steps(scene, cameras, min_psnr=45.0, scores=scores, prune_rates=(0.0,))
    assert harder.bytes > found.bytes
    never = {"min_psnr": 90.0, "prune_rates": (0.5,), "scores": scores}
    assert search_steps(scene, cameras, **never).status == "target_not_met"
    with pytest.raises(TargetNotMetError, match=r"expected at least 90\.00 dB"):
        search_steps(scene, cameras, strict=True, **never)


def test_settings_that_cannot_be(unchecked):
    scene = random_scene(20)
    for call, message in [
        (lambda: StepConfig(scale=0), "scale: expected more than 0, got 0"),
        (lambda: StepConfig(spread=-1), "spread"),
        (lambda: quantize_steps(scene, StepConfig(position=1e-9)), "position: a step of 1e-09 needs"),
        (lambda: quantize_steps(scene, StepConfig(sh0=1e-12)), "too short"),
        (lambda: quantize_steps(scene, None, np.ones(3)), "importance: expected"),
        (lambda: quantize_steps(scene, None, np.full(20, np.nan)), "importance: expected"),
        (lambda: search_steps(scene, orbit_cameras(scene, 1, 16, 16), prune_rates=()), "prune_rates"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert dataclasses.asdict(StepConfig(spread=0).times(2))["scale"] == 2 * StepConfig().scale
