import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import vlm_parity
from jaxlab.models import load_pretrained
from jaxlab.models.decoder import KVCache
from jaxlab.models.qwen2_5_vl import (
    Config,
    Qwen25VL,
    VisionConfig,
    image_layout,
    init_params,
    load,
    mrope_index,
    preprocess_image,
    save,
    smart_resize,
)
from tests.models.checkpoints import vlm_golden


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return vlm_parity.folder_of(tmp_path_factory.mktemp("vlm") / "in", vlm_golden())


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.mark.latest
def test_positions_logits_and_continuation_equal_torch(tmp_path):
    found = vlm_parity.differences(vlm_golden(), tmp_path / "in")
    assert found.pop("logits") <= vlm_parity.BOUND
    assert set(found.values()) == {0.0}


def test_both_names_of_weights_load_alike_and_come_back(folder, loaded, tmp_path):
    model, params = load_pretrained(folder)
    assert isinstance(model, Qwen25VL)
    save(tmp_path / "out", model, params)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)

    def nested(name):
        if name.startswith("visual."):
            return f"model.{name}"
        return name.replace("model.", "model.language_model.", 1)

    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "config.json").write_text((folder / "config.json").read_text())
    save_file({nested(name): value for name, value in before.items()}, tmp_path / "nested" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "nested")[1], loaded[1])
    assert load(tmp_path / "nested", dtype=jnp.bfloat16)[1]["language"]["embed"]["embedding"].dtype == jnp.bfloat16


def test_missing_and_unexpected_weights_are_named(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights["visual.surprise"] = weights.pop("visual.merger.mlp.2.bias")
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(KeyError, match=r"visual\.merger\.mlp\.2\.bias.*visual\.surprise"):
        load(tmp_path)


def test_configurations_of_both_spellings():
    hf = vlm_golden()["config"]
    config = Config.from_hf(hf)
    assert config.text.rope.mrope_section == (4, 2, 2)
    assert Config.from_hf(config.to_hf()) == config
    text = dict(hf["text_config"])
    rope = text.pop("rope_parameters")
    old = {name: value for name, value in hf.items() if name != "text_config"} | text | {
        "model_type": "qwen2_5_vl",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }  # fmt: skip
    assert Config.from_hf(old) == config
    published = Config.from_hf({
        "model_type": "qwen2_5_vl", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128000, "rope_theta": 1e6, "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"depth": 32, "hidden_size": 1280, "num_heads": 16, "out_hidden_size": 2048},
    })  # fmt: skip
    assert published.vision == VisionConfig()
    assert published.text.tie_word_embeddings
    with pytest.raises(ValueError, match="expected 'qwen2_5_vl', got 'qwen2_vl'"):
        Config.from_hf(hf | {"model_type": "qwen2_vl"})
    with pytest.raises(ValueError, match=r"sum to head_dim / 2 = 8"):
        Config.from_hf(hf | {"text_config": text | {"rope_parameters": rope | {"mrope_section": [4, 2, 3]}}})
    with pytest.raises(ValueError, match="out_hidden_size must be hidden_size=32, got 33"):
        Config.from_hf(hf | {"vision_config": hf["vision_config"] | {"out_hidden_size": 33}})
    with pytest.raises(NotImplementedError, match="hidden_act='gelu'"):
        Config.from_hf(hf | {"vision_config": hf["vision_config"] | {"hidden_act": "gelu"}})
    with pytest.raises(ValueError, match="multiple of 4"):
        VisionConfig(hidden_size=24, num_heads=4)
    with pytest.raises(ValueError, match=r"vision\.depth"):
        VisionConfig(depth=0)
    with pytest.raises(ValueError, match="window_size"):
        VisionConfig(window_size=27)


def test_windows_tile_the_image_and_order_is_inverted():
    layout = image_layout(np.array([[1, 12, 10], [2, 2, 4]]), VisionConfig())
    np.testing.assert_array_equal(layout.order[layout.inverse], np.arange(34))
    # 6 x 5 merged tokens: windows of 4 and 2 rows by 4 and 1 columns; then two frames of 1 x 2.
    np.testing.assert_array_equal(np.diff(layout.windows), 4 * np.array([16, 4, 8, 2, 2, 2]))
    np.testing.assert_array_equal(np.diff(layout.images), [120, 8, 8])
    assert (layout.longest_window, layout.longest_image) == (64, 120)
    # The second window holds column 4 of rows 0..3: patches 8, 9 of rows 0..7, a group of four after the other.
    np.testing.assert_array_equal(layout.order[16:20], [4, 9, 14, 19])
    np.testing.assert_array_equal(layout.places[:, 64:68], [[0, 0, 1, 1], [8, 9, 8, 9]])


def test_positions_by_hand():
    config = Config.from_hf(vlm_golden()["config"])
    image, grid = vlm_parity.IMAGE, np.array([[1, 4, 6]])
    ids = np.array([[0, 7, 8, *[image] * 6, 9]])
    positions, delta = mrope_index(ids, grid, np.array([[0] + [1] * 9]), config=config)
    expected = [[0, 1, 2, 2, 2, 2, 2, 2, 5], [0, 1, 2, 2, 2, 3, 3, 3, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]]
    np.testing.assert_array_equal(positions[:, 0, 1:], expected)
    assert delta.tolist() == [[-4]]
    traced = jax.jit(lambda ids: mrope_index(ids, grid, config=config))(ids[:, 1:])
    np.testing.assert_array_equal(traced[0][:, 0], expected)
    assert traced[1].tolist() == [[-3]]
    text, delta = mrope_index(np.array([[3, 4, 5]]), config=config)
    np.testing.assert_array_equal(text, np.broadcast_to([0, 1, 2], (3, 1, 3)))
    assert delta.tolist() == [[0]]
    assert text.dtype == delta.dtype == np.int32


def test_a_cache_in_pieces_gives_the_logits_of_one_pass(loaded):
    model, params = loaded
    given = vlm_parity.inputs()
    ids, mask = given["input_ids"], given["attention_mask"]
    grid = vlm_parity.GRID[:1]
    pixels = given["pixel_values"][:96]
    row = ids[:1, mask[0] != 0]
    first, second = row[:, :29], row[:, 29:31]  # the image ends at 28

    @jax.jit
    def run(params):
        cache = KVCache.create(model.config.text, 1, 64)
        whole, none = model.apply({"params": params}, jnp.concatenate([first, second], 1), None, pixels, grid)
        _, cache = model.apply({"params": params}, first, None, pixels, grid, None, cache)
        later, cache = model.apply({"params": params}, second, cache=cache)
        assert none is None
        return whole[:, -2:], later, cache.lengths, cache.next_position

    whole, later, lengths, following = run(params)
    np.testing.assert_allclose(later, whole, atol=1e-5)
    assert lengths.tolist() == [31]
    assert following.tolist() == [4 + 6 + 3]


def test_smart_resize():
    assert smart_resize(280, 420) == (280, 420)
    assert smart_resize(42, 70, min_pixels=1) == (56, 56)  # 1.5 and 2.5 round to even
    assert smart_resize(10, 20) == (56, 84)
    assert smart_resize(13, 1000) == (28, 504)  # the height rounds to 0, so the area is scaled up
    height, width = smart_resize(4000, 3000)
    assert height * width <= 1003520
    assert height % 28 == width % 28 == 0
    for h, w in ((0, 10), (10, 0), (1, 201)):
        with pytest.raises(ValueError, match=f"got {h} x {w}"):
            smart_resize(h, w)


def test_preprocess_image():
    pillow = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 90, 3)).astype(np.uint8)
    pixels, grid = preprocess_image(image)
    assert grid.tolist() == [[1, 4, 6]]
    assert pixels.shape == (24, 1176)
    assert pixels.dtype == np.float32
    scaled = np.asarray(pillow.fromarray(image).resize((84, 56), pillow.Resampling.BICUBIC)).astype(np.float64) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    scaled = (scaled - mean) / std
    for row, (top, left) in enumerate((t * 2 + y, s * 2 + x) for t in range(2) for s in range(3)
                                      for y in range(2) for x in range(2)):  # fmt: skip
        patch = scaled[14 * top : 14 * top + 14, 14 * left : 14 * left + 14]
        expected = np.stack([patch, patch]).transpose(3, 0, 1, 2).ravel()  # channel, frame, y, x
        np.testing.assert_allclose(pixels[row], expected, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("error", "said", "changes"),
    [
        (ValueError, "each of the 15 tokens of the images, got 45", {"image_grid_thw": vlm_parity.GRID[2:],
                                                                   "pixel_values": np.zeros((60, 1176), np.float32)}),
        (ValueError, "each of the 0 tokens of the images, got 45",
         {"image_grid_thw": None, "pixel_values": None}),
        (ValueError, "pixel_values: expected beside", {"pixel_values": None}),
        (ValueError, "image_grid_thw: expected beside", {"image_grid_thw": None}),
        (ValueError, r"expected shape \(180, 1176\).*got \(3, 1176\)", {"pixel_values": np.zeros((3, 1176))}),
        (ValueError, "divisible by 2", {"image_grid_thw": np.array([[1, 3, 4]])}),
        (ValueError, "positive", {"image_grid_thw": np.array([[0, 2, 2]])}),
        (TypeError, "expected integers", {"image_grid_thw": np.ones((1, 3))}),
        (ValueError, "attention_mask", {"attention_mask": np.ones((2, 3))}),
        (ValueError, "position_ids", {"position_ids": np.ones((2, 3, 4))}),
    ],
)  # fmt: skip
def test_bad_calls(loaded, error, said, changes):
    model, params = loaded
    with pytest.raises(error, match=said):
        model.apply({"params": params}, **(vlm_parity.inputs() | changes))


@pytest.mark.usefixtures("unchecked")
def test_a_traced_grid_is_refused(loaded):
    model, params = loaded
    given = vlm_parity.inputs()
    with pytest.raises(TypeError, match="static under jit"):
        jax.jit(lambda grid: model.apply({"params": params}, **(given | {"image_grid_thw": grid})))(vlm_parity.GRID)
    with pytest.raises(ValueError, match="expected uint8"):
        preprocess_image(np.zeros((4, 4), np.uint8))


def test_fresh_parameters_have_the_shapes_of_loaded_ones(loaded):
    model, params = loaded
    fresh = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, fresh) == jax.tree.map(lambda leaf: leaf.shape, params)


def test_every_parameter_of_the_encoder_takes_a_gradient(loaded):
    model, params = loaded
    model = Qwen25VL(dataclasses.replace(model.config, text=dataclasses.replace(model.config.text, remat="block")))
    pixels, grid = vlm_parity.inputs()["pixel_values"][:24], np.array([[1, 4, 6]])

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def norms(params):
        def loss(params):
            return jnp.sum(model.apply({"params": params}, pixels, grid, method="encode_images") ** 2)

        return jax.tree.map(jnp.linalg.norm, jax.grad(loss)(params)["visual"])

    assert all(math.isfinite(norm) and norm > 0 for norm in map(float, jax.tree.leaves(norms(params))))
