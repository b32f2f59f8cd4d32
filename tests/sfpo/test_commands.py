"""The verbs: training that goes on, evaluation of what was trained, a comparison; and what is refused."""

import pytest
from typer.testing import CliRunner

from jaxlab import core
from jaxlab.cli import app
from jaxlab.rl import GRPOConfig
from jaxlab.sfpo.language_model import LanguageModelConfig
from tests.sfpo import toys


def run(*args, code=0):
    result = CliRunner().invoke(app, ["sfpo", *map(str, args)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("reasoning_gym")
    folder = tmp_path_factory.mktemp("sfpo")
    core.save_config(toys.config(), folder / "toy.yaml")
    return folder


@pytest.mark.latest
def test_trains_then_evaluates(folder):
    args = ("train", folder / "toy.yaml", "--folder", folder / "train", "--method", "grpo")
    told = run(*args)
    assert "warm start: 6 steps 4 steps of grpo, 32 completions: accuracy 0." in told
    assert run(*args) == told  # it was finished
    model = folder / "train" / "model"
    assert (model / "tokenizer.json").exists()
    told = run("eval", model, "--problems", 16, "--show", 2)
    assert told.startswith("16 problems: 0.")
    assert told.count("=") >= 2
    assert "family: expected one of" in run("eval", model, "--family", "luck", code=2)

    data = folder / "data.jsonl"
    for k in range(4):
        core.jsonl.append(data, {"prompt": f"{k}+1=", "answer": str(k + 1)})
    rl = GRPOConfig(
        num_generations=2, prompts_per_step=2, max_prompt_length=8, max_completion_length=4, steps=2, nonfinite="skip"
    )
    core.save_config(
        LanguageModelConfig(source=str(model), data=str(data), rewards=("exact",), rl=rl), folder / "lm.yaml"
    )
    args = ("train", folder / "lm.yaml", "--folder", folder / "lm")
    told = run(*args)
    assert told.startswith("2 steps of sfpo: reward 0.")
    assert run(*args) == told
    assert (folder / "lm" / "model" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("compare", "grpo", "luck"), "expected one of grpo, sfpo"),
        (("compare", "grpo", "rl.stepps=3"), "stepps"),
        (("compare", "grpo", "grpo"), "none twice"),
        (("train", "configs/sfpo/laptop.yaml", "--method", "luck"), "expected one of grpo, sfpo"),
        (("train", "configs/sfpo/gsm8k.yaml", "--method", "luck"), "expected one of grpo, sfpo"),
        (("train", "configs/sfpo/gsm8k.yaml", "rewards=[luck]"), "expected math, exact"),
        (("train", "configs/sfpo/gsm8k.yaml", "source=no/such"), "no/such"),
        (("train", "configs/sfpo/gsm8k.yaml", "rl.stepps=3"), "stepps"),
    ],
)
def test_bad_usage_ends_with_two(args, told, tmp_path):
    assert told in run(*args, "--folder", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()
