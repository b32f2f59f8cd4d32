"""The small model through its stages, the protocol on it, and its commands; all tests share one run."""

import dataclasses
import json

import pytest
import yaml
from typer.testing import CliRunner

from jaxlab import core, recipes, tour
from jaxlab.cli import app
from jaxlab.vlm_scaling import protocol, recipe
from jaxlab.vlm_scaling.endpoint import EndpointReader, EndpointSampler
from jaxlab.vlm_scaling.protocol import ProtocolConfig
from jaxlab.vlm_scaling.small_model import SmallModel, Trained
from tests.vlm_scaling import toys

pytestmark = pytest.mark.filterwarnings("ignore:.*no update is made")
MODES = ("image+solution", "blind+solution", "shuffled+solution")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return ProtocolConfig(
        models=("sft", "rl"),
        questions=12,
        n=4,
        modes=MODES,
        doubts=2,
        max_tokens=48,
        small=toys.config(),
        folder=str(tmp_path_factory.mktemp("run")),
    )


@pytest.fixture(scope="module")
def report(config):
    return recipe.run(config)


def test_the_report(report, tmp_path):
    titles = [title for title, *_ in report.tables]
    assert titles[:2] == ["Strategies, sft", "Strategies, rl"]
    rows = {row[0]: dict(zip(recipe.STRATEGIES, row)) for row in report.tables[0][2]}
    assert rows["majority@4"]["minus the vote"] is None
    assert rows["random@4"]["accuracy"] <= rows["oracle@4"]["accuracy"]
    assert rows["best-of@4"]["tokens a question"] > rows["majority@4"]["tokens a question"]
    assert rows["best-of[blind+solution]@4"]["tokens a question"] < rows["best-of@4"]["tokens a question"]
    verdicts = [dict(zip(recipe.VERDICTS, row)) for row in report.tables[2][2]]
    assert [(row["model"], row["shown"]) for row in verdicts] == [(m, s) for m in ("sft", "rl") for s in MODES]
    budgets = [dict(zip(recipe.BUDGETS, row)) for row in report.tables[3][2]]
    assert {row["model"] for row in budgets} == {"sft", "rl"}
    assert all(row["regret"] >= 0 for row in budgets)
    doubts = [dict(zip(recipe.DOUBTS, row)) for row in report.tables[4][2]]
    assert all(0 <= row["samples with one"] <= 1 for row in doubts)
    assert len(report.plots) == 3
    assert report.save(tmp_path).exists()


def test_the_small_model_learns_the_form_and_its_stages_differ(report, config):
    folder = f"{config.folder}/small"
    small = SmallModel(config.small, folder)
    losses = [row["loss"] for row in small.history("solver")]
    assert losses[-1] < losses[0] / 3
    assert len(small.history("rl")) == 2
    question = toys.questions(1, noise=0.0)[0]
    texts = [small.stage(name).sampler(max_tokens=48).greedy(question).text for name in ("solver", "sft", "rl")]
    assert all("</think>" in text for text in texts)
    with pytest.raises(ValueError, match="stage: expected one of solver, base, sft, rl, got 'dpo'"):
        small.stage("dpo")


def test_a_run_goes_on_and_makes_nothing_twice(report, config, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("it was made already")

    monkeypatch.setattr(SmallModel, "_train", refuse)
    for name in ("sample", "greedy", "extend"):
        monkeypatch.setattr("jaxlab.vlm_scaling.local.ModelSampler." + name, refuse)
    monkeypatch.setattr("jaxlab.vlm_scaling.local.ModelReader.yes_probabilities", refuse)
    assert recipe.run(config).tables == report.tables


def test_a_folder_is_a_model_as_well(report, config):
    other = dataclasses.replace(config, models=(f"{config.folder}/small/sft",))
    assert isinstance(Trained.load(other.models[0]), Trained)
    again = recipe.run(dataclasses.replace(other, folder=None, modes=MODES[:1], doubts=0))
    assert again.tables[0][2][0][:2] == report.tables[0][2][0][:2]


def test_another_model_can_judge(report, config):
    changed = dataclasses.replace(config, models=("rl",), verifier="sft")
    found = recipe.run(changed)
    of_itself = [row for row in report.tables[2][2] if row[0] == "rl"]
    assert found.tables[1][2] != of_itself  # the same samples, and other verdicts
    samples = [row for row in found.tables[0][2] if row[0].startswith(("greedy", "majority", "oracle"))]
    assert samples == [row for row in report.tables[1][2] if row[0].startswith(("greedy", "majority", "oracle"))]


def test_commands(report, config, tmp_path):
    given = {"system": "vlm-scaling", **core.to_dict(config)}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(given))))
    told = CliRunner().invoke(app, ["vlm-scaling", "report", str(path), "--budget", "100000"], env={"COLUMNS": "200"})
    assert told.exit_code == 0, told.output
    assert "Strategies, rl" in told.output
    assert "best-of[blind+solution]@4" in told.output
    assert "for at most 100000 tokens a question" in told.output
    poor = CliRunner().invoke(app, ["vlm-scaling", "report", str(path), "--budget", "3"])
    assert poor.exit_code == 2
    assert "budget: expected at least" in " ".join(poor.output.replace("│", " ").split())
    for override, code in (("folder=null", 2), (f"folder={tmp_path}/none", 1), ("models=[nonsense, nonsense]", 2)):
        failed = CliRunner().invoke(app, ["vlm-scaling", "report", str(path), override])
        assert failed.exit_code == code, failed.output


def test_registered():
    assert "vlm-scaling" in recipes.SYSTEMS
    assert "vlm_scaling" in tour.RECIPES
    config = core.load_config(ProtocolConfig, core.find_config(recipes.SYSTEMS["vlm-scaling"].config))
    assert config.n >= 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": ()}, "models"),
        ({"modes": ("image", "image")}, "modes: expected at least one, none twice"),
        ({"modes": ("image",)}, "modes: expected one of image"),
        ({"data": "chartqa"}, "data: expected one of visual_math"),
        ({"data": "mathvista"}, "path: expected that of a copy of mathvista"),
        ({"questions": None}, "questions: expected a number"),
        ({"n": 1}, "n: expected at least 2"),
        ({"dev": 1.0}, "dev"),
    ],
)
def test_bad_configs(changes, said):
    with pytest.raises(ValueError, match=said):
        ProtocolConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"families": ("clocks",)}, "families"),
        ({"families": ()}, "families"),
        ({"waits": 2}, "waits"),
        ({"judged": 0}, "judged"),
        ({"verdict_weight": 0}, "verdict_weight"),
    ],
)
def test_bad_small_models(changes, said):
    with pytest.raises(ValueError, match=said):
        toys.config(**changes)


def test_an_endpoint_is_asked_for_nothing_before_the_first_question(tmp_path):
    pytest.importorskip("httpx")
    found = protocol.subject(ProtocolConfig(), "qwen@http://localhost:9/v1", tmp_path)
    assert isinstance(found.sampler, EndpointSampler)
    assert isinstance(found.reader, EndpointReader)


def test_a_data_set_that_is_not_there(tmp_path):
    with pytest.raises(core.DataUnavailable, match="MathVista"):
        protocol.questions(ProtocolConfig(data="mathvista", path=str(tmp_path)))


def test_what_has_not_run_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="expected the model 'sft'"):
        protocol.kept(ProtocolConfig(models=("sft",)), "sft", tmp_path)
