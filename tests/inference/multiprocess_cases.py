"""Generation over a mesh of eight devices, in one process and in two."""

import jax
import numpy as np

from jaxlab.core import make_mesh
from jaxlab.inference import SamplingParams, generate
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


def case_eight_devices_give_the_tokens_of_one(folder):
    model = Decoder(CONFIG)
    params = jax.tree.map(lambda leaf: 3 * leaf, init_params(model, jax.random.key(0)))
    prompts = [[1, 2, 3], [70, 80, 90, 100, 110], [5]]
    arguments = {"sampling": SamplingParams(max_tokens=6, temperature=0.7, top_k=50), "n": 2, "rng": jax.random.key(0)}
    one = generate(model, params, prompts, **arguments)
    many = generate(model, params, prompts, **arguments, mesh=make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    np.testing.assert_array_equal(many.tokens, one.tokens)
    np.testing.assert_allclose(many.logps, one.logps, atol=1e-4)
