"""A very small vision-language model over the words of the rendered maths, not trained, and questions for it."""

import functools

import jax

from jaxlab.models.qwen2_5_vl import init_params
from jaxlab.rl import GRPOConfig
from jaxlab.training import OptimizerConfig, SFTConfig
from jaxlab.vlm_scaling import visual_math
from jaxlab.vlm_scaling.small_model import Sizes, SmallModelConfig, Trained, tokenizer_of_words

SIZES = Sizes(hidden_size=32, layers=1, heads=2, vision_size=32, vision_layers=1, vision_heads=2, context=128)


@functools.cache
def untrained():
    tokenizer = tokenizer_of_words()
    model = SIZES.model(tokenizer)
    return Trained(model, init_params(model, jax.random.key(0)), tokenizer)


def questions(count=2, family="shapes", **options):
    return visual_math.questions(family, count, split="test", **options)


def config(**changes):
    """Shapes without noise: a model that has learnt the form of a solution is right now and then."""

    def sft(steps):
        return SFTConfig(steps=steps, batch_size=16, optimizer=OptimizerConfig(learning_rate=1e-2))

    return SmallModelConfig(
        **{
            "sizes": SIZES,
            "families": ("shapes",),
            "problems": 64,
            "noise": 0.0,
            "solver": sft(60),
            "base": sft(4),
            "sft": sft(4),
            "judged": 24,
            "samples": 2,
            "verdict_rows": 4,
            "rl": GRPOConfig(
                num_generations=4, prompts_per_step=2, max_completion_length=48, steps=2, learning_rate=1e-3
            ),
            **changes,
        }
    )
