import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import perception_parity as parity
from jaxlab.models.clip import load_clip, preprocess_image
from jaxlab.models.vit import load_vit
from tests.models.checkpoints import tower_golden


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return parity.folder_of(tmp_path_factory.mktemp("clip"), tower_golden("clip"))


@pytest.mark.latest
def test_vectors_equal_torch(folder):
    ours, theirs = parity.our_clip(folder), tower_golden("clip")
    assert max(parity.difference(ours, theirs).values()) <= parity.BOUND
    assert set(ours) == {"images", "texts", "cosines"}


def test_the_end_of_old_files_is_the_highest_id(folder):
    model, params = load_clip(folder)
    old = dataclasses.replace(model, end=2)
    ids = np.where(parity.clip_ids() == 3, 2, parity.clip_ids())  # an id that such a file calls the end

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(params, ids):
        return [each.apply({"params": params}, ids, method="encode_texts") for each in (model, old)]

    np.testing.assert_array_equal(*run(params, ids))


def test_files(folder, tmp_path):
    jax.tree.map(np.testing.assert_array_equal, load_vit(folder)[1], load_clip(folder)[1]["vision_model"])
    weights = load_file(folder / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = np.arange(9)[None]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors")
    assert load_clip(tmp_path)[0] == load_clip(folder)[0]
    weights["surprise"] = weights.pop("visual_projection.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(KeyError, match=r"visual_projection\.weight.*surprise"):
        load_clip(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    with pytest.raises(ValueError, match="expected 'clip', got 'siglip'"):
        load_clip(tmp_path)


def test_preprocessing():
    pytest.importorskip("PIL")
    image = np.zeros((40, 30, 3), np.uint8)
    image[20:] = 255
    pixels = preprocess_image(image, size=30)
    assert pixels.shape == (30, 30, 3)
    # The middle 30 rows of 40, of which the first 15 are black.
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    np.testing.assert_allclose(pixels[:15], np.broadcast_to(-mean / std, (15, 30, 3)), rtol=1e-5)
    np.testing.assert_allclose(pixels[15:], np.broadcast_to((1 - mean) / std, (15, 30, 3)), rtol=1e-5)
    assert preprocess_image(image, size=15).shape == (15, 15, 3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_other_images(image):
    with pytest.raises(ValueError, match=r"image: expected uint8 \[H, W, 3\], got"):
        preprocess_image(image)
