import json

import pytest
from typer.testing import CliRunner

from jaxlab.cli import app
from tests.aot import needs_aot


def run(*args, code=0):
    result = CliRunner().invoke(app, ["xmoe", *args])
    assert result.exit_code == code, result.output
    return result.output


def test_volume_prints_rows_and_redundancy():
    text = run("volume", "--tokens", "256")
    assert "rbd" in text
    assert "closed form 54.82%" in text
    told = json.loads(run("volume", "--tokens", "256", "--pilot", "rail", "--json"))
    assert told["redundancy"] == pytest.approx(told["closed_form"], abs=0.01)
    saved = 1 - told["rbd"]["inter_rows"] / told["pft"]["inter_rows"]
    assert saved == pytest.approx(0.548, abs=0.02)
    assert told["padded"]["inter_bytes"] == told["padded"]["inter_rows"] * 7168 * 2


@needs_aot
def test_trainable_without_compiling():
    text = run("trainable", "--devices", "8", "--size", "super", "--dispatch", "padded", "--most")
    assert "no: states" in text
    assert "DeepSpeed-MoE on 8 mi250x: none" in text
    told = json.loads(run("trainable", "--devices", "8", "--size", "super", "--dispatch", "padded", "--json"))
    (outcome,) = told["outcomes"]
    assert (outcome["fits"], outcome["compiled"], outcome["devices"]) == (False, False, 8)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("volume", "--experts", "100"), "100 experts"),
        (("volume", "--pilot", "last"), "pilot"),
        (("trainable", "--size", "huge"), "huge"),
        (("trainable", "--dispatch", "gshard"), "gshard"),
        (("trainable", "--devices", "12"), "12"),
        (("trainable", "--gpu", "tpu"), "tpu"),
    ],
)
def test_bad_usage_ends_with_two(args, told):
    assert told in run(*args, code=2)
