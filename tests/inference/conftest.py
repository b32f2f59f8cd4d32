import dataclasses

import jax
import pytest

from jaxlab.models import ByteTokenizer
from jaxlab.models.decoder import Decoder, DecoderConfig, init_params

CONFIG = DecoderConfig(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    max_position_embeddings=128,
)


@pytest.fixture(scope="session")
def model():
    return Decoder(CONFIG)


@pytest.fixture(scope="session")
def params(model):
    # Larger than at the start of training, so that distributions differ and greedy texts do not repeat one token.
    return jax.tree.map(lambda leaf: 3 * leaf, init_params(model, jax.random.key(0)))


@pytest.fixture(scope="session")
def tokenizer():
    return ByteTokenizer()


@pytest.fixture(scope="session")
def sparse():
    """A mixture of experts, with its parameters."""
    from jaxlab.models.decoder import MoESpec

    model = Decoder(dataclasses.replace(CONFIG, moe=MoESpec(4, 2, 16), tie_word_embeddings=False, qkv_bias=True))
    return model, init_params(model, jax.random.key(1))
