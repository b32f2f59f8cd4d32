import dataclasses

import jax
import pytest

from jaxlab.models import ByteTokenizer
from jaxlab.models.decoder import Decoder, MoESpec, init_params
from tests.inference.multiprocess_cases import CONFIG


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
    model = Decoder(dataclasses.replace(CONFIG, moe=MoESpec(4, 2, 16), tie_word_embeddings=False, qkv_bias=True))
    return model, init_params(model, jax.random.key(1))
