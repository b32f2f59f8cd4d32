"""What all environments promise, and the ones that need no package, or a stand-in for one."""

import json
import sys
import time
import types

import numpy as np
import pytest

from jaxlab.eaglet import ALFWorldEnv, GridQuestEnv, ReasoningGymEnv, Task, WebShopEnv
from jaxlab.eaglet.envs.grid_quest import PLACES
from tests.eaglet.toys import TASK, EchoEnv


def test_the_reward_is_the_best_so_far():
    with EchoEnv() as env:
        env.reset(TASK)
        assert [env.step(word)[1] for word in ("half", "huh", "yes")] == [0.5, 0.5, 1.0]
        env.reset(TASK)
        env.step("half")
        assert env.step("die")[1:3] == (-1.0, True)
    assert env.closed


def test_out_of_turn():
    env = EchoEnv()
    with pytest.raises(RuntimeError, match="before reset"):
        env.step("yes")
    env.reset(TASK)
    env.step("yes")
    with pytest.raises(RuntimeError, match="after the end"):
        env.step("yes")
    with pytest.raises(ValueError, match="split: expected one of train, seen, unseen, got 'test'"):
        env.tasks("test")


@pytest.mark.latest
def test_grid_quest_is_solved_by_gold_and_by_nothing_shorter_than_it():
    env = GridQuestEnv(size=4, n_tasks=30, seed=2)
    for split in ("train", "seen", "unseen"):
        for task in env.tasks(split):
            env.reset(task)
            gold = env.gold_actions(task)
            assert len(gold) <= task.max_steps
            rewards = []
            for action in gold:
                assert action in env.commands()
                _, reward, done, info = env.step(action)
                assert info == {"valid": True}
                rewards.append(reward)
            assert done
            assert sorted(set(rewards)) in ([0.25, 0.5, 0.75, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0])


def test_grid_quest_hides_what_a_planner_can_learn():
    env = GridQuestEnv(n_tasks=60)
    recipes = {}
    for split in ("train", "seen", "unseen"):
        for task in env.tasks(split):
            recipes.setdefault(task.type, set()).add(task.data["recipe"])
            assert not any(place in task.instruction for place in PLACES)
    assert all(len(known) == 1 for known in recipes.values())  # the words decide the recipe
    types = {split: {task.type for task in env.tasks(split)} for split in ("train", "seen", "unseen")}
    assert types["seen"] == types["train"]
    assert not types["unseen"] & types["train"]
    halves = {word for kind in types["train"] for word in kind.split()}
    assert {word for kind in types["unseen"] for word in kind.split()} == halves
    task = env.tasks("train")[0]
    assert env.reset(task) == GridQuestEnv().reset(task, seed=9)
    assert all(f": {place}." in env.reset(task) for place in PLACES)
    assert env.tasks("train") == GridQuestEnv(n_tasks=60).tasks("train")
    assert env.tasks("train") != GridQuestEnv(n_tasks=60, seed=1).tasks("train")


def test_grid_quest_refuses():
    env = GridQuestEnv(size=3)
    task = env.tasks("train")[0]
    first = env.reset(task)
    for action in ("fly", "use moon"):
        observation, reward, done, info = env.step(action)
        assert (observation, reward, done, info) == (f"You cannot do that. {first}", 0.0, False, {"valid": False})
    for wrong in (Task("x", "", 1, "", "train"), GridQuestEnv(size=4).tasks("train")[0]):
        with pytest.raises(ValueError, match="task: expected one of"):
            env.reset(wrong)
    with pytest.raises(RuntimeError):
        env.step("north")
    with pytest.raises(ValueError, match="size: expected at least 3"):
        GridQuestEnv(size=2)
    with pytest.raises(ValueError, match="n_tasks"):
        GridQuestEnv(n_tasks=0)


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym", reason="the extra 'rl' is not installed")
    env = ReasoningGymEnv(("chain_sum",), unseen=("spell_backward",), n_tasks=3)
    tasks = env.tasks("train")
    assert len(tasks) == 3
    assert tasks[0].instruction != env.tasks("seen")[0].instruction
    assert {task.type for task in env.tasks("unseen")} == {"spell_backward"}
    assert env.reset(tasks[0]) == tasks[0].instruction
    assert env.step(env.gold_actions(tasks[0])[0])[1:] == (1.0, True, {"valid": True})
    env.reset(tasks[0])
    _, reward, done, _ = env.step("no idea")
    assert reward < 1.0
    assert done
    with pytest.raises(ValueError, match="names, unseen"):
        ReasoningGymEnv(("a",), unseen=("a",))


class State(dict):
    """What TextWorld returns: fields by name and by attribute."""

    __getattr__ = dict.__getitem__


class Game:
    """What ALFWorld's games look like from outside."""

    taken = False

    def _state(self, feedback, won=False):
        commands = ["go to desk 1", "take mug 1", "put mug 1"]
        expert = {"extra.expert_plan": [commands[1 + self.taken]]}
        return State(feedback=feedback, won=won, admissible_commands=commands, **expert)

    def reset(self):
        return self._state("-= Welcome =-\n\nYou are in a room.\n\nYour task is to: put a mug.")

    def step(self, command):
        won = self.taken and command == "put mug 1"
        self.taken |= command == "take mug 1"
        told = "You arrive at loc 3. On the desk 1, you see a mug 1." if command.startswith("go") else "Done."
        return self._state(told, won), 0, won

    def close(self):
        self.closed = True


@pytest.fixture
def alfworld(tmp_path, monkeypatch):
    """A folder of games, a stand-in for the package, and for TextWorld's starter."""
    textworld = pytest.importorskip("textworld", reason="the extra 'agents' is not installed")
    name = "alfworld.agents.environment.alfred_tw_env"
    parts = name.split(".")
    for k in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:k]), types.ModuleType(".".join(parts[:k])))
    monkeypatch.setattr(sys.modules[name], "AlfredDemangler", "demangler", raising=False)
    monkeypatch.setattr(sys.modules[name], "AlfredExpert", "expert", raising=False)
    started = []
    monkeypatch.setattr(textworld, "start", lambda *arguments: started.append(arguments) or Game())
    kind = "pick_and_place_simple-Mug-None-Desk-308"
    games = {
        f"train/{kind}/trial_1": {"solvable": True, "walkthrough": ["take mug 1", "put mug 1"]},
        f"train/{kind}/trial_2": {"solvable": True},
        f"train/{kind}/trial_3": {"solvable": False},
        "train/pick_and_place_with_movable_recep-A-B-C-1/trial_1": {"solvable": True},
    }
    for place in ("valid_seen", "valid_unseen"):
        (tmp_path / "json_2.1.1" / place).mkdir(parents=True)
    for path, game in games.items():
        file = tmp_path / "json_2.1.1" / path / "game.tw-pddl"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"grammar": '"rhs": "Your task is to: put a mug in desk."', **game}))
    return tmp_path, started


def test_alfworld_with_a_stand_in(alfworld):
    folder, started = alfworld
    env = ALFWorldEnv(str(folder))
    stored, found = env.tasks("train")
    assert (stored.instruction, stored.type, stored.max_steps) == ("put a mug in desk.", "pick_and_place_simple", 40)
    assert stored.id.endswith("trial_1")
    assert env.reset(stored) == "You are in a room.\nYour task is to: put a mug."
    assert env.step("go to desk 1")[0] == "On the desk 1, you see a mug 1."
    assert env.step("fly")[0::3] == ("Nothing happens.", {"valid": False})
    assert [env.step(action)[1:3] for action in env.gold_actions(stored)] == [(0.0, False), (1.0, True)]
    assert env.gold_actions(found) == ["take mug 1", "put mug 1"]
    assert started[0][2] == ["demangler"]
    assert started[-1][2] == ["demangler", "expert"]
    with pytest.raises(FileNotFoundError, match=r"no solvable game.tw-pddl below .*valid_seen"):
        env.tasks("seen")


def test_alfworld_says_what_is_missing(tmp_path, monkeypatch):
    pytest.importorskip("textworld", reason="the extra 'agents' is not installed")
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"no folder was named; `alfworld-download`"):
        ALFWorldEnv()
    with pytest.raises(FileNotFoundError, match=r"json_2.1.1/train is missing; `alfworld-download`"):
        ALFWorldEnv(str(tmp_path))
    for place in ("train", "valid_seen", "valid_unseen"):
        (tmp_path / "json_2.1.1" / place).mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "alfworld", None)
    with pytest.raises(ImportError, match="pip install alfworld"):
        ALFWorldEnv(str(tmp_path))


class Shop:
    """What WebShop's text environment looks like from outside."""

    def __init__(self):
        goals = [{"instruction_text": f"Find me thing {k}.", "category": "food"} for k in range(1502)]
        self.server = types.SimpleNamespace(goals=goals)

    def reset(self, session):
        self.at = "search"
        return f"Instruction: thing {session}", None

    def get_available_actions(self):
        return {"has_search_bar": self.at == "search", "clickables": ["search"] if self.at == "search" else ["Buy Now"]}

    def step(self, action):
        done = action.startswith("click")
        self.at = "item"
        return f"After {action}", 0.75 if done else 0, done, None


def test_webshop_with_a_stand_in():
    env = WebShopEnv(shop=Shop())
    assert [len(env.tasks(split)) for split in ("train", "seen", "unseen")] == [2, 200, 200]
    task = env.tasks("unseen")[7]
    assert (task.id, task.instruction, task.max_steps) == ("webshop/7", "Find me thing 7.", 10)
    assert env.reset(task) == "Instruction: thing 7"
    assert env.commands() == ()
    for wrong in ("buy it", "click[Buy Now]", "click[search]", "search[]"):
        assert env.step(wrong)[1:] == (0.0, False, {"valid": False})
    assert env.step("search[thing]")[1:] == (0.0, False, {"valid": True})
    assert env.commands() == ("click[Buy Now]",)
    assert env.step("click[buy now]")[1:] == (0.75, True, {"valid": True})
    with pytest.raises(NotImplementedError, match="WebShopEnv knows no gold actions"):
        env.gold_actions(task)


def test_webshop_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="web_agent_site is missing"):
        WebShopEnv(str(tmp_path))
    with pytest.raises(ImportError, match=r"web_agent_site does not load .* install its requirements.txt"):
        WebShopEnv()


def test_the_grid_makes_thousands_of_steps_a_second():
    env = GridQuestEnv()
    task = env.tasks("train")[0]
    times = []
    for _ in range(5):
        env.reset(task)
        start = time.perf_counter()
        for action in ("north", "south") * 50:
            env.step(action)
        times.append(time.perf_counter() - start)
    assert 100 / np.min(times) > 2000
