"""The whole edit against the official loop in torch, from a committed golden (no torch needed).

It comes from `python -m benchmarks.parity instantedit --goldens tests/instantedit/goldens`; `make parity` compares
live. The checkpoint in it is also what `from_pretrained` is tried on.
"""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import instantedit_parity as parity
from jaxlab.instantedit import InstantEditPipeline


@pytest.fixture(scope="module")
def golden():
    return parity.read(Path(__file__).parent / "goldens" / "instantedit.npz")


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    return parity.folder_of(tmp_path_factory.mktemp("checkpoint"), golden["configs"], golden["weights"])


@pytest.mark.latest
def test_an_edit_equals_the_official_loop(golden, tmp_path):
    for what, difference in parity.differences(golden, tmp_path).items():
        assert difference <= parity.BOUND, what


def test_the_controlnet_may_lie_elsewhere(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("controlnet"))
    with pytest.raises(FileNotFoundError, match="controlnet: expected a folder"):
        InstantEditPipeline.from_pretrained(bare)
    pipeline = InstantEditPipeline.from_pretrained(bare, controlnet=folder / "controlnet", dtype="bfloat16")
    assert pipeline.network.unet.dtype == "bfloat16"
    assert pipeline.network.params["unet"]["conv_in"]["kernel"].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type: expected one of .*, got 'v_prediction'"),
        ({"prediction_type": "something"}, "prediction_type: expected one of .*, got 'something'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: expected False, got True"),
        ({"trained_betas": [0.1]}, r"trained_betas: expected None, got \[0.1\]"),
        ({"beta_schedule": "linear"}, "beta_schedule: expected scaled_linear, got linear"),
    ],
)
def test_a_scheduler_of_another_kind(folder, tmp_path, change, message):
    (tmp_path / "scheduler").mkdir()
    for name in ("unet", "vae", "text_encoder", "tokenizer", "controlnet"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(parity.SCHEDULER | change))
    with pytest.raises(ValueError, match=message):
        InstantEditPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, float16, got 'int8'"):
        InstantEditPipeline.from_pretrained(tmp_path, dtype="int8")
