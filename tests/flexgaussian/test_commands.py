"""The commands, as a person types them, and the recipe."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from jaxlab import core
from jaxlab.flexgaussian import load_scene, recipe
from jaxlab.flexgaussian.commands import app
from jaxlab.flexgaussian.made_up import striped_ball
from tests.flexgaussian.scenes import real

SMALL = ["--width", "48", "--height", "32", "--views", "3"]


def call(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_a_file_s_way(tmp_path):
    source = real("playbot_lod6.sog")
    code, text = call("compress", source, tmp_path / "a.jxg", "--min-psnr", 20, *SMALL)
    assert code == 0, text
    assert "times less" in text
    assert "NOT met" not in text
    code, text = call("info", tmp_path / "a.jxg")
    assert ["bits", "of", "shN", "4"] in [line.split() for line in text.splitlines()]
    assert call("decompress", tmp_path / "a.jxg", tmp_path / "b.ply")[0] == 0
    code, text = call("info", tmp_path / "b.ply")
    assert "degree" in text
    code, text = call("eval", tmp_path / "b.ply", "--reference", source, *SMALL)
    mean = float(next(line for line in text.splitlines() if "mean" in line).split()[1])
    assert mean >= 19.9
    assert call("convert", tmp_path / "a.jxg", tmp_path / "c.spz")[0] == 0
    assert load_scene(tmp_path / "c.spz").num_gaussians == load_scene(tmp_path / "b.ply").num_gaussians
    code, text = call("render", tmp_path / "c.spz", tmp_path / "images", *SMALL)
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["000.png", "001.png", "002.png"]
    image = np.asarray(Image.open(tmp_path / "images" / "000.png"))
    assert image.shape == (32, 48, 3)
    assert (image[0, 0] == 255).all()


def test_targets_that_are_missed(tmp_path):
    source = real("playbot_lod6.sog")
    fixed = ["--prune-rate", 0.5, "--sh-rate", 0.5]
    assert call("compress", source, tmp_path / "a.jxg", *fixed, *SMALL)[0] == 0
    options = ["--min-psnr", 20, "--max-bytes", 100, *SMALL]
    code, text = call("compress", source, tmp_path / "b.jxg", *options)
    assert code == 0
    assert "the target was NOT met" in text
    code, text = call("compress", source, tmp_path / "c.jxg", *options, "--strict")
    assert code == 1
    assert not (tmp_path / "c.jxg").exists()


def test_commands_that_cannot_be(tmp_path):
    source = real("playbot_lod6.sog")
    (tmp_path / "text.ply").write_text("hello")
    for arguments, message in [
        (["info", tmp_path / "text.ply"], "expected .ply, .splat, .spz or .sog"),
        (["compress", source, tmp_path / "a.jxg", "--codec", "lzma", *SMALL], "codec: expected one of"),
        (["compress", source, tmp_path / "a.jxg", "--prune-rate", 0.5, *SMALL], "expected both or none"),
        (["convert", source, tmp_path / "a.obj"], "expected a name that ends in"),
        (["render", source, tmp_path / "x", "--background", "red"], "three numbers"),
        (["eval", source], "expected exactly one"),
        (["compress", source, tmp_path / "a.jxg", "--cameras", tmp_path], "no COLMAP model"),
        (["decompress", source, tmp_path / "a.ply"], "not a file of compressed Gaussians"),
    ]:
        code, text = call(*arguments)
        assert code == 2, text
        assert message in " ".join(text.replace("│", " ").split()), text


def test_learns_from_photographs(tmp_path):
    real("fox")
    options = ["--steps", 3, "--count", 50, "--degree", 0, "--width", 27, "--height", 48, "--test-every", 25]
    code, text = call("fit", real("fox/transforms_original.json"), tmp_path / "fox.ply", *options)
    assert code == 0, text
    assert "on 2 photographs held out" in text
    assert load_scene(tmp_path / "fox.ply").num_gaussians == 50


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    config = core.load_config(recipe.StudyConfig, "configs/flexgaussian/laptop.yaml", ())
    small = {"scene": "splats/playbot_lod6.sog", "views": 4, "width": 48, "height": 32, "min_psnr": 24.0}
    folder = tmp_path_factory.mktemp("report")
    made = recipe.run(dataclasses.replace(config, **small, curve=((0.0, 0.0), (0.5, 0.5)), folder=folder))
    return made, folder


def test_the_recipe(report):
    made, folder = report
    assert not made.synthetic
    assert made.metrics["status"] == "ok"
    assert made.metrics["psnr"] >= 24
    assert made.metrics["bytes"] == (folder / "scene.jxg").stat().st_size
    assert load_scene(folder / "scene.ply").num_gaussians == made.metrics["kept"]
    shares = [row[2] for row in made.tables[1][2]]
    assert sum(shares) == pytest.approx(1)
    made.save(folder / "saved")
    assert len(core.Report.load(folder / "saved").plots) == 3


def test_a_scene_made_up(monkeypatch):
    def absent(name):
        raise core.DataUnavailable(name)

    monkeypatch.setattr(core, "data_path", absent)
    config = recipe.StudyConfig(views=2, width=32, height=24, min_psnr=15.0, curve=())
    made = recipe.run(config)
    assert made.synthetic
    assert "made-up" in made.notes[0]
    ball = striped_ball(300)
    assert (ball.num_gaussians, ball.degree) == (300, 1)
    np.testing.assert_allclose(np.linalg.norm(ball.quats, axis=1), 1, atol=1e-5)
    with pytest.raises(ValueError, match="views: expected at least 2"):
        recipe.StudyConfig(views=1)
