"""A decoder that trains in a test, a data set for it, and a policy that is a single distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.models import ByteTokenizer
from jaxlab.models.decoder import Decoder, DecoderConfig, init_params
from jaxlab.rl import GRPOConfig, GRPOTrainer
from jaxlab.rl.logps import TokenLogps
from jaxlab.rl.rollout import Rollout
from jaxlab.training import OptimizerConfig, optimizer

MODEL = Decoder(
    DecoderConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
)
TOKENIZER = ByteTokenizer()
DATA = [{"prompt": prompt, "bound": 64} for prompt in ("one", "twelve", "3", "four of them", "fi", "six!")]
RATE, EPS = 2e-2, 3e-3
"""Adam's eps is that large so that rounding does not decide about the sign of a step."""


@functools.cache
def params():
    """Parameters of MODEL, larger than at the start of training: distributions differ, gradients have less noise."""
    made = jax.tree.map(lambda leaf: 2 * leaf, init_params(MODEL, jax.random.key(0)))
    return {**made, "embed": {"embedding": 20 * made["embed"]["embedding"]}}


def low_characters(prompts, completions, *, bound):
    """The share of characters below the bound."""
    return [
        float(np.mean([ord(c) < limit for c in completion])) if completion else 0.0
        for completion, limit in zip(completions, bound)
    ]


def adamw(**changes):
    """The optimiser of all runs."""
    return optimizer(
        OptimizerConfig(**{"learning_rate": RATE, "b2": 0.999, "eps": EPS, "weight_decay": 0.01, **changes})
    )


def config(**changes):
    """One program for all runs that change no size: 4 prompts, 4 completions of 6 tokens."""
    sizes = {"prompts_per_step": 4, "num_generations": 4, "max_prompt_length": 12, "max_completion_length": 6}
    return GRPOConfig(**{**sizes, "steps": 3, **changes})


def trainer(config, *, reward_fns=(low_characters,), data=DATA, **options):
    """A trainer of the decoder."""
    return GRPOTrainer(MODEL, params(), list(reward_fns), config, data, TOKENIZER, **{"tx": adamw(), **options})


VOCABULARY, ROWS, LENGTH = 5, 8, 3


def table_logps(params, inputs):
    """A policy of one distribution: `params` `[V]` are its logits, `inputs` `[B,T]` tokens."""
    logs = jax.nn.log_softmax(params)
    return TokenLogps(logs[inputs], jnp.full(inputs.shape, -jnp.sum(jnp.exp(logs) * logs)))


def table_params():
    """Five logits."""
    return jnp.asarray([0.3, -0.2, 0.9, 0.0, -1.1])


def table_config(**changes):
    """Two groups of four completions of three tokens."""
    sizes = {"prompts_per_step": 2, "num_generations": 4, "max_completion_length": LENGTH}
    return GRPOConfig(**{**sizes, "steps": 1, **changes})


def table_rollout(params, key, draw, *, rewards=None, lengths=None, metrics=None):
    """A batch that only `draw` decides; log-probabilities under mask 0 are NaN, as they never matter."""
    random = np.random.default_rng(draw)
    lengths = random.integers(1, LENGTH + 1, ROWS) if lengths is None else np.asarray(lengths)
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.float32)
    tokens = random.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    logps = np.asarray(table_logps(table_params(), jnp.asarray(tokens)).logp) + 0.3 * random.standard_normal(mask.shape)
    drawn = random.standard_normal(ROWS)
    return Rollout(
        inputs=tokens,
        mask=mask,
        logps=np.where(mask > 0, logps, np.nan).astype(np.float32),
        rewards=np.asarray(drawn if rewards is None else rewards, np.float32),
        truncated=lengths == LENGTH,
        metrics=metrics or {},
    )
