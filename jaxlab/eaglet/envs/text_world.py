"""TextWorld (arXiv 1806.11532): games about rooms, doors and things, made from a seed."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlab.core.errors import require
from jaxlab.eaglet.envs.base import SPLITS, Task, TextEnv

_PROMPT = re.compile(r"\n>[^\n]*$")
_END = re.compile(r"\n+ *\*\*\* The End \*\*\*.*", re.DOTALL)


class TextWorldEnv(TextEnv):
    """Games of TextWorld, each made from its own seed. The instruction is the game's objective.

    Tasks of a kind share the length of their quest; "unseen" has lengths of its own. Observations leave out banner and
    objective, so that the quest is told by the instruction alone. A game is written when it is first played (about
    4 s, 300 steps/s after that) and kept as long as its folder.
    """

    def __init__(
        self,
        folder: str | None = None,
        *,
        rooms: int = 5,
        objects: int = 10,
        lengths: Sequence[int] = (4, 5, 6),
        unseen_lengths: Sequence[int] = (7, 8),
        n_tasks: int = 16,
        seed: int = 0,
        max_steps: int = 50,
        detailed: bool = True,
    ):
        """Makes no game yet.

        Args:
          folder: where games are kept; None: in a temporary folder, until `close`.
          rooms: of each world.
          objects: in each world, at least.
          lengths: actions of the quests for training and "seen".
          unseen_lengths: those of the quests in "unseen".
          n_tasks: games in each split.
          seed: of the games.
          max_steps: cap of an episode.
          detailed: tell every step of the quest, as TextWorld does by itself; False: only the last one.

        Raises:
          MissingExtra: TextWorld is not installed.
          ValueError: no game, or a length in both lists.
        """
        super().__init__()
        self._textworld = require("textworld", "agents")
        if n_tasks < 1:
            raise ValueError(f"n_tasks: expected at least 1, got {n_tasks}")
        if not lengths or not unseen_lengths or set(lengths) & set(unseen_lengths):
            raise ValueError(f"lengths, unseen_lengths: expected some, none twice, got {lengths} and {unseen_lengths}")
        self._lengths = {"train": tuple(lengths), "seen": tuple(lengths), "unseen": tuple(unseen_lengths)}
        self._rooms, self._objects, self._n_tasks, self._seed = rooms, objects, n_tasks, seed
        self._max_steps, self._detailed = max_steps, detailed
        self._folder = None if folder is None else Path(folder)
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._made: dict[str, list[Task]] = {}
        self._unwritten: dict[str, Any] = {}  # games without a file, by task
        self._game: Any = None
        self._state: Any = None

    def _tasks(self, split: str) -> list[Task]:
        if split not in self._made:
            self._made[split] = [self._task(split, number) for number in range(self._n_tasks)]
        return list(self._made[split])

    def _task(self, split: str, number: int) -> Task:
        lengths = self._lengths[split]
        data: dict[str, Any] = {
            "length": lengths[number % len(lengths)],
            "seed": (self._seed * len(SPLITS) + SPLITS.index(split)) * 100_000 + number,
            "detailed": self._detailed,
            "rooms": self._rooms,
            "objects": self._objects,
        }
        game = self._textworld.generator.make_game(self._options(data))
        data["gold"] = list(game.metadata["walkthrough"])
        told = "all" if self._detailed else "end"
        name = f"textworld-{self._rooms}-{self._objects}-{data['length']}-{data['seed']}-{told}"
        self._unwritten[name] = game
        return Task(name, game.objective, self._max_steps, f"quest of {data['length']}", split, data)

    def _options(self, data: dict[str, Any]) -> Any:
        options = self._textworld.GameOptions()
        options.nb_rooms, options.nb_objects, options.seeds = data["rooms"], data["objects"], data["seed"]
        options.quest_length = options.chaining.min_length = options.chaining.max_length = data["length"]
        options.grammar.only_last_action = not data["detailed"]
        return options

    def _reset(self, task: Task, seed: int) -> str:
        if "length" not in task.data:
            raise ValueError(f"task: expected one of TextWorldEnv's, got {task.id!r}")
        self._end_game()
        infos = self._textworld.EnvInfos(
            description=True, admissible_commands=True, won=True, lost=True, score=True, max_score=True
        )
        self._game = self._textworld.start(str(self._file(task)), infos)
        self._state = self._game.reset()
        return _clean(self._state.description)

    def _place(self) -> Path:
        if self._folder is not None:
            return self._folder
        self._temporary = self._temporary or tempfile.TemporaryDirectory(prefix="jaxlab-textworld-")
        return Path(self._temporary.name)

    def _file(self, task: Task) -> Path:
        path = self._place() / f"{task.id}.z8"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            options = self._options(dict(task.data))
            # Written beside and moved, file by file, the game last: several processes may share a folder.
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                options.path = str(Path(scratch) / path.name)
                game = self._unwritten.pop(task.id, None) or self._textworld.generator.make_game(options)
                self._textworld.generator.compile_game(game, options)
                for made in sorted(Path(scratch).iterdir(), key=lambda file: file.suffix == ".z8"):
                    made.replace(path.parent / made.name)
        return path

    def _step(self, action: str) -> tuple[str, float, bool, dict[str, Any]]:
        valid = action in self._state.admissible_commands
        if not valid:
            return "You cannot do that.", self._state.score / self._state.max_score, False, {"valid": False}
        self._state, score, _ = self._game.step(action)
        score = -1.0 if self._state.lost else score / self._state.max_score
        return _clean(self._state.feedback), score, bool(self._state.won), {"valid": True}

    def commands(self) -> tuple[str, ...]:
        """What the game admits now."""
        return tuple(self._state.admissible_commands) if self._state is not None else ()

    def gold_actions(self, task: Task) -> list[str]:
        """The walk-through that was made with the game."""
        return list(task.data["gold"])

    def _end_game(self) -> None:
        if self._game is not None:
            self._game.close()
            self._game = self._state = None

    def close(self) -> None:
        """Ends the game, and forgets the games where no folder was given."""
        self._end_game()
        self._running = False
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None


def _clean(text: str) -> str:
    """An observation without prompt, status line and closing menu, and without empty lines."""
    text = _END.sub("", _PROMPT.sub("", text))
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())
