"""ScienceWorld through its own package and Java, and what needs neither."""

import os
import shutil

import pytest

pytest.importorskip("scienceworld", reason="the extra 'agents' is not installed")

from jaxlab.core import jsonl
from jaxlab.eaglet import GoldGuide, ScienceWorldEnv, ScriptedExecutor, Task, rollout
from jaxlab.eaglet.envs import science_world

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="ScienceWorld needs Java, and there is none here")


def test_walks_become_teleports():
    path = ["look around", "open door to hall", "go to hall", "look around", "open door to kitchen", "go to kitchen"]
    path += ["take cup", "look around", "open door to hall", "wait", "open cupboard"]
    assert science_world.shortcut(path) == [
        *("teleport to kitchen", "take cup", "look around", "open door to hall", "wait", "open cupboard"),
    ]
    around = ["go to hall", "take cup", "go to kitchen", "go to hall", "drop cup", "teleport to kitchen"]
    assert science_world.shortcut(around) == ["teleport to hall", "take cup", "drop cup", "teleport to kitchen"]
    assert science_world.shortcut([]) == []


def test_without_java_one_clear_error(monkeypatch):
    env = ScienceWorldEnv()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"needs Java.*default-jre-headless"):
        env.task("boil", 0)
    with pytest.raises(RuntimeError, match="needs Java"):
        env.reset(Task("x", "", 1, "boil", "train", {"task": "boil", "variation": 0}))
    env.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScienceWorldEnv(observe=("smell",)), "observe: expected names among look, inventory, valid_actions"),
        (lambda: ScienceWorldEnv(per_type=0), "per_type: expected None or at least 1"),
        (lambda: ScienceWorldEnv(unseen_types=("boil", "swim")), "unseen_types: expected names among boil, .*'swim'"),
        (lambda: ScienceWorldEnv(unseen_types=("mendelian-genetics-known-plant",)), "unseen_types: expected names"),
        (lambda: ScienceWorldEnv().task("task-1-boil", 0), "name: expected one of boil, change"),
        (lambda: ScienceWorldEnv().task("boil", 30), "variation: expected 0 to 29 for boil, got 30"),
        (lambda: ScienceWorldEnv().tasks("dev"), "split: expected one of train, seen, unseen"),
        (lambda: ScienceWorldEnv().reset(Task("x", "", 1, "", "train")), "task: expected one of ScienceWorldEnv's"),
    ],
)
def test_bad_inputs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_splits(monkeypatch, tmp_path):
    """The unseen tasks are ETO's 211; instructions come from the file of an earlier process, so no Java starts."""
    monkeypatch.setattr(science_world, "_cache", lambda: tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    env = ScienceWorldEnv()
    sizes = {}
    for split in ("train", "seen", "unseen"):
        mine = env._variations(split, everything=True)
        version = env._package.__version__
        jsonl.rewrite(tmp_path / f"scienceworld-{version}-easy-{split}.jsonl", [[*pair, "Do it."] for pair in mine])
        sizes[split] = env.tasks(split)
    assert {split: len(tasks) for split, tasks in sizes.items()} == {"train": 2286, "seen": 199, "unseen": 211}
    assert len({task.id for tasks in sizes.values() for task in tasks}) == 2286 + 199 + 211
    assert all(task.split == split for split, tasks in sizes.items() for task in tasks)
    assert {task.type: task.max_steps for task in sizes["unseen"]}["boil"] == 100
    assert len({task.type for task in sizes["unseen"]}) == 24
    assert len(ScienceWorldEnv(per_type=2).tasks("train")) == 48
    spread = [task.data["variation"] for task in ScienceWorldEnv(per_type=4).tasks("train") if task.type == "boil"]
    assert spread == [0, 3, 7, 10]
    parted = ScienceWorldEnv(per_type=2, unseen_types=("boil", "melt"))
    types = {split: [task.type for task in parted.tasks(split)] for split in sizes}
    assert types["unseen"] == ["boil", "boil", "melt", "melt"]
    assert len(types["train"]) == len(types["seen"]) == 44
    assert not {"boil", "melt"} & {*types["train"], *types["seen"]}


@needs_java
def test_the_simulator(tmp_path, monkeypatch):
    """One Java process for all that needs one: it takes seconds to start."""
    monkeypatch.setattr(science_world, "_cache", lambda: tmp_path)
    with ScienceWorldEnv(observe=("inventory",)) as env:
        task = env.task("power-component", 15)
        assert (task.id, task.split) == ("scienceworld/power-component/15", "unseen")
        assert (task.max_steps, task.type) == (20, "power-component")
        assert task.instruction.startswith("Your task is to turn on the")
        train, dev, total, _ = science_world._TYPES["power-component"]
        assert list(env._server.getVariationsTrain()) == list(range(train))
        assert list(env._server.getVariationsDev()) == list(range(train, train + dev))
        assert list(env._server.getVariationsTest()) == list(range(train + dev, total))
        assert {name: env._server.getTaskMaxVariations(name) for name in env._server.getTaskNames()} == {
            name: sizes[2] for name, sizes in science_world._TYPES.items()
        }
        first = env.reset(task)
        assert first.startswith("This room is called the")
        observation, reward, done, info = env.step("frobnicate the wug")
        assert (observation, done) == ("No known action matches that input.", False)
        assert 0 <= reward == info["score"] / 100 < 1  # where it begins may count already
        assert info["inventory"].startswith("In your inventory")
        assert (info["valid"], info["ticks"]) == (False, 0)
        assert env.step("wait")[3]["ticks"] == 10
        gold = env.gold_actions(task)  # in the middle of an episode, which goes on after it
        assert env.step("wait1")[3]["ticks"] == 1
        monkeypatch.setattr(ScienceWorldEnv, "_start", None)  # another process finds the path in the cache
        assert ScienceWorldEnv().gold_actions(task) == gold
        monkeypatch.undo()
        monkeypatch.setattr(science_world, "_cache", lambda: tmp_path)
        assert not [action for action in gold if action.startswith("go to")]
        got = rollout(env, ScriptedExecutor("gold", GoldGuide({task.id: gold}), skill=1.0), task)
        assert (got.reward, got.done, got.steps <= task.max_steps) == (1.0, True, True)
        assert got.actions == tuple(gold[: got.steps])  # now and then the current flows a moment earlier

        env.reset(task)
        assert "look around" in env.commands()
        monkeypatch.setattr(env, "_list_commands", ScienceWorldEnv(list_commands=False)._list_commands)
        assert env.commands() == ()
        env.step("teleport to kitchen")
        assert env.step("focus on stove")[1:3] == (-1.0, True)
        with pytest.raises(RuntimeError, match="after the end"):
            env.step("wait")

        monkeypatch.setattr(env, "_per_type", 1)
        monkeypatch.setattr(science_world, "_TYPES", {"power-component": science_world._TYPES["power-component"]})
        (only,) = env.tasks("seen")
        assert only.id == "scienceworld/power-component/10"
        assert jsonl.read(next(tmp_path.glob("*-seen.jsonl"))) == [["power-component", 10, only.instruction]]
        process = env._simulator._gateway.java_process
        assert os.path.exists(f"/proc/{process.pid}")
    assert process.poll() is not None
    with pytest.raises(RuntimeError, match="after close"):
        env.step("wait")
