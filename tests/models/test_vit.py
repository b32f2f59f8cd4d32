import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import perception_parity as parity
from jaxlab.models.vit import VisionTransformer, ViTConfig, load_vit
from tests.models.checkpoints import tower_golden


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return parity.folder_of(tmp_path_factory.mktemp("vit"), tower_golden("vit"))


@pytest.mark.latest
def test_tokens_and_keys_equal_torch(folder):
    found = parity.difference(parity.our_vit(folder), tower_golden("vit"))
    assert set(found) == {"tokens", "keys"}
    assert max(found.values()) <= parity.BOUND


def test_heads_and_prefixes_of_files(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    assert any(name.startswith("pooler.") for name in weights)
    saved = {f"vit.{name}": value for name, value in weights.items() if not name.startswith("pooler.")}
    save_file(saved | {"classifier.weight": np.zeros((2, 24), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, load_vit(tmp_path)[1], load_vit(folder)[1])


def test_files_that_do_not_fit(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    weights["surprise"] = weights.pop("layernorm.bias")
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KeyError, match=r"layernorm\.bias.*surprise"):
        load_vit(tmp_path)
    weights["layernorm.bias"] = weights.pop("surprise")
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_size": 64}))
    with pytest.raises(ValueError, match=r"position_embeddings expected \(1, 65, 24\), got \(1, 17, 24\)"):
        load_vit(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_vit(tmp_path / "absent")


def test_configurations():
    config = tower_golden("vit")["config"]
    assert ViTConfig().tokens == 785
    assert ViTConfig.from_hf(config).layer_norm_eps == 1e-12
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
              "patch_size": 14}  # fmt: skip
    large = ViTConfig.from_hf({"model_type": "clip", "vision_config": vision})
    assert (large.hidden_act, large.layer_norm_eps, large.tokens, large.clip) == ("quick_gelu", 1e-5, 257, True)
    for changes, said in (
        ({"model_type": "dinov2"}, "model_type: expected one of vit, clip, clip_vision_model, got 'dinov2'"),
        ({"hidden_act": "swish"}, "hidden_act: expected one of gelu, quick_gelu, got 'swish'"),
        ({"num_channels": 1}, "num_channels: expected 3, got 1"),
        ({"image_size": 30}, "image_size: expected a multiple of patch_size=8, got 30"),
        ({"num_attention_heads": 5}, "hidden_size: expected a multiple of num_attention_heads=5, got 24"),
    ):
        with pytest.raises(ValueError, match=said):
            ViTConfig.from_hf(config | changes)
    with pytest.raises(KeyError, match="patch_size"):
        ViTConfig.from_hf(
            {name: value for name, value in tower_golden("vit")["config"].items() if name != "patch_size"}
        )


@pytest.mark.usefixtures("unchecked")
def test_parameters_of_the_published_models_and_another_size():
    """86M of DINO ViT-B/8, 303M of CLIP's ViT-L/14, as published."""
    dino = ViTConfig()
    clip = ViTConfig(1024, 24, 16, 4096, 224, 14, "quick_gelu", 1e-5, clip=True)
    for config, number in ((dino, 85_807_872), (clip, 303_179_776)):
        pixels = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        made = jax.eval_shape(VisionTransformer(config).init, jax.random.key(0), pixels)
        assert sum(leaf.size for leaf in jax.tree.leaves(made)) == number
    with pytest.raises(ValueError, match=r"pixels: expected shape \[B, 224, 224, 3\], got \(1, 224, 216, 3\)"):
        VisionTransformer(dataclasses.replace(dino)).init(jax.random.key(0), np.zeros((1, 224, 216, 3), np.float32))
