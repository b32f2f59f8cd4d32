"""ALFWorld (arXiv 2010.03768): household tasks as TextWorld games. The games are the user's."""

import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

from jaxlab.core.errors import require
from jaxlab.eaglet.envs.base import Task, TextEnv

_FOLDERS = {"train": "train", "seen": "valid_seen", "unseen": "valid_unseen"}
_KINDS = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
_GOAL = re.compile(r'Your task is to: ([^"\\\n]+)')  # in the grammar that is stored with a game
_ARRIVAL = re.compile(r"^You arrive at loc \S+ ")
_MAX_STEPS = 40  # ETO
_EXPERT_LIMIT = 200


class ALFWorldEnv(TextEnv):
    """ALFWorld's text games, from a folder that `alfworld-download` filled; the reward is 0 or 1."""

    def __init__(self, folder: str | None = None):
        """Looks for package and games, and starts nothing.

        Args:
          folder: with `json_2.1.1` inside; None: `$ALFWORLD_DATA`.

        Raises:
          MissingExtra: TextWorld is not installed.
          FileNotFoundError: there are no games; the message names what is missing, and what brings it.
          ImportError: the package alfworld does not load.
        """
        super().__init__()
        self._textworld = require("textworld", "agents")
        named = folder or os.environ.get("ALFWORLD_DATA")
        hint = "`alfworld-download` brings it; name its folder, or set ALFWORLD_DATA"
        if not named:
            raise FileNotFoundError(f"ALFWorld's games: no folder was named; {hint}")
        self._folder = Path(named) / "json_2.1.1"
        for name in _FOLDERS.values():
            if not (self._folder / name).is_dir():
                raise FileNotFoundError(f"ALFWorld's games: {self._folder / name} is missing; {hint}")
        try:
            self._alfworld = importlib.import_module("alfworld.agents.environment.alfred_tw_env")
        except ImportError as error:
            raise ImportError(f"the package alfworld does not load ({error}); pip install alfworld") from error
        self._game: Any = None
        self._state: Any = None

    def _tasks(self, split: str) -> list[Task]:
        root = self._folder / _FOLDERS[split]
        tasks = []
        for file in sorted(root.glob("*/*/game.tw-pddl")):
            name = file.parent.relative_to(root).as_posix()
            kind = name.partition("-")[0]
            if kind not in _KINDS or "movable" in name or "Sliced" in name:  # ALFWorld leaves these out too
                continue
            game = json.loads(file.read_text())
            goal = _GOAL.search(game["grammar"])
            if not game.get("solvable") or goal is None:
                continue
            data = {"game": str(file), "gold": tuple(game.get("walkthrough") or ())}
            tasks.append(Task(f"alfworld/{split}/{name}", goal[1].strip(), _MAX_STEPS, kind, split, data))
        if not tasks:
            raise FileNotFoundError(f"ALFWorld's games: no solvable game.tw-pddl below {root}; run `alfworld-download`")
        return tasks

    def _start(self, task: Task, *wrappers: Any) -> Any:
        if "game" not in task.data:
            raise ValueError(f"task: expected one of ALFWorldEnv's, got {task.id!r}")
        infos = self._textworld.EnvInfos(won=True, admissible_commands=True, feedback=True)
        return self._textworld.start(task.data["game"], infos, [self._alfworld.AlfredDemangler, *wrappers])

    def _reset(self, task: Task, seed: int) -> str:
        self.close()
        self._game = self._start(task)
        self._state = self._game.reset()
        return "\n".join(self._state.feedback.split("\n\n")[1:]).strip()  # without the greeting

    def _step(self, action: str) -> tuple[str, float, bool, dict[str, Any]]:
        if action not in self._state.admissible_commands:
            return "Nothing happens.", 0.0, False, {"valid": False}
        self._state, _, _ = self._game.step(action)
        observation = _ARRIVAL.sub("", self._state.feedback.strip())
        return observation, float(self._state.won), bool(self._state.won), {"valid": True}

    def commands(self) -> tuple[str, ...]:
        """What the game admits now."""
        return tuple(self._state.admissible_commands) if self._running else ()

    def gold_actions(self, task: Task) -> list[str]:
        """The walk-through that is stored with the game, else what ALFWorld's hand-written expert does.

        Raises:
          RuntimeError: the expert does not complete the task either.
        """
        if task.data["gold"]:
            return list(task.data["gold"])
        game = self._start(task, self._alfworld.AlfredExpert)
        try:
            state, actions = game.reset(), []
            while not state["won"] and len(actions) < _EXPERT_LIMIT:
                actions.append(state["extra.expert_plan"][0])
                state, _, _ = game.step(actions[-1])
        finally:
            game.close()
        if not state["won"]:
            raise RuntimeError(f"{task.id}: ALFWorld's expert did not complete it in {_EXPERT_LIMIT} actions")
        return actions

    def close(self) -> None:
        """Ends the game."""
        if self._game is not None:
            self._game.close()
            self._game = self._state = None
        self._running = False
