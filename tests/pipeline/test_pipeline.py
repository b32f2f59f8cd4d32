"""The pipeline at toy size: every stage once, kept and redone as it must be; rewards, rows, and what is refused."""

import pytest

from jaxlab import core, tour
from jaxlab.models import load_pretrained, load_tokenizer
from jaxlab.pipeline import Pipeline, PipelineConfig, Quest, QuestConfig, recipe, useful

for extra in ("fastapi", "uvicorn", "httpx", "prometheus_client"):
    pytest.importorskip(extra, reason="the extras 'serving' and 'agents' are not installed")

CHANGES = (
    "model.hidden_size=16",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "model.moe={num_experts: 4, top_k: 2, ffn_size: 8, renormalise: true}",
    "quest={size: 3, tasks: 6, rows: 8}",
    "train={steps: 4, batch_size: 4}",
    "improve={prompts_per_step: 2, num_generations: 2, max_prompt_length: 64, max_completion_length: 4, steps: 2, "
    "learning_rate: 1.0e-3, sfpo: {inner_steps: 2}}",
    "calibration=2",
    "server={num_pages: 33, max_running: 2, prefill_chunk: 16}",
    "agent={tasks: 2}",
)


def config(*changes):
    path = core.find_config("configs/pipeline/laptop.yaml")
    return core.load_config(PipelineConfig, path, (*CHANGES, *changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with all stages, and their report."""
    folder = tmp_path_factory.mktemp("pipeline")
    return folder, recipe.run(config(f"folder={folder}"))


def stages(folder):
    """When each stage was finished, by its folder's name."""
    return {done.parent.name: done.stat().st_mtime_ns for done in folder.glob("*/stage.json")}


@pytest.mark.latest
def test_one_model_goes_all_the_way(run, tmp_path):
    _, report = run
    told, (model, agent) = report.metrics, (table[2] for table in report.tables)
    assert len(model) == 4
    assert model[2][5] == model[1][5] / 2  # bytes of the experts
    assert told["expert_bytes_packed"] == 0.5
    assert [row[0] for row in agent] == [
        *("highest clock, no plans", "highest clock, with plans", "EcoFreq, no plans", "EcoFreq, with plans")
    ]
    columns = dict(zip(report.tables[1][1], zip(*agent)))
    counted = ("J", "prompt tokens", "written tokens", "first token, ms")
    assert all(value > 0 for name in counted for value in columns[name])
    assert columns["clock changes"][:2] == (0, 0)  # nobody sets them
    report.save(tmp_path)
    assert len(list(tmp_path.glob("plot_*.png"))) == 5
    assert tour.RECIPES["pipeline"].endswith("configs/pipeline/laptop.yaml")


def test_folders_are_what_users_hand_on(run):
    folder, _ = run
    for name in ("trained", "improved", "packed"):
        (place,) = folder.glob(f"{name}-*/model")
        model, _ = load_pretrained(place)
        assert model.config.moe.num_experts == 4
        assert load_tokenizer(place).decode(load_tokenizer(place).encode("use garden")) == "use garden"
    assert {file.name for file in folder.glob("profiled-*/*.csv")} >= {"decode.csv", "prefill.csv"}


def test_a_stage_is_made_once_and_again_where_it_must(run):
    folder, report = run
    before = stages(folder)
    again = recipe.run(config(f"folder={folder}"))
    assert stages(folder) == before
    assert again.tables == report.tables
    other = Pipeline(config("compress.ratio=0.25"), folder).packed
    assert other.told["expert_bytes_after"] == 0.75 * other.told["expert_bytes_before"]
    new = stages(folder).keys() - before.keys()
    assert new == {other.folder.name}  # what comes before the change is only read


def test_a_stage_that_was_killed_goes_on(run):
    folder, report = run
    (done,) = folder.glob("improved-*/stage.json")
    steps = done.parent / "run" / "metrics.jsonl"
    made = steps.read_text()
    done.unlink()  # as if it had been killed before its last write
    assert Pipeline(config(), folder).improved.told["planned"][0] == report.metrics["accuracy_improved"]
    assert steps.read_text() == made  # no step was made again


def test_rewards_are_what_the_world_says():
    quest = Quest(QuestConfig(size=3, tasks=4, rows=8))
    task = quest.env.tasks("seen")[0]
    rows = quest.rows("seen", planned=True)
    right = [rows[0]["right"]] * 2
    assert useful(["", ""], [f" {quest.env.gold_actions(task)[0]}\n", "dance"], right=right) == [1.0, 0.0]
    assert {row["prompt"] for row in rows} != {row["prompt"] for row in quest.rows("seen", planned=False)}
    for row in rows:
        # What is right is told in the prompt: the way to the place of the step.
        place = row["prompt"].rpartition("Plan: use ")[2].strip()
        way = row["prompt"].partition(f": {place}.")[0].rpartition(". ")[2].split()
        assert row["right"] == ((f"use {place}",) if way == ["here"] else tuple(way))
    assert len(quest.rows("train", planned=True, count=5)) == 5
    tasks = quest.held_out(3)
    assert [each.split for each in tasks] == ["seen", "seen", "unseen"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("model.moe=null", "model.moe: expected experts"),
        ("improve.sfpo=null", "improve.sfpo: expected slow-fast updates"),
        ("server={controllers: [luck]}", "controllers: expected some of static, ecofreq, got 'luck'"),
        ("server={controllers: []}", "controllers: expected at least one"),
        ("agent={seeds: [1, 1]}", "seeds: expected at least one, none twice"),
        ("quest={size: 2}", "size: expected at least 3, got 2"),
    ],
)
def test_bad_settings_are_named(change, told):
    with pytest.raises(ValueError, match=told):
        config(change)


def test_words_must_fit(tmp_path):
    line = Pipeline(config("model.vocab_size=20"), tmp_path)
    with pytest.raises(ValueError, match="vocab_size: expected at least the world's"):
        _ = line.trained
    assert not list(tmp_path.glob("*/stage.json"))
