"""One small decoder with experts, calibrated and compressed once for the package."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from jaxlab.models.decoder import Decoder, DecoderConfig, MoESpec, init_params
from jaxlab.puzzlemoe import PuzzleConfig, collect_expert_stats, compress_moe

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    qkv_bias=True,
    moe=MoESpec(8, 2, 24, shared_ffn_size=8, shared_gate=True, sparse_layers=(1, 2)),
    model_type="qwen2_moe",
)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 2, 48)).astype(np.int32)
"""Two batches `[B,T]`."""


class Compressed(NamedTuple):
    model: Decoder
    params: dict
    report: object


@functools.cache
def original():
    model = Decoder(CONFIG)
    # Larger than at the start of training, so that experts matter and greedy choices are clear.
    return model, jax.tree.map(lambda leaf: 4 * leaf, init_params(model, jax.random.key(0)))


@functools.cache
def statistics():
    return collect_expert_stats(*original(), TOKENS)


@functools.cache
def compressed(ratio=0.5, unmerged="bf16"):
    return Compressed(*compress_moe(*original(), statistics(), PuzzleConfig(ratio=ratio, unmerged=unmerged)))


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens):
    return model.apply({"params": params}, tokens).logits


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
