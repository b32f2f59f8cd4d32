"""The verbs on networks of a few matrices; how a model is found; and what is refused."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from jaxlab.instantedit import Inversion, commands, small_editor
from tests.instantedit import toys

pillow = pytest.importorskip("PIL.Image")

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)


def run(*args, code=0):
    result = CliRunner().invoke(commands.app, list(map(str, args)), env={"COLUMNS": "120"})
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def picture(tmp_path):
    pillow.fromarray(PIXELS).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(commands, "_pipeline", lambda *_: toys.pipeline())


@pytest.mark.latest
def test_edits_of_a_picture_and_of_its_inversion(toy, picture):
    folder = picture.parent
    told = run("invert", picture, folder / "cat.npz", "--model", "toy", "--mode", "official")
    assert told.startswith(f"{folder / 'cat.npz'}: 4 steps, ")
    assert Inversion.load(folder / "cat.npz").mode == "official"
    prompts = ("a photo of a cat", "a photo of a red dog")
    told = run("edit", folder / "cat.npz", *prompts, "--blend-word", "dog", "--out", folder / "dog.png")
    assert "source edit decode total" in told
    told = run("edit", picture, *prompts, "--model", "toy", "--compat", "official", "--blend-word", "dog",
               "--out", folder / "new" / "dog.png")  # fmt: skip
    assert "inversion source edit decode total" in told
    expected = toys.pipeline().edit(PIXELS, *prompts, blend_word="dog", compat="official").image
    np.testing.assert_array_equal(np.asarray(pillow.open(folder / "new" / "dog.png")), expected)
    run("edit", folder / "cat.npz", *prompts, "a big hat", "--out", folder / "many.png")
    assert {path.name for path in folder.glob("many*")} == {"many-1.png", "many-2.png"}


def test_bench_tells_both_edits(toy):
    told = run("bench", "--size", 64, "--repeats", 1)
    assert "edit of 64 x 64 (measured, median of 1)" in told
    assert "first" in told
    assert "further" in told


def test_eval_of_pie_bench(toy, tmp_path, monkeypatch):
    image = tmp_path / "data" / "annotation_images" / "a.png"
    image.parent.mkdir(parents=True)
    pillow.fromarray(PIXELS).resize((512, 512)).save(image)
    entry = {
        "image_path": "a.png",
        "original_prompt": "a photo of a cat",
        "editing_prompt": "a photo of a [dog]",
        "editing_instruction": "",
        "editing_type_id": "1",
        "blended_word": "cat hat",
        "mask": [0, 1000],
    }
    (tmp_path / "data" / "mapping_file.json").write_text(json.dumps({"1": entry}))
    told = run("eval", tmp_path / "data", "--folder", tmp_path / "out")
    assert "| InstantEdit |" in told
    assert (tmp_path / "out" / "edits.jsonl").exists()


def test_train_goes_through_the_stages(tmp_path, monkeypatch):
    made = []

    class Fake:
        def __init__(self, config, folder, *, font):
            made.append((config.teacher.steps, folder, font))

        def history(self, name):
            return [{"loss": 1.0}, {"loss": 0.5}]

        def stage(self, name):
            made.append(name)

        def save(self, folder):
            made.append(folder)

    monkeypatch.setattr(small_editor, "SmallEditor", Fake)
    told = run("train", "teacher.steps=7", "--folder", tmp_path)
    assert made == [(7, tmp_path, None), *small_editor.STAGES, tmp_path / "editor"]
    assert "student: 2 steps, loss 1.0000 -> 0.5000" in told
    assert "teacher" in run("train", "teacher.stepps=7", code=2)


def test_where_a_model_comes_from(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(small_editor, "load_editor", lambda *args: found.append(args))
    commands._pipeline("small", None, "float32")
    commands._pipeline(str(tmp_path), None, "float32")
    assert found == [(), (tmp_path,)]
    with pytest.raises(FileNotFoundError, match="--model: expected a folder or small, got nowhere"):
        commands._pipeline("nowhere", None, "float32")
    (tmp_path / "vae").mkdir()
    with pytest.raises(FileNotFoundError, match="unet: expected a folder"):
        commands._pipeline(str(tmp_path), None, "float32")


def test_bad_input(toy, picture, tmp_path):
    assert "ends in .npz" in run("invert", picture, "out.png", code=2)
    assert "num_steps" in run("invert", picture, tmp_path / "a.npz", "--steps", 0, "--model", "toy", code=2)
    assert "does not exist" in run("edit", tmp_path / "no.png", "a", "b", code=2)
    assert "blend_words" in run("edit", picture, "a", "b", "a", "--blend-word", "b", "--model", "toy", code=2)
    assert "compat" in run("edit", picture, "a", "b", "--compat", "fast", "--model", "toy", code=2)
    assert "--lpips" in run("eval", tmp_path, "--lpips", "fast", code=2)
