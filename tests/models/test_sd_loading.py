import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import sd_parity
from jaxlab.models.sd import UNetConfig, load_controlnet, load_unet, load_vae
from tests.models.checkpoints import FOLDER

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=["sd-unet-pixels", "sd-vae"])
def folder(request, tmp_path_factory):
    made = sd_parity.golden(FOLDER / f"{request.param}.npz")
    return sd_parity.folder_of(tmp_path_factory.mktemp("sd") / request.param, made)


@pytest.fixture(scope="module")
def loaded(folder):
    return loader(folder)(folder)


def loader(folder):
    return load_vae if folder.name == "sd-vae" else load_unet


def changed(folder, to, change):
    """A copy of the folder with weights that `change` edited."""
    shutil.copytree(folder, to)
    weights = load_file(to / WEIGHTS)
    change(weights)
    save_file(weights, str(to / WEIGHTS))
    return to


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_layouts(folder, loaded):
    _, params = loaded
    stored = load_file(folder / WEIGHTS)
    if folder.name == "sd-vae":
        block, prefix = params["encoder"]["mid_block"], "encoder.mid_block"
        attention, names = block["attentions_0"]["attention"], f"{prefix}.attentions.0"
        conv, name = block["resnets_1"]["conv2"], f"{prefix}.resnets.1.conv2"
    else:
        transformer = params["down_blocks_1"]["attentions_0"]
        names = "down_blocks.1.attentions.0.transformer_blocks.1.attn2"
        attention = transformer["transformer_blocks_1"]["attn2"]
        conv, name = params["up_blocks_0"]["upsamplers_0"]["conv"], "up_blocks.0.upsamplers.0.conv"
        np.testing.assert_array_equal(
            transformer["proj_in"]["kernel"], stored["down_blocks.1.attentions.0.proj_in.weight"].T
        )
    np.testing.assert_array_equal(conv["kernel"], stored[f"{name}.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(conv["bias"], stored[f"{name}.bias"])
    for layer, theirs in (("to_q", "to_q"), ("to_out", "to_out.0")):
        kernel = stored[f"{names}.{theirs}.weight"].T
        np.testing.assert_array_equal(attention[layer]["kernel"].reshape(kernel.shape), kernel)


@pytest.mark.latest
def test_half_files_and_other_dtypes(folder, loaded, tmp_path):
    def halve(weights):
        weights |= {name: value.astype(np.float16) for name, value in weights.items()}

    half = changed(folder, tmp_path / folder.name, halve)
    module, params = loader(folder)(half)
    assert module.dtype == "float32"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    equal(params, jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), loaded[1]))
    module, kept = loader(folder)(half, dtype="bfloat16", param_dtype="float16")
    assert module.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("float16")}


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_old_names_of_an_autoencoders_attention(folder, loaded, tmp_path, as_convolutions):
    if folder.name != "sd-vae":
        pytest.skip("autoencoders only")

    def age(weights):
        old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
        for name in [name for name in weights if ".attentions." in name]:
            value, renamed = weights.pop(name), name
            for new, before in old.items():
                renamed = renamed.replace(new, before)
            if as_convolutions and value.ndim == 2:
                value = value[:, :, None, None]
            weights[renamed] = value

    equal(load_vae(changed(folder, tmp_path / "old", age))[1], loaded[1])


def test_weights_that_do_not_fit_are_named(folder, tmp_path):
    load = loader(folder)

    def missing(weights):
        for name in sorted(weights)[:12]:
            weights[f"more.{name}"] = weights.pop(name)

    first = sorted(load_file(folder / WEIGHTS))[:12]
    with pytest.raises(KeyError) as error:
        load(changed(folder, tmp_path / "missing", missing))
    told = str(error.value)
    assert all(f"'{name}'" in told and f"'more.{name}'" in told for name in first[:10])
    assert told.count("and 2 more") == 2
    assert f"'{first[11]}'" not in told

    def flat(weights):
        weights |= {name: weights[name].reshape(-1, 1) for name in first}

    with pytest.raises(ValueError, match=r"wrong shapes: .*; and 2 more") as error:
        load(changed(folder, tmp_path / "flat", flat))
    assert f"{first[0]} expected" in str(error.value)
    assert first[11] not in str(error.value)

    (tmp_path / "absent").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path / "absent")
    shutil.copy(folder / "config.json", tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        load(tmp_path / "absent")


def test_dtypes_that_are_none(folder):
    for dtypes, name in (({"dtype": "int8"}, "dtype"), ({"param_dtype": "float33"}, "param_dtype")):
        with pytest.raises(ValueError, match=f"^{name}: expected a floating dtype"):
            loader(folder)(folder, **dtypes)


def test_folder_of_another_network(folder):
    if folder.name == "sd-vae":
        with pytest.raises(ValueError, match="_class_name: expected 'ControlNetModel', got 'AutoencoderKL'"):
            load_controlnet(folder)
    else:
        with pytest.raises(ValueError, match="_class_name: expected 'AutoencoderKL', got 'UNet2DConditionModel'"):
            load_vae(folder)


def test_configuration_is_read_from_a_path_and_must_be_json(folder, loaded, tmp_path):
    if folder.name == "sd-vae":
        pytest.skip("one is enough")
    content = json.loads((folder / "config.json").read_text())
    config = UNetConfig.from_dict(content)
    assert config == UNetConfig.from_dict(folder / "config.json") == loaded[0].config
    assert (config.heads, config.layers, config.depths) == ((1, 3, 2), (1, 1, 1), (1, 2, 1))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        UNetConfig.from_dict(tmp_path)
