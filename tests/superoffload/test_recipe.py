"""The recipe at toy size: the same bits in every way, a timeline that overlaps, and the first steps of the evidence."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest

from jaxlab import core, tour
from jaxlab import superoffload as so
from jaxlab.core import plan as planning
from jaxlab.models.cost import parameter_count
from jaxlab.models.decoder import Decoder, init_params
from jaxlab.superoffload import recipe
from jaxlab.superoffload.pieces import decoder_pieces, scalar_loss
from jaxlab.superoffload.study import Study, StudyConfig, different_bits
from jaxlab.training import lm_loss
from tests.training import toys

CHANGES = (
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "bucket_bytes=16384",
    "steps=8",
    "batch_size=2",
    "length=16",
    "nan_at=[3]",
    "inf_at=[6]",
    "loss_scale={window: 2, hysteresis: 1}",
    "link_bw=1e7",
    "shape=[2, 512, 1, 256]",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    text = toys.corpus(tmp_path_factory.mktemp("superoffload") / "text")
    path = core.find_config("configs/superoffload/laptop.yaml")
    return core.load_config(StudyConfig, path, (*CHANGES, f"data={text}"))


@pytest.mark.latest
def test_tells_the_same_bits_and_when_what_ran(config, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "SIZES", {name: recipe.SIZES[name] for name in ("1B", "3.5B", "5B")})
    report = recipe.run(dataclasses.replace(config, folder=str(tmp_path / "work")))
    told = report.metrics
    assert (told["different_bits"], told["skipped"], told["steps"]) == (0, 2, 8)
    assert told["rolled_back"] == told["clipped"] + told["skipped"] > 2
    assert [told[f"largest_{method}"] for method in ("gpu_only", "superoffload")] == ["3.5B", "5B"]
    ways = report.tables[0][2]
    assert [(row[0], row[1], row[2]) for row in ways] == [
        ("synchronous", None, 6),
        ("copies", 0, 6),
        ("residuals", 0, 6),
    ]
    assert ways[1][5] == pytest.approx(12, rel=0.05)
    assert 3 < ways[2][5] < ways[1][5] * 1.05
    report.save(tmp_path / "report")
    assert len(list((tmp_path / "report").glob("plot_*.png"))) == 7


def test_the_hosts_adam_overlaps_the_backward_pass(config, tmp_path):
    unclipped = dataclasses.replace(config.optimizer, clip_norm=None)
    study = Study(dataclasses.replace(config, steps=3, nan_at=(), inf_at=(), optimizer=unclipped))
    run = study.run("copies", tmp_path)
    timeline = run.timelines[-1]
    assert timeline.source == "measured"
    for lane in ("gpu", "d2h", "h2d", "host"):
        spans = sorted((start, end) for _, start, end in timeline.lanes[lane])
        assert all(0 <= start <= end <= timeline.step_time for start, end in spans)
        assert all(end <= start + 1e-4 for (_, end), (start, _) in itertools.pairwise(spans))
    arrived, adam = (sorted(span[edge] for span in timeline.lanes[lane]) for lane, edge in (("d2h", 2), ("host", 1)))
    assert all(start >= end for start, end in zip(adam, arrived, strict=True))  # Adam waits for its gradient
    whole = so.Schedule(timeline.step_time, 0.0, 0.0, timeline.lanes, source="measured")
    assert "(measured)" in whole.to_ascii(20)
    slept = sum(end - start for _, start, end in timeline.lanes["d2h"])
    assert slept >= sum(x.nbytes for name, x in run.state.items() if name.startswith("p ")) / 1e7


def test_bits_are_counted(config, tmp_path):
    run = Study(dataclasses.replace(config, steps=1)).run("synchronous", tmp_path)
    state = {name: x.copy() for name, x in run.state.items()}
    assert different_bits(run, run._replace(state=state)) == 0
    state["p 0"][:2] = [np.nan, -0.0]
    state["count"] = np.asarray(state["count"] + 1)
    assert different_bits(run, run._replace(state=state)) == 3
    with pytest.raises(ValueError, match="same buckets"):
        different_bits(run, run._replace(state={}))


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_in_pieces_is_the_decoder(config, tied):
    model = Decoder(dataclasses.replace(config.model, tie_word_embeddings=tied, num_hidden_layers=3, dtype="float32"))
    loss = lm_loss(model)
    pieces = decoder_pieces(loss, 2)
    assert isinstance(pieces.loss, so.Segmented) is not tied
    params = init_params(model, jax.random.key(0))
    back = pieces.join(pieces.split(params))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    batch = toys.batch()
    want = jax.value_and_grad(scalar_loss(loss))(params, batch)
    if not tied:
        network = pieces.loss

        def whole(parts, batch):
            x = network.fns[0](parts[0], batch)
            for fn, part in zip(network.fns[1:], parts[1:]):
                x = fn(part, x)
            return network.head(parts[-1], x, batch)

        value, grads = jax.value_and_grad(whole)(pieces.split(params), batch)
        np.testing.assert_allclose(value, want[0], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), pieces.join(grads), want[1])
    with pytest.raises(ValueError, match="layers"):
        decoder_pieces(loss, 0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": ()}, "ways"),
        ({"ways": ("luck",)}, "residuals"),
        ({"link_bw": 0}, "link_bw"),
        ({"mesh": {"data": 8}}, "mesh"),
    ],
)
def test_bad_configs(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_the_papers_config_is_planned():
    config = core.load_config(recipe.PlanConfig, core.find_config("configs/superoffload/paper.yaml"))
    assert (config.model.num_hidden_layers, config.model.hidden_size) == recipe.SIZES["25B"]
    toy = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 32,
    }
    small = dataclasses.replace(
        config, model=dataclasses.replace(config.model, num_key_value_heads=2, vocab_size=256, **toy), length=32
    )
    small = dataclasses.replace(small, batch_size=8)  # a row a device
    devices = planning.target("cpu")
    made = recipe.plan(small, devices)
    count = parameter_count(small.model)
    # State, undo log, and the layers' weights and gradients in 16 bits, over eight devices.
    assert made.bytes["host"] * devices.mesh.size >= 15 * count.total + 4 * (count.total - count.embedding - 64)
    with pytest.raises(ValueError, match="method"):
        recipe.plan(dataclasses.replace(small, method="luck"), devices)
    with pytest.raises(ValueError, match="offload_inputs"):
        recipe.plan(dataclasses.replace(small, method="ulysses", offload_inputs=True), devices)


def test_the_laptops_config_is_the_tours():
    assert tour.RECIPES["superoffload"] == "jaxlab.superoffload.recipe:configs/superoffload/laptop.yaml"
    loaded = core.load_config(StudyConfig, core.find_config("configs/superoffload/laptop.yaml"))
    assert loaded.ways == ("synchronous", "copies", "residuals")
    assert math.prod(loaded.shape) == 44 * 3072 * 4 * 1024


def test_the_evidence_begins():
    from benchmarks.evidence import superoffload as evidence

    names = [item.name for item in evidence.items()]
    assert len(set(names)) == len(names) == 4 + 6 + 4
    told = evidence.time_overlap(1e8, layers=2, hidden=64, steps=2)
    for way in ("synchronous", "speculative"):
        taken = told["measured"][way]
        assert all(taken[name] > 0 for name in ("step", "accelerator", "host", "to the host", "verdict", "predicted"))
        assert taken["step"] > max(taken["to the host"], taken["from the host"])
        assert told["timelines"][way]["source"] == "measured"
    row = evidence._ablation_row(4)
    assert row["none"] < row["+ speculation"] < 3 * row["none"]
