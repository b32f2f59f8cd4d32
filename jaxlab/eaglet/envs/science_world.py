"""ScienceWorld (arXiv 2203.07540): school experiments in a simulated house, through its own package and Java.

The package's `step` lists all valid actions and looks around on every call, which takes most of its time; here an
action is three short calls, and more is asked for only where `observe` names it.
"""

import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxlab.core import jsonl
from jaxlab.core.errors import require
from jaxlab.core.progress import progress
from jaxlab.eaglet.envs.base import Task, TextEnv

# Variations for training, for development, in all; cap of an episode: ETO's (arXiv 2403.02502), None where it has none.
_TYPES: dict[str, tuple[int, int, int, int | None]] = {
    "boil": (14, 7, 30, 100),
    "change-the-state-of-matter-of": (14, 7, 30, 80),
    "chemistry-mix": (16, 8, 32, 60),
    "chemistry-mix-paint-secondary-color": (18, 9, 36, 15),
    "chemistry-mix-paint-tertiary-color": (18, 9, 36, 30),
    "find-animal": (150, 75, 300, 15),
    "find-living-thing": (150, 75, 300, 15),
    "find-non-living-thing": (150, 75, 300, 15),
    "find-plant": (150, 75, 300, 15),
    "freeze": (14, 7, 30, 80),
    "grow-fruit": (62, 31, 126, 60),
    "grow-plant": (62, 31, 126, 30),
    "identify-life-stages-1": (6, 3, 14, 30),
    "identify-life-stages-2": (4, 2, 10, 30),
    "inclined-plane-determine-angle": (84, 42, 168, None),
    "inclined-plane-friction-named-surfaces": (692, 346, 1386, None),
    "inclined-plane-friction-unnamed-surfaces": (80, 40, 162, None),
    "lifespan-longest-lived": (62, 31, 125, 10),
    "lifespan-longest-lived-then-shortest-lived": (62, 31, 125, 12),
    "lifespan-shortest-lived": (62, 31, 125, 10),
    "measure-melting-point-known-substance": (218, 109, 436, 120),
    "measure-melting-point-unknown-substance": (150, 75, 300, None),
    "melt": (14, 7, 30, 80),
    "mendelian-genetics-known-plant": (60, 30, 120, None),
    "mendelian-genetics-unknown-plant": (240, 120, 480, None),
    "power-component": (10, 5, 20, 20),
    "power-component-renewable-vs-nonrenewable-energy": (10, 5, 20, 30),
    "test-conductivity": (450, 225, 900, 30),
    "test-conductivity-of-unknown-substances": (300, 150, 600, 30),
    "use-thermometer": (270, 135, 540, 30),
}
_DEFAULT_CAP = 100  # the package's
_PER_TYPE = 10  # ETO: at most so many variations of a type in "seen" and "unseen"
_UNKNOWN = "No known action matches that input."
_WAIT = re.compile(r"You decide to wait for (\d+) iterations")
_EXTRAS: dict[str, Callable[[Any], Any]] = {
    "look": lambda server: server.freeActionLook(),
    "inventory": lambda server: server.freeActionInventory(),
    "valid_actions": lambda server: list(server.getValidActionObjectCombinations()),
}


class ScienceWorldEnv(TextEnv):
    """The 30 task types of ScienceWorld, of which the splits have the 24 that ETO uses.

    "train", "seen" and "unseen" are the package's training, development and test variations; the last two have the
    first 10 of each type: for "unseen" these are ETO's 211 tasks, for "seen" 199 (ETO drew 194 at random). `info` has
    `score`, the package's integer from -100 to 100, and `ticks`: the moments that passed, ten in a `wait`.

    One Java process serves one environment; it starts with the first task asked for and ends with `close`. It takes no
    seed, and now and then the same actions complete a task a moment earlier or later.
    """

    fatal = ("focus",)

    def __init__(
        self,
        simplification: str = "easy",
        observe: Sequence[str] = (),
        *,
        per_type: int | None = None,
        unseen_types: Sequence[str] = (),
        list_commands: bool = True,
    ):
        """Starts nothing.

        Args:
          simplification: the package's, comma-separated; "easy" is all of them, and brings the teleport action.
          observe: what `info` shows besides, each for a call more a step: "look", "inventory", "valid_actions".
          per_type: at most so many variations of each type in a split, "train" too, which has them from all over its
            range: those in a row are alike.
          unseen_types: types that "unseen" alone has, and then no others; none: all splits have all types.
          list_commands: False: `commands` is empty, as if nothing were known, which episodes do several times faster.

        Raises:
          MissingExtra: the package is not installed.
          ValueError: something unknown to observe, `per_type` below 1, or a type that the splits do not have.
        """
        super().__init__()
        self._package = require("scienceworld", "agents")
        for name in observe:
            if name not in _EXTRAS:
                raise ValueError(f"observe: expected names among {', '.join(_EXTRAS)}, got {name!r}")
        if per_type is not None and per_type < 1:
            raise ValueError(f"per_type: expected None or at least 1, got {per_type}")
        used = [name for name, (*_, cap) in _TYPES.items() if cap is not None]
        for name in unseen_types:
            if name not in used:
                raise ValueError(f"unseen_types: expected names among {', '.join(used)}, got {name!r}")
        self._simplification, self._observe, self._per_type = simplification, tuple(observe), per_type
        self._unseen_types = tuple(unseen_types)
        self._list_commands = list_commands
        self._simulator: Any = None
        self._server: Any = None
        self._task: Task | None = None
        self._history: list[str] = []
        self._instructions: dict[tuple[str, int], str] = {}
        self._gold: dict[str, list[str]] = {}

    def task(self, name: str, variation: int) -> Task:
        """Any task of the package, by the package's name of its type.

        Raises:
          ValueError: an unknown type or variation.
          RuntimeError: Java is missing.
        """
        if name not in _TYPES:
            raise ValueError(f"name: expected one of {', '.join(_TYPES)}, got {name!r}")
        train, dev, total, cap = _TYPES[name]
        if not 0 <= variation < total:
            raise ValueError(f"variation: expected 0 to {total - 1} for {name}, got {variation}")
        split = "train" if variation < train else "seen" if variation < train + dev else "unseen"
        if (name, variation) not in self._instructions:
            self._start().load(name, variation, self._simplification, False)
            self._instructions[name, variation] = self._server.getTaskDescription()
            self._restore()
        data = {"task": name, "variation": variation}
        instruction = self._instructions[name, variation]
        return Task(f"scienceworld/{name}/{variation}", instruction, cap or _DEFAULT_CAP, name, split, data)

    def _tasks(self, split: str) -> list[Task]:
        wanted = list(self._variations(split))
        store = self._store(split)
        self._instructions |= {(name, variation): text for name, variation, text in jsonl.read(store)}
        missing = [pair for pair in wanted if pair not in self._instructions]
        for name, variation in progress(missing, "instructions of ScienceWorld"):
            self.task(name, variation)
        if missing:  # a load each, so they are kept for the next process
            store.parent.mkdir(parents=True, exist_ok=True)
            mine = self._variations(split, everything=True)
            jsonl.rewrite(store, [[*pair, self._instructions[pair]] for pair in mine if pair in self._instructions])
        return [self.task(name, variation) for name, variation in wanted]

    def _store(self, what: str) -> Path:
        """The file that keeps something of this package and simplification for later processes."""
        version = getattr(self._package, "__version__", "")
        return _cache() / f"scienceworld-{version}-{self._simplification.replace(',', '+')}-{what}.jsonl"

    def _variations(self, split: str, *, everything: bool = False):
        for name, (train, dev, total, cap) in _TYPES.items():
            first, last = {"train": (0, train), "seen": (train, train + dev), "unseen": (train + dev, total)}[split]
            limit = self._per_type or (total if split == "train" else _PER_TYPE)
            chosen = range(first, last)
            if not everything and split == "train" and limit < len(chosen):
                chosen = [first + k * len(chosen) // limit for k in range(limit)]
            elif not everything:
                chosen = chosen[:limit]
            elsewhere = bool(self._unseen_types) and (name in self._unseen_types) != (split == "unseen")
            if cap is not None and (everything or not elsewhere):
                yield from ((name, variation) for variation in chosen)

    def _reset(self, task: Task, seed: int) -> str:
        if "variation" not in task.data:
            raise ValueError(f"task: expected one of ScienceWorldEnv's, got {task.id!r}")
        self._task, self._history = task, []
        return self._load(task)

    def _load(self, task: Task, *, gold: bool = False) -> str:
        server = self._start()
        server.load(task.data["task"], task.data["variation"], self._simplification, gold)
        server.reset()
        return server.step("look around")  # as the package begins

    def _step(self, action: str) -> tuple[str, float, bool, dict[str, Any]]:
        observation = self._server.step(action)
        self._history.append(action)
        score = round(100 * self._server.getScore())
        valid = observation != _UNKNOWN
        waited = _WAIT.match(observation)
        info = {"valid": valid, "score": score, "ticks": int(waited[1]) if waited else int(valid)}
        info |= {name: _EXTRAS[name](self._server) for name in self._observe}
        return observation, score / 100, bool(self._server.getCompleted()), info

    def commands(self) -> tuple[str, ...]:
        """All valid actions now; slow, which is why `step` does without."""
        return tuple(_EXTRAS["valid_actions"](self._server)) if self._running and self._list_commands else ()

    def gold_actions(self, task: Task) -> list[str]:
        """The package's path up to the action that completes the task, with walks through doors replaced by teleports.

        That is tried out first; a path that no longer leads there keeps its walks. Another Java process may find
        another path, so the first one found is kept in the user's cache, and later processes have the same.
        """
        if not self._gold:
            self._gold = dict(reversed(jsonl.read(self._store("gold"))))
        if task.id not in self._gold:
            self._load(task, gold=True)
            path = [str(action) for action in self._server.getGoldActionSequence()]
            teleports = {"easy", "teleportAction"} & set(self._simplification.split(","))
            found = self._replay(task, shortcut(path)) if teleports else None
            self._gold[task.id] = found or self._replay(task, path) or path
            jsonl.append(self._store("gold"), [task.id, self._gold[task.id]])
            self._restore()
        return list(self._gold[task.id])

    def _replay(self, task: Task, actions: Sequence[str]) -> list[str] | None:
        """The actions up to the one that completes the task, and waiting after it; None where they do not."""
        self._load(task)
        for number, action in enumerate(actions, 1):
            self._server.step(action)
            if self._server.getCompleted():
                if round(100 * self._server.getScore()) != 100:
                    return None
                waits = itertools.takewhile(lambda action: action.startswith("wait"), actions[number:])
                return [*actions[:number], *waits]  # another time it may take a moment longer
        return None

    def _restore(self) -> None:
        """Brings a running episode back to where it was."""
        if self._running and self._task is not None:
            self._load(self._task)
            for action in self._history:
                self._server.step(action)

    def _start(self) -> Any:
        if self._simulator is None:
            if shutil.which("java") is None:
                raise RuntimeError(
                    "ScienceWorld needs Java (8 or later) and there is no `java` on the PATH; install one, such as the "
                    "Debian package default-jre-headless"
                )
            self._simulator = self._package.ScienceWorldEnv("")
            self._server = self._simulator.server
        return self._server

    def close(self) -> None:
        """Ends the Java process."""
        if self._simulator is not None:
            process = self._simulator._gateway.java_process
            self._simulator.close()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._simulator = self._server = None
        self._running, self._why = False, "after close"


_DOOR = re.compile(r"open door to .+|look around")
_ENTER = re.compile(r"(?:go|teleport) to (.+)")


def shortcut(actions: Sequence[str]) -> list[str]:
    """A path with each walk from room to room replaced by one teleport, or by nothing where it leads back.

    A walk is an unbroken run of opening doors, entering rooms and looking around that enters a room; a run that enters
    none stays as it is.
    """
    short: list[str] = []
    walk: list[str] = []
    room = ""
    for action in [*actions, ""]:
        if _DOOR.fullmatch(action) or _ENTER.fullmatch(action):
            walk.append(action)
            continue
        entered = [found[1] for step in walk if (found := _ENTER.fullmatch(step))]
        if not entered:
            short += walk
        elif entered[-1] != room:
            room = entered[-1]
            short.append(f"teleport to {room}")
        walk = []
        short += [action] if action else []
    return short


def _cache() -> Path:
    import pooch

    return Path(pooch.os_cache("jaxlab"))
