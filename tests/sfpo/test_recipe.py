"""The recipe at toy size: what it tells and draws, the plans, and the first steps of the evidence."""

import dataclasses
import inspect
import textwrap

import pytest
from typer.testing import CliRunner

from jaxlab import core, rl, sfpo, tour
from jaxlab.cli import app
from jaxlab.core import plan as planning
from jaxlab.sfpo import recipe
from jaxlab.sfpo.families import problems
from jaxlab.sfpo.methods import METHODS
from jaxlab.sfpo.study import Study, StudyConfig
from tests.sfpo import toys


def test_names():
    assert sorted(sfpo.__all__) == dir(sfpo)
    for name in sfpo.__all__:
        assert getattr(sfpo, name) is getattr(rl, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        sfpo.no_such_name  # noqa: B018


def test_the_example_runs():
    example = inspect.getdoc(sfpo).partition("Example:\n")[2].partition("`GRPOTrainer`")[0]
    names = {}
    exec(textwrap.dedent(example), names)
    assert float(names["params"][0]) == pytest.approx(1 - (3 * 0.8 + 1) * 1e-2, abs=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the runs of the toy study: the first test makes them, the others read them."""
    pytest.importorskip("reasoning_gym")
    folder = tmp_path_factory.mktemp("sfpo")
    core.save_config(toys.config("seeds=[0, 1]"), folder / "toy.yaml")
    return folder


@pytest.mark.latest
def test_tells_what_each_method_needed(folder):
    args = ("sfpo", "compare", "grpo", "sfpo", "--config", folder / "toy.yaml", "--folder", folder)
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    assert "report.json" in " ".join(result.output.split())
    report = core.Report.load(folder)
    told = report.metrics
    assert 0 < told["accuracy_before"] < 1
    assert told["warm_start_steps"] == 6
    assert {"accuracy, sfpo", "rollouts_ratio, sfpo", "seconds_ratio, sfpo"} < told.keys()
    assert [row[0] for row in report.tables[0][2]] == ["GRPO", "SFPO"]
    assert report.tables[0][2][1][-1] == 4  # slow-fast in all steps: the window is longer
    assert [row[1] for row in report.tables[1][2]] == [0.9] * 2 + [1.0] * 2
    assert all(row[3].endswith("of 2") for row in report.tables[1][2])
    assert len(list(folder.glob("plot_*.png"))) == 4


def test_finished_runs_are_only_read(folder, monkeypatch):
    monkeypatch.setattr(Study, "_train", None)
    report = recipe.run(toys.config("methods=[sfpo]", "seeds=[1]", f"folder={folder}"))
    assert len(report.plots) == 3
    with pytest.raises(TypeError, match="not callable"):
        recipe.run(toys.config("methods=[sfpo]", "seeds=[2]", f"folder={folder}"))


def test_the_evidence_begins(folder, monkeypatch):
    from benchmarks.evidence import sfpo as evidence

    names = [item.name for item in evidence.items()]
    assert len(set(names)) == len(names) == 3 * len(METHODS) + 2 + len(evidence.ABLATIONS)
    for family, changes in evidence.FAMILIES.items():
        longest = max(len(row["answer"]) for row in problems(family, 2000, 1)[0])
        assert f"rl.max_completion_length={longest + 1}" in changes
    for _, changes in evidence.ABLATIONS.values():
        assert evidence._config(evidence.ABLATED, changes) != evidence._config(evidence.ABLATED)
    monkeypatch.setattr(evidence, "WORK", folder)
    monkeypatch.setattr(evidence, "FOLDER", folder)
    monkeypatch.setattr(evidence, "SHARED", toys.CHANGES)
    monkeypatch.setattr(evidence, "FAMILIES", {"chain_sum": ()})
    monkeypatch.setattr(evidence, "SEEDS", (0, 1))
    rows = [evidence._row(method, "chain_sum", method, (), (0, 1)) for method in ("grpo", "sfpo")]
    assert [row["method"] for row in rows] == ["grpo", "sfpo"]
    assert rows[0]["100 %: times fewer"] == "1.00"
    assert rows[1]["slow-fast steps"] == 4
    evidence.pages()
    assert (folder / "sfpo_chain_sum_rollouts.png").stat().st_size


def test_the_papers_config_is_planned():
    config = core.load_config(recipe.PlanConfig, core.find_config("configs/sfpo/paper.yaml"))
    assert (config.rl.batch_size, config.rl.mini_batches, config.rl.sfpo.inner_steps) == (2048, 4, 3)
    devices = planning.target("cpu", "1x1x2", {"fsdp": 2})
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    batch = {"prompts_per_step": 2, "num_generations": 4, "mini_batch_size": 4, "micro_batch_size": 2}
    small = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **sizes, **heads),
        rl=dataclasses.replace(config.rl, **batch, max_prompt_length=8, max_completion_length=8),
    )

    def planned(phase="update", **changes):
        return recipe.plan(
            dataclasses.replace(small, phase=phase, rl=dataclasses.replace(small.rl, **changes)), devices
        )

    with_sfpo, without = planned(), planned(sfpo=None)
    parameters = without.bytes["parameters"]
    assert without.bytes["optimizer"] == pytest.approx(2 * parameters, rel=0.01)
    extra = with_sfpo.bytes["total"] - without.bytes["total"]
    assert 0.98 * parameters <= extra <= 1.02 * parameters + 4096  # the anchor
    rollout = planned("rollout", beta=0.1)
    rows, slots, layers, heads, width = 8, 16, 2, 2, 16
    assert rollout.bytes["cache"] == 2 * 2 * rows * slots * layers * heads * width / 2  # bfloat16, over two devices
    assert rollout.bytes["parameters"] == 2 * parameters
    assert rollout.bytes["optimizer"] == pytest.approx(2 * parameters, rel=0.01)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("phase=luck", "phase"),
        ("rl.max_prompt_length=9999", "max_position_embeddings"),
    ],
)
def test_bad_plans(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        core.load_config(recipe.PlanConfig, core.find_config("configs/sfpo/paper.yaml"), (change,))


def test_the_laptops_config_is_the_tours():
    assert tour.RECIPES["sfpo"] == "jaxlab.sfpo.recipe:configs/sfpo/laptop.yaml"
    loaded = core.load_config(StudyConfig, core.find_config("configs/sfpo/laptop.yaml"))
    assert loaded.methods == ("grpo", "sfpo")
    assert loaded.rl.max_completion_length > 6
