"""EAGLET: a planner that writes one global plan, and an executor that acts on it alone (arXiv 2510.05608).

Example:
    from jaxlab.eaglet import GoldPathPlanSource, GridGuide, GridQuestEnv, RolloutCache, ScriptedExecutor, plan_rewards

    env = GridQuestEnv()
    expert = ScriptedExecutor("expert", GridGuide(), skill=0.5)
    novice = ScriptedExecutor("novice", GridGuide(), skill=0.1)
    write = GoldPathPlanSource(env, corruption=0.5)
    pairs = [(task, write(task)) for task in env.tasks("train")[:8]]
    print(plan_rewards(pairs, env=env, executors=(expert, novice), cache=RolloutCache()).final)

Names are loaded when they are first used, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.eaglet.consensus import FilterReport, hcf_filter
    from jaxlab.eaglet.envs import (
        ALFWorldEnv,
        GridGuide,
        GridQuestEnv,
        ReasoningGymEnv,
        ScienceWorldEnv,
        Task,
        TextEnv,
        TextWorldEnv,
        WebShopEnv,
    )
    from jaxlab.eaglet.executors import Context, Executor, GoldGuide, Guide, OpenAIExecutor, ScriptedExecutor
    from jaxlab.eaglet.gain import capability_gain, ecgr, final_reward, format_reward, group_advantages, hcf_keep
    from jaxlab.eaglet.pairs import PairedRollout, PlanRewards, plan_rewards
    from jaxlab.eaglet.plans import Plan, PlanParse, format_plan, parse_plan, plan_steps
    from jaxlab.eaglet.rollouts import Rollout, RolloutCache, rollout
    from jaxlab.eaglet.synth import GoldPathPlanSource, OpenAIPlanSource, PlanSource, PlanSourceError

__all__ = [
    "ALFWorldEnv",
    "Context",
    "Executor",
    "FilterReport",
    "GoldGuide",
    "GoldPathPlanSource",
    "GridGuide",
    "GridQuestEnv",
    "Guide",
    "OpenAIExecutor",
    "OpenAIPlanSource",
    "PairedRollout",
    "Plan",
    "PlanParse",
    "PlanRewards",
    "PlanSource",
    "PlanSourceError",
    "ReasoningGymEnv",
    "Rollout",
    "RolloutCache",
    "ScienceWorldEnv",
    "ScriptedExecutor",
    "Task",
    "TextEnv",
    "TextWorldEnv",
    "WebShopEnv",
    "capability_gain",
    "ecgr",
    "final_reward",
    "format_plan",
    "format_reward",
    "group_advantages",
    "hcf_filter",
    "hcf_keep",
    "parse_plan",
    "plan_rewards",
    "plan_steps",
    "rollout",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "consensus": ("FilterReport", "hcf_filter"),
        "envs": (
            "ALFWorldEnv",
            "GridGuide",
            "GridQuestEnv",
            "ReasoningGymEnv",
            "ScienceWorldEnv",
            "Task",
            "TextEnv",
            "TextWorldEnv",
            "WebShopEnv",
        ),
        "executors": ("Context", "Executor", "GoldGuide", "Guide", "OpenAIExecutor", "ScriptedExecutor"),
        "gain": ("capability_gain", "ecgr", "final_reward", "format_reward", "group_advantages", "hcf_keep"),
        "pairs": ("PairedRollout", "PlanRewards", "plan_rewards"),
        "plans": ("Plan", "PlanParse", "format_plan", "parse_plan", "plan_steps"),
        "rollouts": ("Rollout", "RolloutCache", "rollout"),
        "synth": ("GoldPathPlanSource", "OpenAIPlanSource", "PlanSource", "PlanSourceError"),
    },
)
