import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.puzzlemoe import MoELayer, expert_stats
from jaxlab.puzzlemoe.layer import route_rows

# One shape for the package, so that a function is compiled once: N experts, k of them a token.
N, K, D, F = 6, 2, 16, 24


@pytest.fixture(scope="package")
def layer():
    keys = jax.random.split(jax.random.key(0), 4)
    gate, up = (0.3 * jax.random.normal(key, (N, D, F)) for key in keys[:2])
    down = 0.3 * jax.random.normal(keys[2], (N, F, D))
    router = 0.5 * jax.random.normal(keys[3], (D, N))
    return MoELayer(router, gate, up, down, top_k=K, norm_topk_prob=True, act="silu")


@pytest.fixture(scope="package")
def x():
    """Calibration batches `[B,T,d]`."""
    return jax.random.normal(jax.random.key(1), (2, 20, D))


@pytest.fixture(scope="package")
def stats(layer, x):
    """Of one call over all tokens."""
    rows = x.reshape(-1, D)
    return expert_stats(rows, layer.gate, layer.up, route_rows(layer, rows)[0])


@pytest.fixture(scope="package")
def gaussians():
    """Two independent Gaussian tensors of a million weights, sigma 0.02, bfloat16."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(0.02 * rng.normal(size=(1000, 1000)), jnp.bfloat16) for _ in range(2)]
