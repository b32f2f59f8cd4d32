import dataclasses
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import core
from jaxlab.core import plan as planning
from jaxlab.models import load_pretrained
from jaxlab.models.decoder import MoESpec
from jaxlab.training import LossOutput, TrainState, fit, make_train_step, plan, train, trained
from tests.training import toys

_ROOT = Path(__file__).resolve().parents[2]


def _losses(folder):
    return {row["step"]: row["loss"] for row in core.jsonl.read(folder / "metrics.jsonl") if "loss" in row}


def _launch(corpus, folder):
    """One device, as on a laptop; the compile cache is that of the tests."""
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, "-m", "tests.training.killed", str(corpus), str(folder)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def _finish(process):
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]


def test_killed_and_started_again_gives_the_same_losses(tmp_path):
    corpus = toys.corpus(tmp_path / "text")
    whole = _launch(corpus, tmp_path / "whole")
    _finish(whole)
    expected = _losses(tmp_path / "whole")
    assert sorted(expected) == list(range(1, 13))

    kill_at = random.SystemRandom().randint(1, 11)
    process = _launch(corpus, tmp_path / "killed")
    deadline = time.monotonic() + 200
    while len(_losses(tmp_path / "killed")) < kill_at and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    before = _losses(tmp_path / "killed")
    _finish(_launch(corpus, tmp_path / "killed"))
    after = _losses(tmp_path / "killed")
    assert before == {step: expected[step] for step in before}, f"killed at {kill_at}"
    assert after == expected, f"killed at {kill_at}"


@pytest.mark.latest
def test_train_reports_and_exports(tmp_path):
    config = toys.config(toys.corpus(tmp_path / "text"), steps=6, eval_every=3, accumulate=2)
    report = train(config, tmp_path / "run")
    rows = core.jsonl.read(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert {"step", "loss", "grad_norm", "tokens_per_s"} <= rows[0].keys()
    assert [row["step"] for row in rows if "validation_perplexity" in row] == [3, 6]
    assert report.metrics["final_loss"] < report.metrics["first_loss"]
    assert (tmp_path / "run" / "report.json").is_file()
    model, params = load_pretrained(tmp_path / "run" / "model")
    assert model.config.hidden_size == 16
    tokens = jnp.asarray(toys.batch().tokens[:1])
    assert jnp.isfinite(model.apply({"params": params}, tokens).logits).all()

    again = train(config, tmp_path / "run")  # already done: nothing is trained or logged twice
    assert again.metrics["final_loss"] == report.metrics["final_loss"]
    assert core.jsonl.read(tmp_path / "run" / "metrics.jsonl") == rows
    with pytest.raises(ValueError, match=r"seed.*another folder"):
        train(toys.config(config.data, seed=1), tmp_path / "run")


def _quadratic():
    def loss(params, batch, rng):
        return LossOutput(jnp.sum((params - batch) ** 2), jnp.float32(batch.size))

    tx = optax.sgd(0.25)
    return TrainState.create(jnp.zeros(2), tx, jax.random.key(0)), make_train_step(loss, tx)


def test_fit_needs_only_step_and_resumes_a_plain_iterable(tmp_path):
    state, step = _quadratic()
    batches = [np.full(2, float(i), np.float32) for i in range(6)]
    seen = []

    def evaluate(state):
        seen.append(int(state.step))
        return {"first": float(state.params[0])}

    with core.MetricsLogger(tmp_path) as logger:
        whole = fit(state, step, batches, steps=6, every=2, logger=logger, evaluate=evaluate, evaluate_every=4)
    assert seen == [4, 6]
    assert [row["first"] for row in core.jsonl.read(tmp_path / "metrics.jsonl") if "first" in row][-1] == whole.params[
        0
    ]

    checkpointer = core.Checkpointer(tmp_path / "checkpoints")
    fit(_quadratic()[0], step, batches, steps=3, every=2, checkpointer=checkpointer)
    assert checkpointer.steps() == (2, 3)
    resumed = fit(_quadratic()[0], step, batches, steps=6, checkpointer=checkpointer)
    np.testing.assert_array_equal(resumed.params, whole.params)
    with pytest.raises(ValueError, match="batches"):
        fit(_quadratic()[0], step, batches, steps=7)
    with pytest.raises(core.CheckpointError):
        fit(
            TrainState.create(jnp.zeros(3), optax.sgd(0.25), jax.random.key(0)),
            step,
            batches,
            steps=7,
            checkpointer=checkpointer,
        )


def test_plan_counts_parameters_and_moments():
    config = toys.config("python-stdlib", batch_size=8)
    made = plan(config, planning.target("cpu", mesh={"data": 2, "fsdp": 2, "tensor": 2}))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(_abstract(config)))
    assert 4 * parameters / 8 <= made.bytes["parameters"] < 4 * parameters / 2
    assert 2 * made.bytes["parameters"] <= made.bytes["optimizer"] <= 2 * made.bytes["parameters"] + 64
    assert made.bytes["input"] == 5 * 4 * 8 * 16 // 4
    assert made.bytes["outputs"] < 4096  # the state is donated


def _abstract(config):
    from jaxlab.models.decoder import Decoder, abstract_params

    return abstract_params(Decoder(config.model))


def test_plan_of_the_8b_step_gathers_the_head_once():
    try:
        target = planning.target("h100", "1x8x8", {"fsdp": 64})
    except core.MissingExtra as missing:
        pytest.skip(str(missing))
    from jaxlab.training import TrainConfig

    config = core.load_config(TrainConfig, _ROOT / "configs/foundation/plan_8b.yaml")
    made = plan(config, target)
    assert made.fits
    assert made.bytes["total"] < 20 * 2**30
    head = config.model.vocab_size * config.model.hidden_size * 2
    whole_head = [item for item in made.collectives if item.bytes >= head]
    assert sum(item.count for item in whole_head) <= 4


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"length": 65}, "max_position_embeddings"),
        ({"accumulate": 3}, "accumulate"),
        ({"eval_every": -1}, "eval_every"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        toys.config("python-stdlib", **change)


def test_a_model_that_could_not_be_saved_is_not_trained(tmp_path):
    experts = dataclasses.replace(toys.MODEL, moe=MoESpec(num_experts=4, top_k=2, ffn_size=8))
    config = toys.config(toys.corpus(tmp_path / "text"), model=experts)
    with pytest.raises(ValueError, match="model_type 'llama' cannot express moe="):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_too_small_is_told(tmp_path):
    config = toys.config(toys.corpus(tmp_path / "text"), model=dataclasses.replace(toys.MODEL, vocab_size=200))
    with pytest.raises(ValueError, match="vocab_size"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_is_trained_once(tmp_path):
    config = toys.config(toys.corpus(tmp_path / "text"), steps=2)
    model = trained(config, tmp_path / "work")
    made = (model / "model.safetensors").stat().st_mtime_ns
    assert load_pretrained(model)[0].config.hidden_size == 16
    assert trained(dataclasses.replace(config, eval_batches=1, checkpoint_every=1), tmp_path / "work") == model
    assert (model / "model.safetensors").stat().st_mtime_ns == made
