import jax
import numpy as np
import pytest

from jaxlab.core import make_mesh
from jaxlab.inference import SamplingParams, generate

PROMPTS = [[1, 2, 3], [70, 80, 90, 100, 110], [5]]


@pytest.mark.parametrize("shape", [{"data": 4, "tensor": 2}, {"data": 2, "fsdp": 4}])
def test_eight_devices_give_the_tokens_of_one(model, params, shape):
    sampling = SamplingParams(max_tokens=6, temperature=0.7, top_k=50)
    one = generate(model, params, PROMPTS, sampling, n=2, rng=jax.random.key(0))
    many = generate(model, params, PROMPTS, sampling, n=2, rng=jax.random.key(0), mesh=make_mesh(shape))
    np.testing.assert_array_equal(many.tokens, one.tokens)
    np.testing.assert_allclose(many.logps, one.logps, atol=1e-4)
