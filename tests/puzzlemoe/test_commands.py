import json

import numpy as np
import pytest
from typer.testing import CliRunner

from jaxlab.puzzlemoe import estimate_memory
from jaxlab.puzzlemoe.commands import app
from tests.aot import needs_aot
from tests.models.checkpoints import golden, write
from tests.puzzlemoe.test_serving import TINY


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("commands")
    np.save(path / "calib.npy", golden("mixtral")["tokens"])
    return write(path / "in", "mixtral"), path / "out", path / "calib.npy"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_compress_info_eval(folders):
    source, out, calib = folders
    done = run("compress", source, out, "--ratio", 0.25, "--calib", calib, "--norm", "calls", "--seed", 1)
    assert done.exit_code == 0, done.output
    assert "(75.0%)" in done.output
    assert run("info", out).output == done.output
    report = json.loads(run("info", out, "--json").output)
    assert np.array(report["pairs"]).shape == (2, 1, 2)
    perplexity = run("eval", out, "--text", calib)
    assert perplexity.exit_code == 0, perplexity.output
    assert 10 < float(perplexity.output.split()[1]) < 200


def test_quantised(folders, tmp_path):
    done = run("compress", folders[0], tmp_path / "o", "--bits", 8)
    assert done.exit_code == 0, done.output
    # A byte a position of a pair, and a scale for 16 inputs of two bytes: (1 + 2 / 16) / 4 of bfloat16.
    assert "(28.1%)" in done.output


def test_what_is_wrong_is_said_and_leaves_nothing(folders, tmp_path):
    source, _, calib = folders
    for arguments, error, message in (
        (("compress", source, tmp_path / "o", "--ratio", 0.9), ValueError, "ratio"),
        (("compress", source, tmp_path / "o", "--bits", 7), ValueError, "bits must be one of 16, 8, 6, got 7"),
        (("compress", source, tmp_path / "o", "--norm", "best"), ValueError, "norm must be one of"),
        (("compress", source, tmp_path / "o", "--calib", tmp_path / "none.npy"), FileNotFoundError, "none.npy"),
        (("compress", tmp_path / "in", tmp_path / "o"), FileNotFoundError, "in"),
        (("info", source), ValueError, "no packed model"),
        (("info", tmp_path / "no"), FileNotFoundError, "no folder"),
        (("eval", tmp_path / "no", "--text", calib), FileNotFoundError, "no"),
    ):
        done = run(*arguments)
        assert done.exit_code != 0
        assert isinstance(done.exception, error)
        assert message in str(done.exception)
    assert not list(tmp_path.iterdir())


@needs_aot
def test_fits(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    done = run("fits", path, "--ratio", 0.5, "--phase", "decode", "--gpu", "a100_40", "--context", 256, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    (outcome,) = told["fits"]
    assert (told["gpu"], outcome["fits"], outcome["gpus"]) == ("a100_40", True, 1)
    assert outcome["experts"] == estimate_memory(TINY, 0.5).expert_bytes


@pytest.mark.parametrize(
    "arguments",
    [("gpt-2",), ("--gpu", "tpu"), ("--phase", "training"), ("--ratio", "0.7"), ("--context", "0")],
)
def test_wrong_fits_end_with_two(arguments):
    done = run("fits", *arguments)
    assert done.exit_code == 2
    assert arguments[-1] in done.output
