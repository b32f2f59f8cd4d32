"""A small world in which a plan is worth having: the way is in sight, what to do is not.

Eight places lie somewhere on a grid, and the observation tells the direction of each, and how much is done. A task
("brew the amber tonic") is a recipe: four places to be used in order. Half of a recipe comes with the first word and
half with the second, the same in every task, and neither is told: a planner can learn them, an executor that only looks
around cannot. Pairs of words that training never had ("unseen") need both halves.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlab.eaglet.envs.base import SPLITS, Task, TextEnv

if TYPE_CHECKING:
    from jaxlab.eaglet.executors import Context

PLACES = ("garden", "forge", "well", "library", "tower", "market", "chapel", "cellar")
_FIRST = ("amber", "bitter", "cloudy", "dark", "emerald", "frozen")
_SECOND = ("tonic", "salve", "ink", "perfume", "broth", "dye")
_MOVES = {"north": (-1, 0), "south": (1, 0), "east": (0, 1), "west": (0, -1)}


class GridQuestEnv(TextEnv):
    """The grid world; a step costs some microseconds.

    Commands are the four directions and, in a place, "use <place>". Using the recipe's next place brings it forward,
    anything else changes nothing; the reward is the part of the recipe that is done. There is no chance in an episode.
    """

    def __init__(self, size: int = 6, n_tasks: int = 64, seed: int = 0):
        """Makes a world.

        Args:
          size: cells along each side, at least 3.
          n_tasks: tasks in each split.
          seed: of the recipes and of where everything lies.

        Raises:
          ValueError: a size below 3, or no task.
        """
        super().__init__()
        if size < 3:
            raise ValueError(f"size: expected at least 3, got {size}")
        if n_tasks < 1:
            raise ValueError(f"n_tasks: expected at least 1, got {n_tasks}")
        self.size, self.n_tasks, self.seed = size, n_tasks, seed
        self._cell, self._done = (0, 0), 0
        self._cells: dict[tuple[int, int], str] = {}
        self._recipe: Sequence[str] = ()

    def _tasks(self, split: str) -> list[Task]:
        pairs = [(a, b) for a in range(6) for b in range(6) if ((a + b) % 6 == 0) == (split == "unseen")]
        recipes = _recipes(self.seed)
        tasks = []
        for number in range(self.n_tasks):
            rng = np.random.default_rng((self.seed, SPLITS.index(split), number))
            a, b = pairs[number % len(pairs)]
            cells = rng.choice(self.size**2, size=len(PLACES) + 1, replace=False).tolist()
            data = {
                "cells": {place: divmod(cell, self.size) for place, cell in zip(PLACES, cells)},
                "start": divmod(cells[-1], self.size),
                "recipe": (*recipes[0][a], *recipes[1][b]),
                "size": self.size,
            }
            name = f"grid-quest-{self.size}-{self.seed}-{split}-{number}"
            instruction = f"Brew the {_FIRST[a]} {_SECOND[b]}."
            # The longest way between two cells, before each of four uses, always fits.
            tasks.append(Task(name, instruction, 8 * self.size, f"{_FIRST[a]} {_SECOND[b]}", split, data))
        return tasks

    def _reset(self, task: Task, seed: int) -> str:
        if "recipe" not in task.data:
            raise ValueError(f"task: expected one of GridQuestEnv's, got {task.id!r}")
        if task.data["size"] != self.size:
            raise ValueError(f"task: expected one of size {self.size}, got {task.id!r}")
        self._cells = {tuple(cell): place for place, cell in task.data["cells"].items()}
        self._cell, self._recipe, self._done = tuple(task.data["start"]), task.data["recipe"], 0
        return self._look()

    def _step(self, action: str) -> tuple[str, float, bool, dict[str, Any]]:
        here, valid = self._cells.get(self._cell), action in self.commands()
        told = "You cannot do that." if not valid else ""
        if valid and action in _MOVES:
            self._cell = (self._cell[0] + _MOVES[action][0], self._cell[1] + _MOVES[action][1])
        elif valid:
            works = here == self._recipe[self._done]
            self._done += works
            told = "It works." if works else "Nothing happens."
        done = self._done == len(self._recipe)
        return f"{told} {self._look()}".strip(), self._done / len(self._recipe), done, {"valid": valid}

    def commands(self) -> tuple[str, ...]:
        """The ways that do not leave the grid, and the use of the place that one is in."""
        inside = range(self.size)
        row, column = self._cell
        ways = [name for name, (down, right) in _MOVES.items() if row + down in inside and column + right in inside]
        here = self._cells.get(self._cell)
        return (*ways, f"use {here}") if here else tuple(ways)

    def gold_actions(self, task: Task) -> list[str]:
        """The shortest way through the recipe."""
        cell, actions = tuple(task.data["start"]), []
        for place in task.data["recipe"]:
            goal = tuple(task.data["cells"][place])
            actions += [*_ways(cell, goal), f"use {place}"]
            cell = goal
        return actions

    def _look(self) -> str:
        seen = []  # the way comes before the place: a small decoder finds a name again, and what led up to it
        for (row, column), place in self._cells.items():
            ways = [*dict.fromkeys(_ways(self._cell, (row, column)))]
            seen.append(f"{' '.join(ways) or 'here'}: {place}.")
        return f"{self._done} of {len(self._recipe)} done. {' '.join(seen)}"


class GridGuide:
    """Hands and feet in the grid world, for `ScriptedExecutor`: finds its way to any place, and knows the recipes."""

    def subgoals(self, task: Task) -> list[str]:
        """The recipe, as a plan would tell it."""
        return [f"use {place}" for place in task.data["recipe"]]

    def achieves(self, subgoal: str, action: str, observation: str) -> bool:
        """Whether an action did what a step of a plan says, with success or in vain."""
        return action == subgoal and not observation.startswith("You cannot")

    def next_action(self, context: "Context", subgoal: str) -> str | None:
        """The next command towards a subgoal; None where it is not understood."""
        return next(iter(self.towards(context, subgoal)), None)

    def towards(self, context: "Context", subgoal: str) -> tuple[str, ...]:
        """All commands that bring a subgoal nearer, or reach it; none where it is not understood."""
        verb, _, place = subgoal.partition(" ")
        if verb != "use" or place not in PLACES:
            return ()
        way = context.observation.partition(f": {place}.")[0].rpartition(". ")[2].split()
        return (subgoal,) if way == ["here"] else tuple(way)


def _ways(cell: Sequence[int], goal: Sequence[int]) -> list[str]:
    down, right = goal[0] - cell[0], goal[1] - cell[1]
    return ["south" if down > 0 else "north"] * abs(down) + ["east" if right > 0 else "west"] * abs(right)


@functools.cache
def _recipes(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Two places for each first word, from one half of the places, and two for each second word, from the other."""
    rng = np.random.default_rng((seed, 1 << 20))
    places = rng.permutation(PLACES).tolist()
    halves = []
    for half in (places[:4], places[4:]):
        pairs = [(one, other) for one in half for other in half if one != other]
        halves.append([pairs[k] for k in rng.choice(len(pairs), size=6, replace=False)])
    return halves[0], halves[1]
