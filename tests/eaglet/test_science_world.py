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
    with pytest.raises(RuntimeError, match="needs Java.*default-jre-headless"):
        env.task("boil", 0)
    with pytest.raises(RuntimeError, match="needs Java"):
        env.reset(Task("x", "", 1, "boil", "train", {"task": "boil", "variation": 0}))
    env.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScienceWorldEnv(observe=("smell",)), "observe: expected names among look, inventory, valid_actions"),
        (lambda: ScienceWorldEnv(per_type=0), "per_type: expected None or at least 1"),
        (lambda: ScienceWorldEnv().task("task-1-boil", 0), "name: expected one of boil, change"),
        (lambda: ScienceWorldEnv().task("boil", 30), "variation: expected 0 to 29 for boil, got 30"),
        (lambda: ScienceWorldEnv().tasks("dev"), "split: expected one of train, seen, unseen"),
        (lambda: ScienceWorldEnv().reset(Task("x", "", 1, "", "train")), "task: expected one of ScienceWorldEnv's"),
    ],
)
def test_bad_inputs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_splits_are_those_of_eto(monkeypatch, tmp_path):
    """211 unseen and 194 seen tasks; instructions come from the file of an earlier process, so no Java starts."""
    monkeypatch.setattr(science_world, "_cache", lambda: tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    env = ScienceWorldEnv()
    sizes = {}
    for split in ("train", "seen", "unseen"):
        mine = env._variations(split, everything=True)
        version = env._package.__version__
        jsonl.rewrite(tmp_path / f"scienceworld-{version}-easy-{split}.jsonl", [[*pair, "Do it."] for pair in mine])
        sizes[split] = env.tasks(split)
    assert {split: len(tasks) for split, tasks in sizes.items()} == {"train": 2286, "seen": 194, "unseen": 211}
    assert len({task.id for tasks in sizes.values() for task in tasks}) == 2286 + 194 + 211
    assert all(task.split == split for split, tasks in sizes.items() for task in tasks)
    assert {task.type: task.max_steps for task in sizes["unseen"]}["boil"] == 100
    assert len({task.type for task in sizes["unseen"]}) == 24
    assert len(ScienceWorldEnv(per_type=2).tasks("train")) == 48


@needs_java
def test_the_simulator(tmp_path, monkeypatch):
    """One Java process for all that needs one: it takes seconds to start."""
    monkeypatch.setattr(science_world, "_cache", lambda: tmp_path)
    with ScienceWorldEnv(observe=("inventory",)) as env:
        task = env.task("find-plant", 230)
        assert (task.id, task.split, task.max_steps, task.type) == ("scienceworld/find-plant/230", "unseen", 15, "find-plant")
        assert task.instruction.startswith("Task Description:\nYour task is to find a(n) plant") or (
            task.instruction.startswith("Your task is to find a(n) plant")
        )
        for name, (train, dev, total, _) in science_world._TYPES.items():
            if name in ("find-plant", "identify-life-stages-2"):
                env._start().load(name, 0, "easy", False)
                assert list(env._server.getVariationsTrain()) == list(range(train))
                assert list(env._server.getVariationsDev()) == list(range(train, train + dev))
                assert list(env._server.getVariationsTest()) == list(range(train + dev, total))
        first = env.reset(task)
        assert first.startswith("This room is called the")
        observation, reward, done, info = env.step("frobnicate the wug")
        assert (observation, reward, done) == ("No known action matches that input.", 0.0, False)
        assert info["inventory"].startswith("In your inventory")
        assert {name: info[name] for name in ("valid", "score", "ticks")} == {"valid": False, "score": 0, "ticks": 0}
        assert env.step("wait")[3]["ticks"] == 10
        gold = env.gold_actions(task)  # in the middle of an episode, which goes on after it
        assert env.step("wait1")[3]["ticks"] == 1
        assert not [action for action in gold if action.startswith("go to")]
        got = rollout(env, ScriptedExecutor("gold", GoldGuide({task.id: gold}), skill=1.0), task)
        assert (got.reward, got.done, got.actions) == (1.0, True, tuple(gold))
        assert got.steps <= task.max_steps
        again = rollout(env, ScriptedExecutor("gold", GoldGuide({task.id: gold}), skill=1.0), task)
        assert again == got

        env.reset(env.task("boil", 21))
        assert "look around" in env.commands()
        env.step("teleport to kitchen")
        assert env.step("focus on stove")[1:3] == (-1.0, True)
        with pytest.raises(RuntimeError, match="after the end"):
            env.step("wait")

        monkeypatch.setattr(env, "_per_type", 1)
        monkeypatch.setattr(science_world, "_TYPES", {"boil": science_world._TYPES["boil"]})
        (only,) = env.tasks("seen")
        assert only.id == "scienceworld/boil/14"
        assert jsonl.read(next(tmp_path.glob("*-seen.jsonl"))) == [["boil", 14, only.instruction]]
        process = env._simulator._gateway.java_process
        assert os.path.exists(f"/proc/{process.pid}")
    assert process.poll() is not None
    with pytest.raises(RuntimeError, match="after close"):
        env.step("wait")
