"""WebShop (arXiv 2207.01206): buying what a customer describes. Shop, goods and search index are the user's."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from jaxlab.eaglet.envs.base import Task, TextEnv

# WebShop's own split of its shuffled goals; of test and development ETO and we take the first 200.
_GOALS = {"train": (1500, None), "seen": (500, 700), "unseen": (0, 200)}
_ACTION = re.compile(r"(search|click)\[(.+)\]")
_MAX_STEPS = 10  # ETO


class WebShopEnv(TextEnv):
    """WebShop's text shop; the reward is how well what was bought fits, in [0, 1].

    Actions are `search[words]` where there is a search field, and `click[button, product or option]`.
    """

    def __init__(self, folder: str | None = None, *, products: int | None = None, shop: Any = None):
        """Looks for the shop's code and data; the shop opens with the first task asked for.

        Args:
          folder: a checkout of WebShop after its `setup.sh`; None: `web_agent_site` is importable already.
          products: how many products to load: 1000, 100000, or None for all.
          shop: a ready `WebAgentTextEnv`, in place of both.

        Raises:
          FileNotFoundError: no checkout there, or no products in it; the message names what is missing.
          ImportError: `web_agent_site` does not load.
        """
        super().__init__()
        self._shop, self._products = shop, products
        if shop is not None:
            return
        if folder is not None:
            for needed in ("web_agent_site", "data"):
                if not (Path(folder) / needed).is_dir():
                    raise FileNotFoundError(
                        f"WebShop: {Path(folder) / needed} is missing; a checkout of WebShop has it after its setup.sh"
                    )
            if str(folder) not in sys.path:
                sys.path.append(str(folder))
        try:
            self._module = importlib.import_module("web_agent_site.envs")
        except ImportError as error:
            raise ImportError(
                f"WebShop's web_agent_site does not load ({error}); name the folder of a checkout, and install its "
                "requirements.txt"
            ) from error

    def _open(self) -> Any:
        if self._shop is None:
            self._shop = self._module.WebAgentTextEnv(
                observation_mode="text", num_products=self._products, human_goals=True
            )
        return self._shop

    def _tasks(self, split: str) -> list[Task]:
        goals = self._open().server.goals
        first, last = _GOALS[split]
        return [
            Task(
                f"webshop/{number}",
                goals[number]["instruction_text"],
                _MAX_STEPS,
                str(goals[number].get("category", "goal")),
                split,
                {"goal": number},
            )
            for number in range(first, min(len(goals), last or len(goals)))
        ]

    def _reset(self, task: Task, seed: int) -> str:
        if "goal" not in task.data:
            raise ValueError(f"task: expected one of WebShopEnv's, got {task.id!r}")
        return self._open().reset(task.data["goal"])[0]

    def _step(self, action: str) -> tuple[str, float, bool, dict[str, Any]]:
        if not self._valid(action):
            return "Invalid action!", 0.0, False, {"valid": False}
        observation, reward, done, _ = self._shop.step(action)
        return observation, float(reward), bool(done), {"valid": True}

    def _valid(self, action: str) -> bool:
        found = _ACTION.fullmatch(action)
        if found is None:
            return False
        shown = self._shop.get_available_actions()
        if found[1] == "search":
            return bool(shown["has_search_bar"])
        return found[2].lower() != "search" and found[2].lower() in [each.lower() for each in shown["clickables"]]

    def commands(self) -> tuple[str, ...]:
        """What can be clicked now; what can be searched for is up to the customer."""
        if not self._running:
            return ()
        return tuple(f"click[{each}]" for each in self._shop.get_available_actions()["clickables"] if each != "search")
