"""TextWorld through its own package; a game takes seconds to make, so there is one."""

import warnings

import pytest

pytest.importorskip("textworld", reason="the extra 'agents' is not installed")

from jaxlab.eaglet import GoldGuide, ScriptedExecutor, Task, TextWorldEnv, rollout


def test_a_game(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own
        with TextWorldEnv(str(tmp_path / "games"), rooms=2, objects=3, lengths=(2,), n_tasks=1) as env:
            (task,) = env.tasks("train")
            assert (task.type, task.max_steps) == ("quest of 2", 50)
            assert env.tasks("train") == [task]
            first = env.reset(task)
            assert first.startswith("-= ")
            assert task.instruction not in first
            assert "$$" not in first
            assert env.step("frob")[1:] == (0.0, False, {"valid": False})
            assert "look" in env.commands()
            assert env.step("look")[0].startswith("-= ")
            gold = env.gold_actions(task)
            assert len(gold) == 2
            env.reset(task)
            assert not env.step(gold[0])[2]
            observation, reward, done, info = env.step(gold[1])
            assert (reward, done, info) == (1.0, True, {"valid": True})
            assert "The End" not in observation
            made = sorted(file.name for file in (tmp_path / "games").iterdir())
            assert f"{task.id}.z8" in made
            assert len(made) <= 3
        with TextWorldEnv(rooms=2, objects=3, lengths=(2,), n_tasks=1, detailed=False) as env:
            (brief,) = env.tasks("train")
            assert env.gold_actions(brief) == gold
            assert brief.id != task.id
            assert len(brief.instruction) < len(task.instruction)


def test_rules_alone_give_the_same_episodes(tmp_path):
    options = {"rooms": 2, "objects": 4, "lengths": (3,), "unseen_lengths": (2,), "n_tasks": 1, "max_steps": 20}
    with warnings.catch_warnings(), TextWorldEnv(str(tmp_path), **options) as env:
        warnings.simplefilter("ignore")
        rules = TextWorldEnv(text=False, n_held_out=2, **options)
        (task,) = env.tasks("train")
        assert rules.tasks("train") == [task]
        assert [len(rules.tasks(split)) for split in ("seen", "unseen")] == [2, 2]
        assert rules.reset(task) == ""
        assert rules.step("frob")[1:] == (0.0, False, {"valid": False})
        guide = GoldGuide({task.id: env.gold_actions(task)})
        ends = set()
        for skill in (0.0, 0.5, 1.0):
            for seed in range(2):
                executor = ScriptedExecutor("some", guide, skill=skill)
                read, played = (rollout(world, executor, task, seed=seed) for world in (env, rules))
                assert (read.actions, read.reward, read.done) == (played.actions, played.reward, played.done)
                assert set(played.observations[1:]) <= {"", "You cannot do that."}
                ends.add(played.done)
        assert ends == {True, False}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextWorldEnv(n_tasks=0), "n_tasks"),
        (lambda: TextWorldEnv(n_held_out=0), "n_held_out"),
        (lambda: TextWorldEnv(lengths=(4, 7)), "lengths, unseen_lengths"),
        (lambda: TextWorldEnv().reset(Task("x", "", 1, "", "train")), "task: expected one of TextWorldEnv's"),
    ],
)
def test_bad_inputs(make, message):
    with pytest.raises(ValueError, match=message):
        make()
