"""Study, recipe and commands, in one small world whose stages all tests share."""

import json

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxlab import core, recipes, tour
from jaxlab.cli import app
from jaxlab.eaglet import LMExecutor, Task, recipe, rollout
from jaxlab.eaglet.study import METHODS, Study, StudyConfig
from jaxlab.eaglet.worlds import NAMES, WorldConfig
from tests.eaglet.toys import EchoEnv

# Whichever test asks for the study first trains it.
pytestmark = pytest.mark.filterwarnings("ignore:.*no update is made")

CONFIG = "configs/eaglet/laptop.yaml"
CHANGES = (
    "world.options={size: 4, n_tasks: 8}",
    "world.held_out=4",
    "planner={hidden_size: 32, layers: 1, heads: 2, context: 64}",
    "sft.steps=100",
    "grpo.prompts_per_step=2",
    "grpo.num_generations=4",
    "grpo.steps=2",
    "grpo.seeds=[0]",
    "dpo.steps=2",
    "methods=[none, other_type, grpo, gold]",
)


def config(*changes):
    return core.load_config(StudyConfig, core.find_config(CONFIG), (*CHANGES, *changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def report(folder):
    return recipe.run(config(f"folder={folder}"))


def test_the_recipe(report, folder):
    assert [title[:25] for title, *_ in report.tables] == ["Tasks held out, seen: 4 x", "Tasks held out, unseen: 4"]
    rows = {row[0]: dict(zip(recipe.COLUMNS, row)) for row in report.tables[0][2]}
    assert list(rows) == [METHODS[name] for name in ("none", "other_type", "grpo", "gold")]
    assert rows["no plan"]["R_final"] is None
    assert rows["gold plan"]["novice: success"] == 1
    assert rows["gold plan"]["steps, all three"] < rows["no plan"]["steps, all three"]
    assert report.metrics["plans_given"] == 8
    assert 0 <= report.metrics["filter_recall"] <= 1
    assert len(report.plots) == 2
    assert report.save(folder / "report").exists()


def test_stages_are_read_again(report, folder, monkeypatch):
    monkeypatch.setattr(Study, "_trained", None)
    study = Study(config(f"folder={folder}"), folder)
    assert study.planner("grpo")(study.train[0]).text
    assert len(study.plans()) == 8
    assert study.kept() == study.filtered().kept
    assert study.source("packaged", "seen").max_tokens == 48
    for split, told in (("seen", "use forge"), ("unseen", "use something")):  # by tasks of its type, if there are any
        task = study.held_out[split][0]
        assert study.source("gold_told", split)(task).plan.startswith(f"Step 1: {told}")
        assert "something" not in study.source("gold", split)(task).plan
    with pytest.raises(ValueError, match="method: expected one with plans"):
        study.rewards("none", "seen")
    with pytest.raises(ValueError, match=r"corruption: .* has a study with 0.9, got 0.1; use another folder"):
        Study(config("corruption=0.1"), folder)


@pytest.mark.parametrize(
    ("verb", "options", "told"),
    [
        ("synth", ("--show", "1"), ["8 plans, 8 of the right format"]),
        ("filter", (), ["of 8 plans kept", "of those dropped have a fault"]),
        ("sft", (), ["planner:", "sft"]),
        ("rl", (), ["2 updates: reward", "environment steps"]),
        ("eval", ("--method", "gold", "--split", "unseen"), ["without a plan", "novice", "success"]),
        ("play", ("--method", "gold", "--number", "1"), ["Task: Brew the", "Plan: use", "with it", "reward"]),
        ("play", ("--method", "none", "--executor", "other"), ["Plan: (none)"]),
    ],
)
def test_commands(report, folder, verb, options, told):
    result = CliRunner().invoke(app, ["eaglet", verb, CONFIG, *CHANGES, "--folder", str(folder), *options])
    assert result.exit_code == 0, result.output
    for text in told:
        assert text in result.output


def test_play_needs_nothing_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["eaglet", "play"])
    assert result.exit_code == 0, result.output
    assert "Plan: use forge; use chapel; use cellar; use market" in result.output
    assert not list(tmp_path.iterdir())


def test_preferences_of_a_study(report, folder):
    """Its folder is one of before there was such a setting."""
    path = folder / "study.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in saved.items() if name != "dpo"}))
    study = Study(config(f"folder={folder}"), folder)
    start = study.planner("sft")
    pairs = study._preferences(start)
    assert all(better.ok and better.text != worse.text for _, better, worse in pairs)
    assert any(not np.array_equal(*pair) for pair in zip(*map(leaves, (start, study.planner("dpo")))))
    assert json.loads(path.read_text()) == saved


def leaves(planner):
    return jax.tree.leaves(planner.params)


def test_a_planner_is_exported(report, folder, tmp_path):
    place = tmp_path / "exported"
    options = ("--folder", str(folder), "--export", str(place))
    result = CliRunner().invoke(app, ["eaglet", "rl", CONFIG, *CHANGES, *options])
    assert result.exit_code == 0, result.output
    assert json.loads((place / "config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.parametrize(
    ("verb", "options", "told"),
    [
        ("rl", ("--reward", "luck"), "expected one of gain, expert"),
        ("eval", ("--method", "luck"), "expected one of none"),
        ("play", ("--number", "99"), "expected a number below 4"),
        ("play", ("--split", "train"), "expected one of seen, unseen"),
        ("play", ("methods=[packaged]", "world.options={seed: 1}"), "expected 'packaged' with the world grid_quest of"),
        ("synth", ("world.name=moon",), "expected one of grid_quest"),
        ("synth", ("executors.skills=[1]",), "expected one of each"),
        ("synth", ("methods=[luck]",), "methods"),
    ],
)
def test_bad_commands(folder, verb, options, told):
    result = CliRunner().invoke(app, ["eaglet", verb, CONFIG, *CHANGES, "--folder", str(folder), *options])
    assert result.exit_code == 2
    assert told in " ".join(result.output.replace("│", " ").split())


def test_decoders_as_executors(tmp_path):
    """Cloned and kept; the third one begins with other parameters."""
    sizes = "sizes: {hidden_size: 32, layers: 1, heads: 2, context: 128}"
    lm = f"executors={{kind: lm, {sizes}, novice_steps: 1, sft: {{steps: 3, batch_size: 4}}}}"
    study = Study(config(lm), tmp_path)
    assert tuple(study.executors) == NAMES
    assert all(isinstance(executor, LMExecutor) and executor.name == name for name, executor in study.executors.items())
    assert callable(study.where)
    again = Study(config(lm), tmp_path).executors["novice"]
    task = study.held_out["unseen"][0]
    played = [
        rollout(study.env, each, task, plan="Step 1: use well", max_steps=2)
        for each in (study.executors["novice"], again)
    ]
    assert played[0] == played[1]


def test_the_evidence_begins(tmp_path, monkeypatch):
    from benchmarks.evidence import eaglet as evidence

    names = [item.name for item in evidence.items()]
    rows = 2 * (12 + 7 + 7 + 6) + 4 + 3
    assert len(set(names)) == len(names) == rows + len(evidence.FAULTY) + len(evidence.ALPHAS) + 1
    monkeypatch.setattr(evidence, "WORK", tmp_path)
    monkeypatch.setattr(evidence, "WORLDS", {"grid": ("", CHANGES, ("none", "gold"), (0, 1))})
    rows = [evidence._row("grid", "seen", method) for method in ("none", "gold")]
    assert (rows[0]["plans"], rows[0]["R_final"], rows[0]["novice: gain"]) == ("no plan", None, "")
    assert rows[1]["novice: gain"].startswith("+")
    assert rows[1]["R_final"] > 2
    told = evidence._filter("grid")
    assert 0 <= told["faulty after"] <= 1
    curves = [1.0, 2.0, 3.0] * 10, [3.0, 4.0, 5.0] * 10
    for seed, rewards in enumerate(curves):
        core.jsonl.rewrite(study_folder(tmp_path, seed) / "metrics.jsonl", [{"reward": reward} for reward in rewards])
    monkeypatch.setattr(Study, "planner", lambda self, method: method)
    assert evidence._curve("grid") == {"updates": 30, **dict.fromkeys(evidence._TENTHS, 3.0)}
    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    made = {f"grid, seen, {row['plans']}": {"row": row} for row in rows} | {"corruption 0.5": {"row": told}}
    made["grid, rewards"] = {"row": {"world": "Grid world, scripted", **evidence._curve("grid")}}
    (tmp_path / "eaglet.json").write_text(json.dumps({"items": made}))
    evidence.pages()
    assert all((tmp_path / f"eaglet_{name}.png").stat().st_size for name in ("grid_seen", "filter", "rewards"))


def study_folder(tmp_path, seed):
    folder = tmp_path / "grid" / str(seed) / "runs" / "grpo"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_tasks_of_all_types_come_in_turn():
    class Blocks(EchoEnv):
        def _tasks(self, split):
            return [Task(f"{kind}-{k}", "", 1, kind, split) for kind in "abc" for k in range(3)]

    tasks = WorldConfig(held_out=5).tasks(Blocks(), "seen")
    assert [task.id for task in tasks] == ["a-0", "b-0", "c-0", "a-1", "b-1"]


def test_the_laptops_config_is_the_tours():
    assert tour.RECIPES["eaglet"] == f"jaxlab.eaglet.recipe:{CONFIG}"
    assert recipes.SYSTEMS["eaglet"].config == CONFIG
    loaded = recipes.load(recipe.run, CONFIG)
    assert "packaged" in loaded.methods
    assert loaded.grpo.beta == 0.01
    assert json.loads(json.dumps(core.to_dict(loaded)))["grpo"]["reward"] == "gain"
