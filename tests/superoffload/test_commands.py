"""The verbs, and training from the command line: the folder, going on after a kill, and what is refused."""

import json

import pytest
from typer.testing import CliRunner

from jaxlab import core
from jaxlab.cli import app
from jaxlab.models import load_pretrained
from jaxlab.superoffload import trainer
from jaxlab.superoffload.config import SuperOffloadConfig
from jaxlab.training import TrainConfig, train
from tests.training import toys


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", " ").split())


def test_a_plan_says_where_everything_lies():
    assert "undo residual" in run("superoffload", "plan", "25B")
    assert "gpu_only does not fit on gh200" in run("superoffload", "plan", "5B", "--method", "gpu_only", code=1)
    told = json.loads(run("superoffload", "plan", "2x64", "--json"))
    assert (told["weight_policy"], told["n_buckets"]) == ("stationary", 1)


def test_a_schedule_is_drawn(tmp_path):
    assert "(modelled)" in run("superoffload", "simulate", "2x512", "--picture", tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size
    args = ("superoffload", "simulate", "44x3072", "--json")
    fast, slow = (json.loads(run(*args, *more))["step_time"] for more in ((), ("--without", "speculation")))
    assert fast < slow


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("plan", "26B"), "25B"),
        (("plan", "25B", "--machine", "tpu"), "gh200"),
        (("plan", "0x64"), "layers"),
        (("plan", "25B", "--undo", "log"), "residual"),
        (("simulate", "25B", "--method", "zenflow"), "zero_infinity"),
        (("simulate", "25B", "--without", "luck"), "repartition"),
        (("simulate", "2x512", "--width", "0"), "width"),
    ],
)
def test_bad_usage_ends_with_two(args, told):
    assert told in run("superoffload", *args, code=2)


TINY = """
model: {vocab_size: 258, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2,
  num_key_value_heads: 1, max_position_embeddings: 64}
steps: 6
batch_size: 2
length: 16
checkpoint_every: 2
eval_batches: 2
optimizer: {weight_decay: 0.5, learning_rate: 1e-2}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "tiny.yaml"
    path.write_text(f"{TINY}data: {toys.corpus(folder / 'text')}\n")
    return path


def _losses(folder):
    return [row["loss"] for row in core.jsonl.read(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.latest
def test_trains_what_train_trains_and_goes_on(tiny, tmp_path):
    usual, ours = tmp_path / "usual", tmp_path / "ours"
    config = core.load_config(TrainConfig, tiny)
    report = train(config, usual)
    args = ("train", tiny, ours, "--offload", "superoffload", "offload.bucket_bytes=4096", "offload.speculation=always")
    run(*args, "steps=4", "optimizer.steps=6")
    begun = _losses(ours)
    run(*args)  # goes on from step 4
    assert _losses(ours)[:4] == begun
    assert _losses(ours) == pytest.approx(_losses(usual), rel=1e-4)
    for name in ("metrics.jsonl", "checkpoints", "model", "report.json", "train.json"):
        assert (ours / name).exists()
        assert (usual / name).exists()
    told = core.Report.load(ours)
    assert told.system == "superoffload"
    assert told.metrics["validation_perplexity"] == pytest.approx(report.metrics["validation_perplexity"], rel=1e-3)
    assert load_pretrained(ours / "model")[0].config.num_hidden_layers == 2
    whole = tmp_path / "whole"
    run(
        "superoffload", *(whole if part == ours else part for part in args if part not in ("--offload", "superoffload"))
    )
    assert _losses(whole) == _losses(ours)
    run("train", tiny, ours, code=1)  # a folder of the other kind


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "settings", "error", "told"),
    [
        (["mesh={data: 2, expert: 4}"], {}, NotImplementedError, "mesh: expected no axes but data, .*, got expert"),
        (["mesh={tensor: -1}"], {}, NotImplementedError, "mesh: .*, got tensor"),
        (["accumulate=2"], {}, NotImplementedError, "accumulate: expected 1"),
        (["moe.jitter_eps=0.1"], {}, NotImplementedError, "moe.jitter_eps: expected 0"),
        (["model.param_dtype=bfloat16"], {}, NotImplementedError, "model.param_dtype: expected float32"),
        (["model.dtype=float64"], {}, ValueError, "compute_dtype"),
        ([], {"clip_norm": 0.5}, ValueError, r"clip_norm: follows optimizer\.clip_norm"),
        ([], {"steps_per_update": 2}, ValueError, "steps_per_update: follows steps"),
    ],
)
def test_what_it_cannot_train(tiny, changes, settings, error, told):
    config = core.load_config(TrainConfig, tiny, changes)
    with pytest.raises(error, match=told):
        trainer.engine_config(config, SuperOffloadConfig(**settings))


def test_bad_offloads_are_usage_errors(tiny, tmp_path):
    args = ("train", tiny, tmp_path / "out")
    assert "expected superoffload" in run(*args, "--offload", "zenflow", code=2)
    assert "undo" in run(*args, "--offload", "superoffload", "offload.udno=copy", code=2)
    assert not (tmp_path / "out").exists()
