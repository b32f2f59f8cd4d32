"""CLIP's text encoder against torch transformers, from committed goldens (`benchmarks/clip_parity.py`)."""

import json

import jax
import numpy as np
import pytest

from benchmarks import clip_parity
from jaxlab.models.sd import CLIPTextConfig, CLIPTextEncoder, load_text_encoder
from tests.models.checkpoints import FOLDER


def golden(name):
    """What `clip_parity.torch_pass` gave, its weights in float16."""
    with np.load(FOLDER / f"{name}.npz") as file:
        weights = {key.removeprefix("weights/"): file[key] for key in file.files if key.startswith("weights/")}
        return {"config": json.loads(str(file["config"])), "states": file["states"], "weights": weights}


@pytest.mark.latest
@pytest.mark.parametrize("name", clip_parity.NAMES)
def test_states_equal_torch(name, tmp_path):
    assert clip_parity.difference(golden(name), tmp_path) <= clip_parity.BOUND


def test_names_of_old_files_load_alike(tmp_path):
    made = golden("clip-text")
    _, params = load_text_encoder(clip_parity.folder_of(tmp_path / "new", made))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    old = {f"text_model.{name}": value.astype(np.float32) for name, value in made["weights"].items()}
    old["text_model.embeddings.position_ids"] = np.arange(77)[None]
    old["text_projection.weight"] = np.zeros((8, 24), np.float32)
    module, same = load_text_encoder(clip_parity.folder_of(tmp_path / "old", made | {"weights": old}), dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert module == CLIPTextEncoder(CLIPTextConfig.from_dict(made["config"]), "bfloat16")
    states = jax.eval_shape(module.apply, {"params": same}, jax.ShapeDtypeStruct((2, 77), np.int32))
    assert (states.shape, states.dtype) == ((2, 77, 24), np.dtype("bfloat16"))


def test_a_token_sees_only_those_before_it(tmp_path):
    made = golden("clip-text")
    module, params = load_text_encoder(clip_parity.folder_of(tmp_path, made))
    ids = clip_parity.inputs()
    ids[0, 3:] = 7
    states = np.asarray(module.apply({"params": params}, ids))
    np.testing.assert_allclose(states[0, :3], made["states"][0, :3], rtol=0, atol=clip_parity.BOUND)
    assert np.abs(states[0, 3:] - made["states"][0, 3:]).max() > 0.1


def test_the_published_size():
    shapes = jax.eval_shape(
        CLIPTextEncoder(CLIPTextConfig()).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 77), np.int32)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 123_060_480


def test_bad_folders(unchecked, tmp_path):
    made = golden("clip-text")

    def load(**changes):
        return load_text_encoder(clip_parity.folder_of(tmp_path, made | changes))

    weights = dict(made["weights"])
    weights["surprise"] = weights.pop("final_layer_norm.bias")
    with pytest.raises(KeyError, match=r"final_layer_norm\.bias.*surprise"):
        load(weights=weights)
    with pytest.raises(ValueError, match=r"fc1\.bias expected \(41,\), got \(40,\)"):
        load(config=made["config"] | {"intermediate_size": 41})
    with pytest.raises(ValueError, match="swish"):
        load(config=made["config"] | {"hidden_act": "swish"})
    with pytest.raises(ValueError, match=r"num_attention_heads.*got 5"):
        load(config=made["config"] | {"num_attention_heads": 5})
    with pytest.raises(ValueError, match="llama"):
        load(config=made["config"] | {"model_type": "llama"})
    module, params = load()
    with pytest.raises(ValueError, match="at most 77 tokens, got 78"):
        module.apply({"params": params}, np.zeros((1, 78), np.int32))
    with pytest.raises(ValueError, match=r"ids: expected integers of shape \[B,S\], got int32 \(77,\)"):
        module.apply({"params": params}, np.zeros(77, np.int32))
    with pytest.raises(ValueError, match=r"ids: expected integers .* got float32"):
        module.apply({"params": params}, np.zeros((1, 77), np.float32))
    with pytest.raises(ValueError, match=r"dtype: expected a floating dtype .* got 'int8'"):
        load_text_encoder(tmp_path, dtype="int8")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_text_encoder(tmp_path)
    assert CLIPTextConfig.from_dict({"model_type": "clip", "text_config": made["config"]}).hidden_size == 24
