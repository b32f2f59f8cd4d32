"""Worlds of text: what all of them are, and each of them.

Example:
    from jaxlab.eaglet.envs import GridQuestEnv

    with GridQuestEnv() as env:
        task = env.tasks("train")[0]
        observation = env.reset(task)
        for action in env.gold_actions(task):
            observation, reward, done, info = env.step(action)

Names are loaded when they are first used; no environment's package is imported before an environment is made.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.eaglet.envs.alf_world import ALFWorldEnv
    from jaxlab.eaglet.envs.base import SPLITS, Task, TextEnv
    from jaxlab.eaglet.envs.grid_quest import GridGuide, GridQuestEnv
    from jaxlab.eaglet.envs.question import ReasoningGymEnv
    from jaxlab.eaglet.envs.science_world import ScienceWorldEnv
    from jaxlab.eaglet.envs.text_world import TextWorldEnv
    from jaxlab.eaglet.envs.web_shop import WebShopEnv

__all__ = [
    "SPLITS",
    "ALFWorldEnv",
    "GridGuide",
    "GridQuestEnv",
    "ReasoningGymEnv",
    "ScienceWorldEnv",
    "Task",
    "TextEnv",
    "TextWorldEnv",
    "WebShopEnv",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "alf_world": ("ALFWorldEnv",),
        "base": ("SPLITS", "Task", "TextEnv"),
        "grid_quest": ("GridGuide", "GridQuestEnv"),
        "question": ("ReasoningGymEnv",),
        "science_world": ("ScienceWorldEnv",),
        "text_world": ("TextWorldEnv",),
        "web_shop": ("WebShopEnv",),
    },
)
