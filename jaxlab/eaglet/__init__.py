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
    from jaxlab.eaglet.cloning import clone_executors, demonstrations, world_texts
    from jaxlab.eaglet.consensus import FilterReport, hcf_filter
    from jaxlab.eaglet.controls import Sampled, ShuffledPlans, sample_plans
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
    from jaxlab.eaglet.evaluation import Comparison, EvalReport, compare, evaluate, false_gain_rate
    from jaxlab.eaglet.executors import Context, Executor, GoldGuide, Guide, OpenAIExecutor, ScriptedExecutor
    from jaxlab.eaglet.gain import capability_gain, ecgr, final_reward, format_reward, group_advantages, hcf_keep
    from jaxlab.eaglet.lm_executor import LMExecutor
    from jaxlab.eaglet.pairs import PairedRollout, PlanRewards, plan_rewards
    from jaxlab.eaglet.planner import Planner, TrainResult, train_sft
    from jaxlab.eaglet.plans import Plan, PlanParse, format_plan, parse_plan, plan_steps
    from jaxlab.eaglet.preferences import DPOConfig, dpo_loss, train_dpo
    from jaxlab.eaglet.prompts import executor_prompt
    from jaxlab.eaglet.reinforcement import PlanGRPOConfig, train_grpo
    from jaxlab.eaglet.rollouts import Rollout, RolloutCache, rollout
    from jaxlab.eaglet.served_executor import ServedExecutor
    from jaxlab.eaglet.synth import GoldPathPlanSource, OpenAIPlanSource, PlanSource, PlanSourceError

__all__ = [
    "ALFWorldEnv",
    "Comparison",
    "Context",
    "DPOConfig",
    "EvalReport",
    "Executor",
    "FilterReport",
    "GoldGuide",
    "GoldPathPlanSource",
    "GridGuide",
    "GridQuestEnv",
    "Guide",
    "LMExecutor",
    "OpenAIExecutor",
    "OpenAIPlanSource",
    "PairedRollout",
    "Plan",
    "PlanGRPOConfig",
    "PlanParse",
    "PlanRewards",
    "PlanSource",
    "PlanSourceError",
    "Planner",
    "ReasoningGymEnv",
    "Rollout",
    "RolloutCache",
    "Sampled",
    "ScienceWorldEnv",
    "ScriptedExecutor",
    "ServedExecutor",
    "ShuffledPlans",
    "Task",
    "TextEnv",
    "TextWorldEnv",
    "TrainResult",
    "WebShopEnv",
    "capability_gain",
    "clone_executors",
    "compare",
    "demonstrations",
    "dpo_loss",
    "ecgr",
    "evaluate",
    "executor_prompt",
    "false_gain_rate",
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
    "sample_plans",
    "train_dpo",
    "train_grpo",
    "train_sft",
    "world_texts",
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
        "cloning": (
            "clone_executors",
            "demonstrations",
            "world_texts",
        ),
        "controls": (
            "Sampled",
            "ShuffledPlans",
            "sample_plans",
        ),
        "evaluation": (
            "Comparison",
            "EvalReport",
            "compare",
            "evaluate",
            "false_gain_rate",
        ),
        "lm_executor": ("LMExecutor",),
        "planner": (
            "Planner",
            "TrainResult",
            "train_sft",
        ),
        "preferences": ("DPOConfig", "dpo_loss", "train_dpo"),
        "prompts": ("executor_prompt",),
        "reinforcement": (
            "PlanGRPOConfig",
            "train_grpo",
        ),
        "served_executor": ("ServedExecutor",),
        "synth": ("GoldPathPlanSource", "OpenAIPlanSource", "PlanSource", "PlanSourceError"),
    },
)
