"""TextWorld through its own package; a game takes seconds to make, so there is one."""

import warnings

import pytest

pytest.importorskip("textworld", reason="the extra 'agents' is not installed")

from jaxlab.eaglet import Task, TextWorldEnv


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextWorldEnv(n_tasks=0), "n_tasks"),
        (lambda: TextWorldEnv(lengths=(4, 7)), "lengths, unseen_lengths"),
        (lambda: TextWorldEnv().reset(Task("x", "", 1, "", "train")), "task: expected one of TextWorldEnv's"),
    ],
)
def test_bad_inputs(make, message):
    with pytest.raises(ValueError, match=message):
        make()
