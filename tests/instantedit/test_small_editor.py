import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.instantedit import emoji as task
from jaxlab.instantedit.emoji import Emoji
from jaxlab.instantedit.small_editor import (
    Sizes,
    SmallEditor,
    SmallEditorConfig,
    caption_tokenizer,
    edges_of,
    load_editor,
    quiet,
    to_images,
    to_latents,
)
from jaxlab.instantedit.train_perflow import StageConfig

SIZES = Sizes(channels=(8,), heads=2, groups=4, text_width=8, text_layers=1, hint_channels=4)


@pytest.fixture(scope="module")
def emoji():
    """The packaged pairs as all there is."""
    pairs, sources, targets = task.packaged_pairs()
    pictures = {pair.source: image for pair, image in zip(pairs, sources)}
    pictures |= {pair.target: image for pair, image in zip(pairs, targets)}
    captions = tuple(sorted(pictures))
    return Emoji(captions, np.stack([pictures[caption] for caption in captions]), tuple(range(20)), pairs)


def small(folder, emoji, steps=2):
    stage = StageConfig(steps=steps, batch_size=2)
    config = SmallEditorConfig(sizes=SIZES, teacher=stage, student=stage, controlnet=stage, solver_steps=1)
    editor = SmallEditor(dataclasses.replace(config, shares={"people": 0.5, "colour": 0.3, "rest": 0.2}), folder)
    editor.__dict__["emoji"] = emoji
    return editor


def test_stages_follow_one_another(tmp_path, emoji):
    editor = small(tmp_path, emoji)
    teacher, student, controlnet = (editor.stage(name) for name in ("teacher", "student", "controlnet"))
    assert set(teacher) == {"unet", "text_encoder"}
    assert set(student) == {"unet"}
    assert set(controlnet) == {"controlnet"}
    assert [row["step"] for row in editor.history("student")] == [1, 2]
    copied, own = teacher["unet"]["conv_in"]["kernel"], controlnet["controlnet"]["conv_in"]["kernel"]
    np.testing.assert_allclose(own, copied, atol=5e-3)  # it began as the teacher's encoder
    assert (np.asarray(own) != np.asarray(copied)).any()

    editor.save(tmp_path / "saved", dtype="float32")
    log = json.loads((tmp_path / "saved" / "training.json").read_text())
    assert log["config"]["sizes"]["channels"] == [8]
    assert [row["step"] for row in log["teacher"]] == [2]
    pipeline = load_editor(tmp_path / "saved")
    for name, params in {"unet": student["unet"], **controlnet, "text_encoder": teacher["text_encoder"]}.items():
        jax.tree.map(np.testing.assert_array_equal, dict(pipeline.network.params[name]), params)
    assert pipeline.tokenizer.ids("Red HEART") == editor.tokenizer.ids("red heart")
    np.testing.assert_array_equal(
        pipeline.tokenizer.padded(pipeline.tokenizer.ids("red heart")), editor.ids(["red heart"])[0]
    )
    states = pipeline.network.states(editor.ids(["", "red heart"]))
    assert states.shape == (2, 77, 8)

    editor.save(tmp_path / "half")
    half = load_editor(tmp_path / "half", controlnet=False).network
    assert half.controlnet is None
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), dict(half.params["unet"]), student["unet"])


def test_unknown_stage(tmp_path, emoji):
    with pytest.raises(ValueError, match="got 'pupil'"):
        small(tmp_path, emoji).stage("pupil")


def test_a_quiet_network_predicts_nothing():
    params = {"conv_in": {"kernel": jnp.ones(3)}, "resnets_0": {"conv2": {"kernel": jnp.ones(3), "bias": jnp.ones(1)}}}
    made = quiet(params | {"conv_out": {"bias": jnp.ones(2)}})
    assert float(made["conv_in"]["kernel"].sum()) == 3
    assert not any(float(leaf.sum()) for leaf in jax.tree.leaves((made["resnets_0"], made["conv_out"])))


def test_tokenizer_of_captions():
    tokenizer = caption_tokenizer(["man cook: medium-light skin tone", "Mrs. Claus"])
    ids = tokenizer.ids("Man COOK")
    assert ids[0] == tokenizer.begin
    assert ids[-1] == tokenizer.end == tokenizer.pad
    assert len(ids) == 4
    assert tokenizer.words("medium-light") == tokenizer.ids("cook medium-light")[2:3]
    assert tokenizer.words("dragon") == [tokenizer.tokenizer.backend.token_to_id("<unk>")]
    assert tokenizer.padded(ids).tolist() == [*ids, *[tokenizer.end] * 73]


def test_pixels_come_back():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    np.testing.assert_array_equal(to_images(to_latents(pixels)), pixels)
    assert to_images(np.float32([[[[-3.0, 0.0, 3.0]]]])).tolist() == [[[[0, 128, 255]]]]


def test_edges_of_pictures(emoji):
    edges = edges_of(emoji.images[:2])
    assert edges.shape == (2, 32, 32)
    assert edges.dtype == bool
    assert 0.02 < edges.mean() < 0.6


@pytest.mark.parametrize(("name", "value"), [("dropout", 1.0), ("solver_steps", 0)])
def test_refuses_odd_configs(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        SmallEditorConfig(**{name: value})
