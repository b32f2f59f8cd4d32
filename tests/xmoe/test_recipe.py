"""The recipe at toy size: what it tells is counted, not claimed."""

import dataclasses

import pytest

from jaxlab import core, tour
from jaxlab.xmoe.recipe import XMoEConfig, run
from tests.training import toys

CHANGES = (
    "model.hidden_size=16",
    "model.num_hidden_layers=2",
    "model.moe={num_experts: 16, top_k: 3, ffn_size: 8, shared_ffn_size: 16}",
    "steps=3",
    "batch_size=4",
    "length=16",
    "eval_batches=2",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xmoe")
    where = [f"data={toys.corpus(folder / 'text')}", f"folder={folder / 'run'}"]
    return core.load_config(XMoEConfig, core.find_config("configs/xmoe/laptop.yaml"), [*CHANGES, *where])


def _table(report, start):
    return next(rows for title, _, rows in report.tables if title.startswith(start))


def test_tells_load_redundancy_volumes_and_equality(config, tmp_path):
    report = run(config)
    assert report.system == "xmoe"
    assert report.metrics["steps"] == 3
    assert report.metrics["active_parameters"] < report.metrics["parameters"]
    assert report.metrics["largest_difference"] < 1e-4
    assert [nodes for nodes, *_ in _table(report, "Redundancy")] == [2, 4, 8]
    alike = {mode: rest for mode, *rest in _table(report, "The first sparse layer")}
    for mode in ("pft", "rbd"):  # on eight devices: what the program reports is what the choices say
        _, devices, sent, counted = alike[mode]
        assert devices == 8
        assert sent == counted > 0
    assert alike["rbd"][2] < alike["pft"][2]
    report.save(tmp_path)
    assert len(list(tmp_path.glob("plot_*.png"))) == 5

    # Sixteen devices are not here: the same counts, from the plans. The model is trained already.
    planned = run(dataclasses.replace(config, devices=16, node_size=8))
    assert planned.metrics["final_loss"] == report.metrics["final_loss"]
    counts = {mode: rest for mode, *rest in _table(planned, "The first sparse layer")}
    for mode in ("pft", "rbd"):
        difference, devices, sent, counted = counts[f"{mode}, planned only"]
        assert difference is None
        assert devices == 16
        assert sent == counted > 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [({"rows": 12}, "rows"), ({"devices": 3}, "devices"), ({"node_size": 3}, "node_size"), ({"devices": 0}, "devices")],
)
def test_bad_configs(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_every_config_is_a_recipe(config):
    """The trained shapes have the same active width; the tour runs the laptop's."""
    loaded = {
        name: core.load_config(XMoEConfig, core.find_config(f"configs/xmoe/{name}.yaml"))
        for name in ("laptop", "paper", "fine_grained", "top2", "dense_twin")
    }
    fine, top2, dense = (loaded[name].model for name in ("fine_grained", "top2", "dense_twin"))
    assert (fine.moe.num_experts, fine.moe.top_k, top2.moe.num_experts, top2.moe.top_k) == (64, 6, 8, 2)
    assert fine.moe.top_k * fine.moe.ffn_size + fine.moe.shared_ffn_size == dense.intermediate_size
    assert top2.moe.top_k * top2.moe.ffn_size == dense.intermediate_size
    assert tour.RECIPES["xmoe"] == "jaxlab.xmoe.recipe:configs/xmoe/laptop.yaml"
