"""TextWorld (arXiv 1806.11532): games about rooms, doors and things, made from a seed."""

import re
import tempfile
import types
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
    objective, so that the quest is told by the instruction alone. A game is compiled when it is first played (about
    a second, 200 steps/s after that) and kept as long as its folder. Without `text` games are played by their rules
    alone: the same commands, scores and ends, nothing to read, nothing to compile.
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
        n_held_out: int | None = None,
        seed: int = 0,
        max_steps: int = 50,
        detailed: bool = True,
        text: bool = True,
    ):
        """Makes no game yet.

        Args:
          folder: where games are kept; None: in a temporary folder, until `close`.
          rooms: of each world.
          objects: in each world, at least.
          lengths: actions of the quests for training and "seen".
          unseen_lengths: those of the quests in "unseen".
          n_tasks: games in each split.
          n_held_out: games in "seen" and in "unseen"; None: as many as `n_tasks`.
          seed: of the games.
          max_steps: cap of an episode.
          detailed: tell every step of the quest, as TextWorld does by itself; False: only the last one.
          text: False: observations are empty, which suits executors that read none, such as scripted ones.

        Raises:
          MissingExtra: TextWorld is not installed.
          ValueError: no game, or a length in both lists.
        """
        super().__init__()
        self._textworld = require("textworld", "agents")
        n_held_out = n_tasks if n_held_out is None else n_held_out
        for name, count in {"n_tasks": n_tasks, "n_held_out": n_held_out}.items():
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        if not lengths or not unseen_lengths or set(lengths) & set(unseen_lengths):
            raise ValueError(f"lengths, unseen_lengths: expected some, none twice, got {lengths} and {unseen_lengths}")
        self._lengths = {"train": tuple(lengths), "seen": tuple(lengths), "unseen": tuple(unseen_lengths)}
        self._rooms, self._objects, self._seed = rooms, objects, seed
        self._counts = {"train": n_tasks, "seen": n_held_out, "unseen": n_held_out}
        self._max_steps, self._detailed, self._text = max_steps, detailed, text
        self._folder = None if folder is None else Path(folder)
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._made: dict[str, list[Task]] = {}
        self._games: dict[str, Any] = {}  # those without a file, by task
        self._game: Any = None
        self._state: Any = None

    def _tasks(self, split: str) -> list[Task]:
        if split not in self._made:
            self._made[split] = [self._task(split, number) for number in range(self._counts[split])]
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
        self._games[name] = game
        return Task(name, game.objective, self._max_steps, f"quest of {data['length']}", split, data)

    def _options(self, data: dict[str, Any]) -> Any:
        options = self._textworld.GameOptions()
        options.kb = self._textworld.generator.KnowledgeBase.default()  # reading the rules takes longer than a world
        options.nb_rooms, options.nb_objects, options.seeds = data["rooms"], data["objects"], data["seed"]
        options.quest_length = options.chaining.min_length = options.chaining.max_length = data["length"]
        options.grammar.only_last_action = not data["detailed"]
        return options

    def _reset(self, task: Task, seed: int) -> str:
        if "length" not in task.data:
            raise ValueError(f"task: expected one of TextWorldEnv's, got {task.id!r}")
        self._end_game()
        if not self._text:
            if task.id not in self._games:
                self._games[task.id] = self._textworld.generator.make_game(self._options(dict(task.data)))
            self._game = _Rules(self._textworld, self._games[task.id])
            self._state = self._game.reset()
            return ""
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
                game = self._games.pop(task.id, None) or self._textworld.generator.make_game(options)
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


class _Rules:
    """A game played by its rules, with what of TextWorld's own environment is asked for here."""

    def __init__(self, textworld: Any, game: Any):
        self._game, self._progression = game, textworld.generator.game.GameProgression
        self._inform7 = textworld.generator.inform7.Inform7Game(game)

    def reset(self) -> types.SimpleNamespace:
        """The state at the beginning."""
        self._now = self._progression(self._game, track_quests=False)  # which would look for shorter ways all along
        return self._state()

    def step(self, command: str) -> tuple[types.SimpleNamespace, int, bool]:
        """State, score and whether the game has ended, after a command that is admissible."""
        self._now.update(self._actions[command])
        state = self._state()
        return state, state.score, state.won or state.lost

    def _state(self) -> types.SimpleNamespace:
        actions = self._now.valid_actions
        self._actions = dict(zip(self._inform7.gen_commands_from_actions(actions), actions))
        quests = self._game.quests
        won = [self._any(quest.win_events) for quest in quests]
        return types.SimpleNamespace(
            admissible_commands=sorted(self._actions),
            feedback="",
            won=all(won),
            lost=any(self._any(quest.fail_events) for quest in quests),
            score=sum(quest.reward for quest, done in zip(quests, won) if done),
            max_score=self._game.max_score,
        )

    def _any(self, events: Sequence[Any]) -> bool:
        return any(event.is_triggering(self._now.state) for event in events)

    def close(self) -> None:
        """Nothing to end."""


def _clean(text: str) -> str:
    """An observation without prompt, status line and closing menu, and without empty lines."""
    text = _END.sub("", _PROMPT.sub("", text))
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())
